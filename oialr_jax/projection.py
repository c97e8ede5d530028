"""Dense matrices cut to a low rank and left dense, as in a warm-up on schedule."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from oialr_jax.decompose import NOW, decomposed, on_host, part
from oialr_jax.lowrank import (
    Axes,
    PyTree,
    check_forms,
    is_low_rank,
    leaf_at,
    named_leaves,
    with_leaves,
)
from oialr_jax.matrices import Matrix
from oialr_jax.ranking import ranks_by, weights_of
from oialr_jax.schedule import RankRule
from oialr_jax.sharding import on_auto_axes
from oialr_jax.weighted import Statistics


@on_auto_axes
def project_to_rank(
    params: PyTree,
    rule: RankRule,
    matrices: Sequence[Matrix],
    statistics: Statistics | None = None,
) -> PyTree:
    """Host side: params with the nearest matrices of the ranks that `rule` chooses.

    They stay dense; LowRank matrices and those that are not finite are unchanged. All
    matrices of a stack get the same rank. The optimizer state needs no change. With
    statistics they are the nearest by loss.

    Raises:   ValueError: a matrix names no leaf of `params`, or one of another shape; a
              budget is too small.
    Source:   Jain, Meka and Dhillon 2010 (singular value projection).

    >>> axes = Axes(shape=(2, 2), stack=(), inputs=(0,), outputs=(1,))
    >>> params = {"w": jnp.array([[2.0, 0.0], [0.0, 0.1]])}
    >>> project_to_rank(params, RankRule(), [Matrix("w", axes, rows=1, kind="dot")])
    {'w': Array([[2., 0.],
           [0., 0.]], dtype=float32)}
    """
    check_forms(params, what="projections take")
    leaves = named_leaves(params)
    dense = {
        matrix.path: matrix.axes
        for matrix in matrices
        if not is_low_rank(leaf_at(matrix.path, leaves, matrix.axes.shape))
    }
    found = {x.path: x for x in matrices}
    axes = list(dense.values())
    items = [leaves[name] for name in dense]
    weights = weights_of(statistics, dense, NOW)
    solved = decomposed(
        items, axes, NOW, vectors=True, weights=[weights.get(x) for x in dense]
    )
    named = [found[name] for name in dense]
    ranks = ranks_by(rule, on_host(solved, NOW), named, items, weights)
    NOW.agree(ranks)
    new = {
        name: _recomposed(
            leaves[name],
            x.batch,
            NOW.put(x.start, x.batch[0]),
            NOW.put(r, x.batch[0]),
            stack=x.stack,
            axes=dense[name],
            where=_place(leaves[name]),
            is_weighted=name in weights,
        )
        for name, x, r in zip(dense, solved, ranks, strict=True)
        if r
    }
    return with_leaves(params, new)


def _place(leaf: Any) -> NamedSharding | None:
    """Where on a mesh a leaf lies, if it lies on one."""
    where = getattr(leaf, "sharding", None)
    return where if isinstance(where, NamedSharding) else None


@functools.partial(jax.jit, static_argnames=("stack", "axes", "where", "is_weighted"))
def _recomposed(
    leaf: Array,
    batch: tuple[Array, Array, Array],
    start: Any,
    rank: Any,
    *,
    stack: tuple[int, ...],
    axes: Axes,
    where: NamedSharding | None,
    is_weighted: bool,
) -> Array:
    """One dense leaf again, of its first `rank` singular vectors or directions."""
    left, sigma, right = part(batch, start, stack)
    scale = jnp.ones_like(sigma) if is_weighted else sigma  # which `left` has already
    kept = jnp.where(jnp.arange(sigma.shape[-1]) < rank, scale, 0)
    with jax.default_matmul_precision("highest"):
        matrix = (left * kept[..., None, :]) @ right
    new = axes.to_array(matrix).astype(leaf.dtype)
    return new if where is None else jax.lax.with_sharding_constraint(new, where)
