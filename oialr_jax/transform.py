"""Optax over cores: frozen bases have no optimizer state, no decay and no update."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from oialr_jax import dataflow, effects
from oialr_jax.dataflow import Known, by_shapes
from oialr_jax.lowrank import (
    LowRank,
    PyTree,
    arrays_only,
    check_forms,
    is_low_rank,
    map_low_rank,
    named_leaves,
    path_name,
)
from oialr_jax.renames import replaced


class FreezeBasesState(NamedTuple):
    """State of `freeze_bases`: that of the inner transformation over `trainable`.

    `pending` is int32 with one entry per leaf of the params, in tree order: the rank
    that was chosen for the next rank event, 0 for none. It is part of the state so that
    a run resumed in between equals the uninterrupted one.
    """

    inner_state: Any
    pending: Array

    @staticmethod
    def crosses() -> Mapping[str, str]:
        """What the fields hold when bases turn."""
        return {"inner_state": "state"}


class FrozenBases(optax.GradientTransformationExtraArgs):
    """What `freeze_bases` returns: no update of it moves a basis."""

    def _replace(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """With another update it is no longer known to be one."""
        return optax.GradientTransformationExtraArgs(*self)._replace(**changes)


def pending_ranks(params: PyTree, opt_state: PyTree) -> dict[str, int]:
    """Host side: the ranks that wait for their event, by path."""
    names = list(named_leaves(arrays_only(params)))
    found: dict[str, int] = {}
    for state in jax.tree.leaves(opt_state, is_leaf=is_frozen):
        if is_frozen(state):
            ranks = jax.device_get(state.pending).tolist()
            found |= {k: r for k, r in zip(names, ranks, strict=True) if r}
    return found


def with_pending(params: PyTree, opt_state: PyTree, ranks: Mapping[str, int]) -> PyTree:
    """Host side: the optimizer state with these ranks waiting, and no others."""
    names = named_leaves(arrays_only(params))
    vector = np.array([ranks.get(name, 0) for name in names], np.int32)

    def replaced(state: Any) -> Any:
        if not is_frozen(state):
            return state
        old = state.pending  # where it was: another place is another program
        place = old.sharding if getattr(old, "committed", False) else None
        return state._replace(pending=jax.device_put(vector, place))

    return jax.tree.map(replaced, opt_state, is_leaf=is_frozen)


def is_frozen(x: object) -> bool:
    """Whether x is the state of `freeze_bases`."""
    return isinstance(x, FreezeBasesState)


def trainable(params: PyTree) -> PyTree:
    """The trained leaves: cores in the place of their nodes, other leaves as they are.

    The tree has the structure of the dense params tree, so masks, labels and rules that
    were written for the dense model fit it, before and after any change of rank.
    """
    return map_low_rank(lambda node: node.s, params)


def with_trainable(params: PyTree, trained: PyTree) -> PyTree:
    """`params` with cores and dense leaves from a tree shaped like `trainable`."""
    return jax.tree.map(
        lambda leaf, new: (
            dataclasses.replace(leaf, s=new) if is_low_rank(leaf) else new
        ),
        params,
        trained,
        is_leaf=is_low_rank,
    )


@replaced(
    reference="freeze_bases(optax.chain(tx, oialr_jax.stability.keep_reference()))"
)
def freeze_bases(
    inner: optax.GradientTransformation | optax.MultiSteps,
) -> FrozenBases:
    """The inner transformation on cores and dense leaves; the bases never move.

    Wrap the whole chain, outermost: clipping then sees the norm of the trained leaves
    only, weight decay acts on the core (which is decay of W, linear in S), and state
    exists for cores and dense leaves alone. Updates of bases are zeros, so
    `optax.apply_updates` and `TrainState.apply_gradients` work as they are. The norm of
    params or gradients is `global_norm`; `optax.global_norm` outside counts the bases.

    Takes gradients of `jax.grad` (LowRank nodes) or of `oialr_jax.value_and_grad`
    (arrays in the place of cores); the latter need `params` in `update`. Extra
    arguments for line searches, SAM and the like (`value`, `grad`, `value_fn`,
    `grad_fn`) are given to `update` as for dense params: functions of the params tree,
    gradients with or without bases. A line search that reuses values takes them from
    `oialr_jax.transform.value_and_grad_from_state`.

    Masks and labels must be the same for a core, which has two axes, as for its dense
    matrix: give them as a tree, computed once from the dense params.

    >>> from oialr_jax.lowrank import Axes, factor
    >>> params = {"w": factor(jnp.ones((4, 3)), Axes((4, 3), (), (0,), (1,)), rank=1)}
    >>> state = freeze_bases(optax.trace(0.9)).init(params)
    >>> [leaf.shape for leaf in jax.tree.leaves(state.inner_state)]
    [(1, 1)]
    """
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> FreezeBasesState:
        check_forms(params, what="freeze_bases takes")
        leaves = len(jax.tree.leaves(params, is_leaf=is_low_rank))
        pending = jnp.zeros(leaves, jnp.int32)
        return FreezeBasesState(inner.init(trainable(params)), pending)

    def update(
        updates: PyTree,
        state: FreezeBasesState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, FreezeBasesState]:
        cores, inner_state = inner.update(
            trainable(updates),
            state.inner_state,
            None if params is None else trainable(params),
            **{k: _seen_inside(k, x, params) for k, x in extra_args.items()},
        )
        frozen = map_low_rank(_still, updates if params is None else params)
        return with_trainable(frozen, cores), state._replace(inner_state=inner_state)

    return FrozenBases(init, update)


def _seen_inside(name: str, extra: Any, params: PyTree | None) -> Any:
    """An extra argument of `update` as the inner transformation takes it.

    That knows `trainable(params)` alone: a function of params is called with the nodes
    around it, and what has nodes (gradients, an old tree) is given without bases.
    """
    if not callable(extra):
        return trainable(extra)
    if params is None:
        raise ValueError(
            f"`{name}` is a function of the params, so `update` needs them: "
            f"tx.update(grads, state, params, {name}=...)"
        )
    trained = trainable(params)
    structure: Any = jax.tree.structure(trained)
    shapes = list(map(jnp.shape, jax.tree.leaves(trained)))

    def whole(x: Any) -> Any:
        same = structure == jax.tree.structure(x)
        same = same and list(map(jnp.shape, jax.tree.leaves(x))) == shapes
        return with_trainable(params, x) if same else x

    @functools.wraps(extra, updated=())
    def inside(*args: Any, **kwargs: Any) -> Any:
        kwargs = {k: whole(x) for k, x in kwargs.items()}
        return trainable(extra(*map(whole, args), **kwargs))

    return inside if any(map(is_low_rank, leaves_of(params))) else extra


def leaves_of(tree: PyTree) -> list[Any]:
    """The leaves, a LowRank node being one."""
    return jax.tree.leaves(tree, is_leaf=is_low_rank)


def value_and_grad(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., Any]:
    """Like `jax.value_and_grad(loss)` over the first argument, without its bases.

    The gradient has an array in the place of each core and of each dense leaf, and
    nothing for the bases: what is averaged over devices is r x r, not (m + n) x r.
    Leaves that are no float arrays (integers, keys, Python numbers, functions) get
    None. In-place changes of the loss to its arguments, as modules make to batch
    statistics, reach the caller's objects.

    Args:     axis_name: under `jax.pmap` or `jax.shard_map`, the mapped axis over which
              loss, aux and gradients are averaged. Under `jax.jit` the compiler does
              it.
    """

    def run(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        given = ((params, *args), kwargs)
        originals = jax.tree.leaves(given, is_leaf=is_low_rank)
        trained, treedef = jax.tree.flatten(trainable(params))
        is_trained = [_has_gradient(x) for x in trained]
        changed: list[effects.Template] = []

        def of_trained(arrays: list[Any]) -> Any:
            full = _merged(trained, is_trained, arrays)
            tree = with_trainable(params, jax.tree.unflatten(treedef, full))
            copy = jax.tree.map(lambda x: x, ((tree, *args), kwargs))
            leaves = jax.tree.leaves(copy, is_leaf=is_low_rank)
            before = jax.tree.structure(copy, is_leaf=is_low_rank)
            origin = dict(zip(map(id, leaves), originals, strict=True))
            out = loss(*copy[0], **copy[1])
            after, changes = effects.Template.of(
                copy, (jax.Array, np.ndarray), origin, is_leaf=is_low_rank
            )
            now = jax.tree.leaves(copy, is_leaf=is_low_rank)
            if after.tree != before or not all(map(operator.is_, now, leaves)):
                effects.refuse_shared(given)
                effects.write(given, after.fill(changes), dry=True)
                changed[:] = [after]
            return (out[0], (out[1], changes)) if has_aux else (out, (None, changes))

        arrays = [x for x, keep in zip(trained, is_trained, strict=True) if keep]
        grad = jax.value_and_grad(of_trained, has_aux=True)
        (value, (aux, changes)), grads = grad(arrays)
        if changed:
            effects.write(given, changed[0].fill(changes))
        grads = _merged([None] * len(trained), is_trained, grads)
        result = (value, aux) if has_aux else value, jax.tree.unflatten(treedef, grads)
        return result if axis_name is None else jax.lax.pmean(result, axis_name)

    return run


def _has_gradient(leaf: Any) -> bool:
    kinds = (jax.Array, np.ndarray, np.generic)
    return isinstance(leaf, kinds) and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _merged(leaves: list[Any], replaced: list[bool], new: list[Any]) -> list[Any]:
    """`leaves`, with those that are `replaced` taken from `new` in order."""
    rest = iter(new)
    return [next(rest) if x else y for y, x in zip(leaves, replaced, strict=True)]


def value_and_grad_from_state(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Like `optax.value_and_grad_from_state(loss)`, for a state of `freeze_bases`.

    The value and gradient that a line search found at these params, if it left them in
    `state`, else computed, as after a rank event. The gradient is that of
    `value_and_grad`: an array in the place of each core and dense leaf.
    """

    def run(params: PyTree, *args: Any, state: PyTree, **kwargs: Any) -> Any:
        def of_trainable(trained: PyTree, *args: Any, **kwargs: Any) -> Any:
            return loss(with_trainable(params, trained), *args, **kwargs)

        of_state = optax.value_and_grad_from_state(of_trainable)
        return of_state(trainable(params), *args, state=state, **kwargs)

    return run


