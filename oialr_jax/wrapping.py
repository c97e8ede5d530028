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
from oialr_jax.lowrank import (
    Calls,
    Marked,
    PyTree,
    is_marked,
    named_leaves,
    with_leaves,
)
from oialr_jax.matrices import Matrices, find_matrices
from oialr_jax.rehearsal import check_state, line, shapes, shown, traced
from oialr_jax.schedule import RankRule, Schedule
from oialr_jax.sharding import Layout
from oialr_jax.transform import freeze_bases, is_frozen
from oialr_jax.weighing import Weighing


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
    weighing: Weighing | None = None,
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
    `forward = oialr_jax.factored(model.apply)` there, or `factored(loss)`, around
    jax.vmap. The matrices are those of every function that the step calls in this way.

    Args:     example: the arguments of the step after the state; shapes suffice.
              delay, steps, budget, select, schedule, rule, layout: as in `training`.
              weighing: of a loss of (state, *args), to divide the budget by what each
              direction is worth in it; the state needs a field `curvature`.
              follow: fields of the state that hold copies of the params, as "ema".
              tx: of a state without `.tx`: the frozen optimizer that the step uses.
              options: of `adaptive`: `moment_rule`, `due`, `jit`, and those of `jit`.
    Raises:   ValueError, TypeError: what `training` and `adaptive` raise; a step that
              fails on the example, or calls neither `state.apply_fn` nor a function
              that is `factored`; no optimizer.
    """
    plan = scheduled(delay, steps, schedule)
    choice = Choice(
        budget, rule, select, once=schedule is None, by_loss=weighing is not None
    )
    check_state(state, (follow,) if isinstance(follow, str) else follow, example)
    check_params(state.params, only_arrays="jit" not in options)
    tx = getattr(state, "tx", tx)
    if tx is None:
        raise ValueError(
            "the optimizer is not known, as the state has no `.tx`: give wrap(..., "
            "tx=tx), the oialr_jax.freeze_bases(...) of the step and state.opt_state"
        )
    changes: dict[str, Any] = {"step": jnp.asarray(state.step, jnp.int32)}
    if getattr(state, "apply_fn", None) is not None:
        changes["apply_fn"] = factored(state.apply_fn)
    found = Matrices()
    if isinstance(select, Mapping):
        check_call(train_step, (state, *example))
        low = state.replace(**changes)
        found = found_in(
            lambda params: train_step(low.replace(params=params), *example),
            state.params,
            "write state.apply_fn there, or forward = oialr_jax.factored(model.apply), "
            "or jax.value_and_grad(oialr_jax.factored(loss))",
        )
    matrices = choice.matrices(found)

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
        weighing=weighing,
        layout=layout,
        **options,
    )
    step.check(state, *example)
    state = jax.tree.map(lambda x: jnp.copy(x) if hasattr(x, "dtype") else x, state)
    return state if layout is None else jax.device_put(state, layout(state)), step


def _is_frozen(opt_state: PyTree) -> bool:
    return any(map(is_frozen, jax.tree.leaves(opt_state, is_leaf=is_frozen)))


def found_in(run: Callable[[PyTree], Any], params: PyTree, hint: str) -> Matrices:
    """Host side: the matrices in what run(params) calls through `factored`, in order.

    It is traced with marks in the place of leaves, which note those calls.

    Args:     hint: what to write where there is none.
    Raises:   ValueError: there is none, or one that gets a part of a leaf.
    """
    calls, params = Calls(), shapes(params)
    leaves = named_leaves(params)
    marks = {
        name: Marked(leaf, name, calls)
        for name, leaf in leaves.items()
        if len(getattr(leaf, "shape", ())) >= 2
    }
    out = traced(run, with_leaves(params, marks))
    if not calls:
        why = f" ({line(out)})" if isinstance(out, Exception) else ""
        raise ValueError(
            "train_step calls no function of the params through oialr_jax.factored, so "
            f"that it could not run in low rank: {hint}{why}"
        )

    for x in jax.tree.leaves(list(calls), is_leaf=is_marked):
        if is_marked(x) and x.shape != leaves[x.path].shape:
            raise ValueError(
                f"train_step calls a function through oialr_jax.factored on a part of "
                f"{x.path}, {shown(x.array)} of {shown(leaves[x.path])}: jax.vmap and "
                "jax.lax.scan over params belong inside, "
                "oialr_jax.factored(jax.vmap(loss))"
            )

    def forward(params: PyTree, calls: list[Any]) -> list[Any]:
        leaves = named_leaves(params)
        calls = jax.tree.map(
            lambda x: leaves[x.path] if is_marked(x) else x, calls, is_leaf=is_marked
        )
        return [fn(*args, **kwargs) for fn, args, kwargs in calls]

    return find_matrices(forward, params, list(calls))


def check_call(train_step: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """Host side: raise if the step fails on these arguments, by shapes alone.

    Raises:   ValueError: it does.
    """
    out = traced(train_step, *given)
    if isinstance(out, Exception):
        said = ", ".join(["state", *map(shown, given[1:])])
        raise ValueError(
            f"train_step({said}) fails: give wrap the state, the step and one "
            f"batch as the step gets it ({line(out)})"
        ) from out
