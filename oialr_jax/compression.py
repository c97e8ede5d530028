"""Compression at once: every matrix cut to the directions that the loss needs most."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from oialr_jax import weighted
from oialr_jax.curvature import Statistics
from oialr_jax.linalg import alone
from oialr_jax.lowrank import (
    Axes,
    Basis,
    LowRank,
    PyTree,
    is_low_rank,
    named_leaves,
    path_name,
)
from oialr_jax.matrices import Matrix

Price = Callable[[Matrix, int | None], float | int]
"""What a matrix costs at a rank, None for dense, of a stack all together: `stored`,
`two_factors` or `Matrix.flops`."""


def stored(matrix: Matrix, rank: int | None) -> int:
    """Weights of both bases and the core, r (m + n + r)."""
    m, n, stack = matrix.m, matrix.n, math.prod(matrix.axes.l)
    return stack * (m * n if rank is None else rank * (m + n + rank))


def two_factors(matrix: Matrix, rank: int | None) -> int:
    """Weights of two factors, r (m + n)."""
    m, n, stack = matrix.m, matrix.n, math.prod(matrix.axes.l)
    return stack * (m * n if rank is None else rank * (m + n))


class Cut(NamedTuple):
    """What `compress` did to one matrix: its rank, None for dense, the rise of loss.

    `rise` is as predicted, of the whole stack.
    """

    path: str
    m: int
    n: int
    rank: int | None
    rise: float


def compress(
    params: PyTree,
    matrices: Sequence[Matrix],
    statistics: Statistics,
    budget: float | int | Mapping[str, int],
    *,
    price: Price = stored,
    multiple: int = 1,
    ridge: float = weighted.RIDGE,
) -> tuple[PyTree, tuple[Cut, ...]]:
    """Host side: the params with matrices cut where the loss rises least, and the cuts.

    The directions of all matrices compete for the budget, see `weighted.allocate`; a
    matrix that costs less dense stays dense. Matrices that are in low rank are cut
    further. Those without statistics, or which no row reached, stay as they are and
    are no part of the budget; they are no part of the cuts.

    Args:     budget: in the unit of `price`; or the rank of each matrix by path.
              price: of a matrix; by default the weights that it stores.
    Raises:   ValueError: a matrix or its statistics are not finite; the budget does
              not pay the least ranks; a rank outside [1, its greatest].

    >>> import jax.numpy as jnp
    >>> from oialr_jax.curvature import curvature, of_outputs
    >>> from oialr_jax.matrices import find_matrices
    >>> fn = lambda p, x: x @ p["w"]
    >>> params, x = {"w": jnp.diag(jnp.arange(4.0))}, jnp.eye(4)
    >>> found = find_matrices(fn, params, x)
    >>> sums = curvature(of_outputs(fn), found)(params, x, key=jax.random.key(0))
    >>> compress(params, found, sums, {"w": 2})[0]["w"].rank
    2
    """
    leaves = named_leaves(params)
    known = [x for x in matrices if _has_rows(statistics, x.path)]
    found = {x.path: _directions(leaves[x.path], x, statistics, ridge) for x in known}
    sigmas = {path: np.asarray(jax.device_get(x.sigma)) for path, x in found.items()}
    for path, sigma in sigmas.items():
        if not np.isfinite(sigma).all():
            raise ValueError(f"{path} or its statistics are not finite")
    ranks: dict[str, int | None]
    if isinstance(budget, Mapping):
        ranks = {x.path: budget.get(x.path) for x in known}
    else:
        prices = [_prices(x, leaves[x.path], price) for x in known]
        chosen = weighted.allocate(
            list(sigmas.values()), prices, budget, multiple=multiple
        )
        ranks = dict(zip(sigmas, chosen, strict=True))
    nodes, cuts = {}, []
    for x in known:
        rank, greatest = ranks[x.path], sigmas[x.path].shape[-1]
        if rank is not None:
            if not 1 <= rank <= greatest:
                raise ValueError(
                    f"`rank` must be in [1, {greatest}] for {x.path}, got {rank}"
                )
            nodes[x.path] = _node(
                leaves[x.path], x.axes, found[x.path], sigmas[x.path], rank
            )
        gone = sigmas[x.path][..., rank:] if rank is not None else np.zeros(1)
        rise = 0.5 * float(np.sum(np.square(gone, dtype=np.float64)))
        cuts.append(Cut(x.path, x.m, x.n, rank, rise))
    return (
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: nodes.get(path_name(path), leaf),
            params,
            is_leaf=is_low_rank,
        ),
        tuple(cuts),
    )


def _has_rows(statistics: Statistics, path: str) -> bool:
    sides = statistics.sides.get(path)
    return sides is not None and bool(np.any(jax.device_get(sides.rows) > 0))


def _directions(
    leaf: Any, matrix: Matrix, statistics: Statistics, ridge: float
) -> weighted.Directions:
    dense = leaf.s if is_low_rank(leaf) else matrix.axes.to_matrix(leaf)
    found = _weighted(dense, *statistics.covariances(matrix.path), ridge=ridge)
    return alone(found)


_weighted = jax.jit(weighted.directions, static_argnames="ridge")
_cut = jax.jit(weighted.cut, static_argnames="rank")


def _prices(matrix: Matrix, leaf: Any, price: Price) -> weighted.Prices:
    greatest = leaf.rank if is_low_rank(leaf) else min(matrix.m, matrix.n)
    costs = np.array([price(matrix, r) for r in range(1, greatest + 1)], np.float64)
    return weighted.Prices(costs, None if is_low_rank(leaf) else price(matrix, None))


def _node(
    leaf: Any, axes: Axes, found: weighted.Directions, sigma: np.ndarray, rank: int
) -> LowRank:
    """The matrix of a leaf cut to its first directions."""
    u, s, vt = alone(_cut(found, rank=rank))
    basis = Basis(0)
    dtypes = (leaf.dtype,) * 3
    if is_low_rank(leaf):
        with jax.default_matmul_precision("highest"):
            u, vt = leaf.u @ u, vt @ leaf.vt
        axes, basis = leaf.axes, leaf.basis
        dtypes = (leaf.u.dtype, leaf.dtype, leaf.vt.dtype)
    u, s, vt = (x.astype(dtype) for x, dtype in zip((u, s, vt), dtypes, strict=True))
    return LowRank(u, s, vt, axes, Basis(basis).after(sigma, rank))