def _still(node: LowRank) -> LowRank:
    u, vt = jnp.zeros_like(node.u), jnp.zeros_like(node.vt)
    return dataclasses.replace(node, u=u, vt=vt)


# Whether another optimizer keeps the bases

UNWRAPPED = (
    "build it as oialr_jax.freeze_bases(tx), everything inside it and nothing outside: "
    "freeze_bases(optax.chain(a, b)), not optax.chain(freeze_bases(a), b)"
)


def check_frozen(tx: Any, params: PyTree) -> None:
    """Whether no update of `tx` moves a basis; params may be abstract.

    What `freeze_bases` returns needs no look. Around it may stand what leaves zeros
    zeros, by the jaxpr of `tx.update`: scales, clips, conditions.

    Raises:   ValueError: the update of a basis is not known to be zero, there is state
              for bases, or `freeze_bases` has a part of the params alone; the params
              are those of Optax's lookahead.
    """
    if not any(map(is_low_rank, leaves_of(params))):
        return
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "optax.LookaheadParams holds each matrix twice, with bases of its own, in "
            "which fast and slow weights cannot be compared: an optimizer may keep "
            "averages in its state instead, as optax.contrib.schedule_free does"
        )
    if isinstance(tx, FrozenBases):
        return
    _check_traced(tx, by_shapes(params))


