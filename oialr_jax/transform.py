"""Optax over cores: frozen bases have no optimizer state, no decay and no update."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from oialr_jax.lowrank import (
    LowRank,
    PyTree,
    arrays_only,
    is_low_rank,
    map_low_rank,
    named_leaves,
)


class FreezeBasesState(NamedTuple):
    """State of `freeze_bases`: that of the inner transformation over `trainable`.

    `pending` is int32 with one entry per leaf of the params, in tree order: the rank
    that was chosen for it and that the next rank event gives it, 0 for none. It is part
    of the state so that a run resumed in between does what the uninterrupted one does.
    `reference` is what `trainable` was at the last update, for a schedule that waits
    for stable bases; else `()`.
    """

    inner_state: Any
    pending: Array
    reference: Any = ()


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


def reference_of(opt_state: PyTree) -> PyTree | None:
    """What `trainable(params)` was at the last update, if `freeze_bases` keeps it."""
    for state in jax.tree.leaves(opt_state, is_leaf=is_frozen):
        if is_frozen(state) and jax.tree.leaves(state.reference):
            return state.reference
    return None


def with_reference(opt_state: PyTree, reference: PyTree) -> PyTree:
    """The optimizer state with another reference."""
    return jax.tree.map(
        lambda x: x._replace(reference=reference) if is_frozen(x) else x,
        opt_state,
        is_leaf=is_frozen,
    )


def is_frozen(x: object) -> bool:
    """Whether x is the state of `freeze_bases`."""
    return isinstance(x, FreezeBasesState)


def trainable(params: PyTree) -> PyTree:
    """What is trained: cores in the place of their nodes, every other leaf as it is.

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


def freeze_bases(
    inner: optax.GradientTransformation | optax.MultiSteps,
    *,
    reference: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The inner transformation on cores and dense leaves; the bases never move.

    Wrap the whole chain, outermost: clipping then sees the norm of the trained leaves
    only, weight decay acts on the core (which is decay of W, linear in S), and state
    exists for cores and dense leaves alone. Updates of bases are zeros, so
    `optax.apply_updates` and `TrainState.apply_gradients` work as they are.

    Takes gradients of `jax.grad` (LowRank nodes) or of `oialr_jax.value_and_grad`
    (arrays in the place of cores); the latter need `params` in `update`.

    Args:     reference: keep a copy of what is trained, as `Schedule(when="stable")`
              needs it: while matrices are dense as much memory as they take.

    >>> from oialr_jax import Axes, factor
    >>> params = {"w": factor(jnp.ones((4, 3)), Axes((4, 3), (), (0,), (1,)), rank=1)}
    >>> state = freeze_bases(optax.trace(0.9)).init(params)
    >>> [leaf.shape for leaf in jax.tree.leaves(state.inner_state)]
    [(1, 1)]
    """
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> FreezeBasesState:
        leaves = len(jax.tree.leaves(params, is_leaf=is_low_rank))
        pending = jnp.zeros(leaves, jnp.int32)
        trained = trainable(params)
        kept = jax.tree.map(jnp.copy, trained) if reference else ()
        return FreezeBasesState(inner.init(trained), pending, kept)

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
            **extra_args,
        )
        frozen = map_low_rank(_still, updates if params is None else params)
        return with_trainable(frozen, cores), state._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def value_and_grad(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., Any]:
    """Like `jax.value_and_grad(loss)` over the first argument, without its bases.

    The gradient has an array in the place of each core and of each dense leaf, and
    nothing for the bases: what is averaged over devices is r x r, not (m + n) x r.

    Args:     axis_name: under `jax.pmap` or `jax.shard_map`, the mapped axis: loss, aux
              and gradients are averaged over it. Under `jax.jit` the compiler does it.
    """

    def run(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        def of_trainable(trained: PyTree) -> Any:
            return loss(with_trainable(params, trained), *args, **kwargs)

        grad = jax.value_and_grad(of_trainable, has_aux=has_aux)
        result = grad(trainable(params))
        return result if axis_name is None else jax.lax.pmean(result, axis_name)

    return run


def _still(node: LowRank) -> LowRank:
    u, vt = jnp.zeros_like(node.u), jnp.zeros_like(node.vt)
    return dataclasses.replace(node, u=u, vt=vt)
