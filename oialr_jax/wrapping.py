"""The front door for an existing training step, as with Flax's TrainState.

The step stays as it is; `apply_fn` and `tx` of its state are replaced.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oialr_jax.adaptive import AdaptiveStep, adaptive
from oialr_jax.defaults import Choice, Selection, check_params, scheduled
from oialr_jax.factored import factored
from oialr_jax.lowrank import PyTree, leaves_by_path, owner_of
from oialr_jax.matrices import Matrices, find_matrices
from oialr_jax.rehearsal import check_state, line, shapes, shown, traced
from oialr_jax.schedule import RankRule, Schedule
from oialr_jax.sharding import Layout
from oialr_jax.transform import freeze_bases, is_frozen


def wrap(
    state: Any,
    train_step: Callable[..., Any],
    *example: Any,
    delay: int | None = None,
    steps: int | None = None,
    budget: float | int | None = None,
    select: Selection = MappingProxyType({}),
    schedule: Schedule | None = None,
    rule: RankRule | None = None,
    follow: str | Sequence[str] = (),
    layout: Layout | None = None,
    tx: Any = None,
    **options: Any,
) -> tuple[Any, AdaptiveStep]:
    """Host side: a state and its training step, made ready for low rank.

        state, step = wrap(state, train_step, batch, delay=2500)
        state, metrics = step(state, batch)  # in the place of train_step

    The new state has a frozen optimizer, with the moments that it had, and its model
    function is `factored(state.apply_fn)`. A step that calls `state.apply_fn` and
    `state.apply_gradients`, jitted or not, then runs on low-rank params as it is.

    A model function that the step calls by another name cannot be replaced: write
    `forward = oialr_jax.factored(model.apply)` there, and give its matrices as
    `select`.

    Args:     example: the arguments of the step after the state; shapes suffice.
              delay, steps, budget, select, schedule, rule, layout: as in `training`.
              follow: fields of the state that hold copies of the params, as "ema".
              tx: of a state without `.tx`: the frozen optimizer that the step uses.
              options: of `adaptive`: `moment_rule`, `due`, `jit`, and those of `jit`.
    Raises:   ValueError, TypeError: what `training` and `adaptive` raise; a step that
              fails on the example, or does not call `state.apply_fn`; no optimizer.
    """
    plan = scheduled(delay, steps, schedule)
    choice = Choice(budget, rule, select, once=schedule is None)
    check_state(state, (follow,) if isinstance(follow, str) else follow, example)
    check_params(state.params, only_arrays="jit" not in options)
    tx = getattr(state, "tx", tx)
    if tx is None:
        raise ValueError(
            "the optimizer is not known, as the state has no `.tx`: give wrap(..., "
            "tx=tx), the oialr_jax.freeze_bases(...) of the step and state.opt_state"
        )
    found = Matrices()
    if isinstance(select, Mapping):
        found = _found(state, train_step, example)
    matrices = choice.matrices(found)

    changes: dict[str, Any] = {"step": jnp.asarray(state.step, jnp.int32)}
    if getattr(state, "apply_fn", None) is not None:
        changes["apply_fn"] = factored(state.apply_fn)
    if hasattr(state, "tx") and not _is_frozen(state.opt_state):
        tx = freeze_bases(tx)
        outside = freeze_bases(optax.identity()).init(state.params)
        changes["tx"] = tx
        changes["opt_state"] = outside._replace(inner_state=state.opt_state)
    state = state.replace(**changes)
    step = adaptive(
        train_step,
        tx,
        matrices,
        plan,
        choice.rule_for(state.params, matrices),
        follow=follow,
        layout=layout,
        **options,
    )
    step.check(state, *example)
    state = jax.tree.map(lambda x: jnp.copy(x) if hasattr(x, "dtype") else x, state)
    return state if layout is None else jax.device_put(state, layout(state)), step


def _is_frozen(opt_state: PyTree) -> bool:
    return any(map(is_frozen, jax.tree.leaves(opt_state, is_leaf=is_frozen)))


def _found(
    state: Any, train_step: Callable[..., Any], example: tuple[Any, ...]
) -> Matrices:
    """The matrices in all calls of `state.apply_fn` by a step, in execution order.

    The step is traced with a function in the place of it that notes the shapes of its
    arguments; one of them is the parameter whose path its own path ends with.
    """
    calls: list[Any] = []
    apply_fn = getattr(state, "apply_fn", None)

    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append(shapes((args, kwargs)))
        return apply_fn(*args, **kwargs)

    if apply_fn is not None:
        out = traced(train_step, state.replace(apply_fn=noting), *example)
        if isinstance(out, Exception):
            given = ", ".join(["state", *map(shown, example)])
            raise ValueError(
                f"train_step({given}) fails: give wrap the state, the step and one "
                f"batch as the step gets it ({line(out)})"
            ) from out
    if not calls:
        raise ValueError(
            "train_step does not call state.apply_fn, so its matrices cannot be found: "
            "write state.apply_fn there; or forward = oialr_jax.factored(model.apply), "
            "and here select=oialr_jax.select(oialr_jax.find_matrices(forward, ...))"
        )

    def forward(params: PyTree, calls: list[Any]) -> list[Any]:
        owners = leaves_by_path(params)

        def given(path: Any, leaf: Any) -> Any:
            owner = owners.get(owner_of(path, owners))
            same = getattr(owner, "shape", None) == getattr(leaf, "shape", ())
            return owner if same else leaf

        calls = jax.tree_util.tree_map_with_path(given, calls)
        return [apply_fn(*args, **kwargs) for args, kwargs in calls]

    return find_matrices(forward, state.params, calls)