@functools.lru_cache(maxsize=64)
def _check_traced(tx: Any, shapes: Known) -> None:
    params = shapes.tree
    state = jax.eval_shape(tx.init, params)
    frozen = [x for x in jax.tree.leaves(state, is_leaf=is_frozen) if is_frozen(x)]
    if not frozen or any(map(is_low_rank, leaves_of(state))):
        raise ValueError(f"the optimizer would move frozen bases: {UNWRAPPED}")
    count = len(leaves_of(params))
    if any(x.pending.shape != (count,) for x in frozen):
        raise ValueError(
            f"`freeze_bases` has a part of the {count} parameters alone: {UNWRAPPED}"
        )
    update = dataflow.trace_update(tx, params)
    if isinstance(update, Exception):
        raise ValueError(
            f"whether the optimizer moves frozen bases cannot be seen ({update}): "
            f"{UNWRAPPED}"
        ) from update
    facts = dataflow.facts(update.jaxpr, [dataflow.Fact() for _ in update.inputs])
    still = {
        path[1:]
        for path, fact in zip(update.outputs, facts, strict=True)
        if path[0] == 0 and fact.constant == 0
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_low_rank):
        if not is_low_rank(leaf):
            continue
        for factor in ("u", "vt"):
            if (*path, jax.tree_util.GetAttrKey(factor)) not in still:
                raise ValueError(
                    f"the optimizer would move the frozen bases of {path_name(path)}: "
                    f"{UNWRAPPED}"
                )
