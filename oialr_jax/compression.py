"""Compression at once: every matrix cut to the directions that the loss needs most."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from oialr_jax.lowrank import PyTree, is_low_rank, leaf_at, named_leaves
from oialr_jax.matrices import Matrix
from oialr_jax.ranking import is_known
from oialr_jax.schedule import RankRule
from oialr_jax.surgery import apply_ranks, apply_rule
from oialr_jax.weighted import Statistics

Price = Callable[[Matrix, int | None], float | int]
"""What a matrix costs at a rank, None for dense, of a stack all together:
`Matrix.weights`, `Matrix.flops` or `two_factors`."""


def two_factors(matrix: Matrix, rank: int | None) -> int:
    """Weights of two factors, r (m + n)."""
    if rank is None:
        return matrix.weights()
    return matrix.weights(rank) - math.prod(matrix.axes.l) * rank**2


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
    price: Price = Matrix.weights,
    multiple: int = 1,
) -> tuple[PyTree, tuple[Cut, ...]]:
    """Host side: the params with matrices cut where the loss rises least, and the cuts.

    The directions of all matrices compete for the budget, see `allocation.allocate`; a
    matrix that costs less dense stays dense. Matrices that are in low rank are cut
    further. Those without statistics, or which no row reached, stay as they are and
    are no part of the budget; they are no part of the cuts.

    Args:     budget: in the unit of `price`; or the rank of each matrix by path.
              price: of a matrix; by default the weights that it stores.
    Raises:   ValueError: a matrix or its statistics are not finite; the budget does
              not pay the least ranks; a rank outside [1, its greatest], or for
              a path that is no matrix.

    >>> import jax
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
    has_rows = is_known(statistics)
    known = [x for x in matrices if has_rows.get(x.path)]
    if isinstance(budget, Mapping):
        for name in budget:
            leaf_at(name, {x.path: x for x in matrices}, what="`budget` names")
        ranks = {x.path: budget[x.path] for x in known if x.path in budget}
        low, _, reports = apply_ranks(
            params, None, known, ranks, tx=None, statistics=statistics
        )
    else:
        rule = RankRule(
            by="loss", budget=budget, price=price, multiple=multiple, min_rank_share=0
        )
        low, _, reports = apply_rule(
            params, None, known, rule, known, tx=None, statistics=statistics
        )
    rises = {}
    for layer in (x for report in reports for x in report.layers):
        if not layer.finite:
            raise ValueError(f"{layer.path} or its statistics are not finite")
        rises[layer.path] = layer.rise or 0.0
    leaves = named_leaves(low)
    found = {x.path: leaf_at(x.path, leaves) for x in known}
    cuts = tuple(
        Cut(
            x.path,
            x.m,
            x.n,
            found[x.path].rank if is_low_rank(found[x.path]) else None,
            rises.get(x.path, 0.0),
        )
        for x in known
    )
    return low, cuts
