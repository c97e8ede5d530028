"""The bases of one leaf as an event leaves them: turned, repaired, or widened."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oialr_jax import weighted
from oialr_jax.decompose import Run, part
from oialr_jax.linalg import (
    compute_dtype,
    diagonal,
    orthogonality_error,
    signed_qr,
    svd,
    token_of,
)
from oialr_jax.lowrank import (
    Axes,
    LowRank,
    PyTree,
    is_low_rank,
    leaf_at,
    named_leaves,
)
from oialr_jax.matrices import Matrix
from oialr_jax.moments import Move
from oialr_jax.weighted import Directions


@functools.partial(
    jax.jit, static_argnames=("stack", "rank", "axes", "where", "is_weighted")
)
def rebased(
    leaf: Any,
    batch: tuple[Array, Array, Array],
    start: Any,
    *,
    stack: tuple[int, ...],
    rank: int,
    axes: Axes,
    where: tuple[Any, ...] | None,
    is_weighted: bool,
) -> tuple[LowRank, Move]:
    """One leaf on the first `rank` singular vectors, and the move of its moments.

    Of a dense leaf W = U Σ Vᵀ gradients become UᵀGV; of a core S = Us Σ Vsᵀ the bases
    become U Us and Vsᵀ Vᵀ and moments turn by Us and Vs. Weighted directions are no
    orthonormal columns: their sum is decomposed anew, by a QR of either side.
    """
    left, sigma, right = part(batch, start, stack)
    if is_weighted:
        left, core, right = weighted.cut(Directions(left, sigma, right), rank)
    else:
        left, core, right = (
            left[..., :rank],
            diagonal(sigma[..., :rank]),
            right[..., :rank, :],
        )
    u, vt, old = left, right, (leaf, leaf, leaf)
    if is_low_rank(leaf):
        with jax.default_matmul_precision("highest"):
            u = leaf.u.astype(core.dtype) @ left
            vt = right @ leaf.vt.astype(core.dtype)
        old = (leaf.u, leaf.s, leaf.vt)
    u, core, vt = (x.astype(o.dtype) for x, o in zip((u, core, vt), old, strict=True))
    if where is not None:
        u, core, vt = jax.lax.with_sharding_constraint((u, core, vt), where)
    before = None if is_low_rank(leaf) else axes
    return LowRank(u, core, vt, axes), Move(
        jnp.swapaxes(left, -1, -2), right, before=before
    )


ORTHOGONALITY_BOUND = 1e-3
"""Entry of |UᵀU - I| past which float32 bases are repaired; bfloat16 rounding alone
gives 4e-3, so narrower bases are repaired past ten times their machine epsilon."""


def bound(node: LowRank) -> float:
    """The drift past which the bases of a node are repaired."""
    return max(ORTHOGONALITY_BOUND, 10 * float(jnp.finfo(node.u.dtype).eps))


def drift_of(nodes: Sequence[LowRank], run: Run) -> list[Any]:
    """How far the bases of each node are from orthonormal, on the host."""
    return run.get(run.call(_errors, [(x.u, x.vt) for x in nodes])) if nodes else []


@jax.jit
def _errors(bases: list[tuple[Array, Array]]) -> list[Array]:
    """How far each pair of bases is from orthonormal: not finite where they are not."""
    return [orthogonality_error(u, vt) for u, vt in bases]


@jax.jit
def repaired(node: LowRank) -> LowRank:
    """Orthonormal bases, the triangular parts in the core: U S Vᵀ does not change."""
    wide = compute_dtype(node.dtype)
    u, s, vt = (f.astype(wide) for f in (node.u, node.s, node.vt))
    qu, ru = signed_qr(u)
    after = token_of([qu, ru]).astype(wide)  # no two LAPACK calls at once
    qv, rv = signed_qr(jnp.swapaxes(vt, -1, -2) + after)
    with jax.default_matmul_precision("highest"):
        core = ru @ s @ jnp.swapaxes(rv, -1, -2)
    new = (qu, core, jnp.swapaxes(qv, -1, -2))
    old = (node.u, node.s, node.vt)
    u, s, vt = (f.astype(o.dtype) for f, o in zip(new, old, strict=True))
    return dataclasses.replace(node, u=u, s=s, vt=vt)


# A rank that goes up


def of_matrices(
    tree: PyTree, axes: Mapping[str, Axes], names: Iterable[str]
) -> dict[str, Any]:
    """The leaves of a tree like the dense params that show some matrices directions.

    Raises:   ValueError: there is none for a matrix, or one of another shape.
    """
    leaves = named_leaves(tree)
    return {x: leaf_at(x, leaves, axes[x].shape) for x in names}


def shown(
    directions: Callable[..., PyTree], matrices: Sequence[Matrix]
) -> Callable[..., dict[str, Any]]:
    """A function of the same arguments that gives the leaves of all matrices."""
    axes = {x.path: x.axes for x in matrices}

    def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return of_matrices(directions(*args, **kwargs), axes, axes)

    return run


@jax.jit
def are_finite(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Of which arrays all entries are finite."""
    return {name: jnp.all(jnp.isfinite(x)) for name, x in arrays.items()}


@functools.partial(jax.jit, static_argnames=("rank", "where"))
def widened(
    node: LowRank,
    move: Move,
    source: Array,
    *,
    rank: int,
    where: tuple[Any, ...] | None,
) -> tuple[LowRank, Move]:
    """The node at a higher rank, W as it is, and the move of its moments.

    New directions are the first singular vectors of what the dense array `source` has
    outside of both bases, (I - U Uᵀ) X (I - V Vᵀ), with zeros in the core. Moments get
    zeros: the first ones exactly, as no gradient was seen there; of the second ones
    Adam's next step in a new direction is up to (1 - b1) / sqrt(1 - b2) learning rates
    long.
    """
    wide = compute_dtype(source.dtype)
    matrix = node.axes.to_matrix(source).astype(wide)
    u, vt = node.u.astype(wide), node.vt.astype(wide)
    k = node.rank
    more = rank - k
    with jax.default_matmul_precision("highest"):
        rest = matrix - u @ (u.mT @ matrix)
        rest = rest - (rest @ vt.mT) @ vt
        left, _, right = svd(rest)
        # once more, as of values near zero the vectors may lie in the bases
        both = jnp.concatenate([u, left[..., :more]], axis=-1)
        left = jnp.linalg.qr(both)[0][..., k:]
        both = jnp.concatenate([vt.mT, right[..., :more, :].mT], axis=-1)
        right = jnp.linalg.qr(both + token_of([left]))[0][..., k:].mT
    new = (
        jnp.concatenate([node.u, left.astype(node.u.dtype)], axis=-1),
        _padded(_padded(node.s, more, -2), more, -1),
        jnp.concatenate([node.vt, right.astype(node.vt.dtype)], axis=-2),
    )
    if where is not None:
        new = jax.lax.with_sharding_constraint(new, where)
    u, s, vt = new
    node = dataclasses.replace(node, u=u, s=s, vt=vt)
    left, right = (_padded(x, more, -2) for x in (move.left, move.right))
    return node, dataclasses.replace(move, left=left, right=right)


def _padded(array: Array, more: int, axis: int) -> Array:
    """The array with zeros behind it along an axis."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, more)
    return jnp.pad(array, widths)
