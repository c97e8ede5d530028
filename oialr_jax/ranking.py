"""Which rank each matrix of an event gets, and what its directions are weighed by.

A rule looks at singular values; with statistics at those of `weighted.directions`.
"""

import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oialr_jax.allocation import Prices
from oialr_jax.decompose import AHEAD, NOW, Run, Weights, decomposed, on_host
from oialr_jax.linalg import RESOLVED
from oialr_jax.lowrank import Axes, PyTree, is_low_rank, leaf_at, named_leaves
from oialr_jax.matrices import Matrix
from oialr_jax.schedule import RankRule
from oialr_jax.sharding import on_auto_axes
from oialr_jax.weighted import Statistics


@on_auto_axes
def choose(
    params: PyTree,
    rule: RankRule,
    matrices: Sequence[Matrix],
    statistics: Statistics | None = None,
    run: Run = NOW,
) -> dict[str, int]:
    """Host side: the rank that `rule` gives each matrix, dense or low-rank, by path.

    Only singular values are computed, a batch for each shape, and brought to the host
    in one transfer; those of long dense matrices by their Gram matrix, if the rule does
    not ask for values that those do not resolve. A matrix that is not finite has no
    rank.

    Raises:   ValueError: a matrix names no leaf of `params`; a budget is too small.
    """
    leaves = named_leaves(params)
    items = [leaf_at(matrix.path, leaves) for matrix in matrices]
    axes = [x.axes for x in matrices]
    exact = rule.budget is not None or rule.cutoff < RESOLVED  # small values count
    kept = None if exact else [1] * len(axes)
    weights = weights_of(statistics, [x.path for x in matrices], run)
    found = decomposed(
        items,
        axes,
        run,
        vectors=False,
        kept=kept,
        weights=[weights.get(x.path) for x in matrices],
    )
    if run is AHEAD:
        return {}
    ranks = ranks_by(rule, on_host(found, run), matrices, items, weights)
    return {x.path: r for x, r in zip(matrices, ranks, strict=True) if r}


@jax.jit
def is_known(statistics: Statistics) -> dict[str, Array]:
    """Which matrices some row with a gradient has reached."""
    return {x: jnp.any(sides.rows > 0) for x, sides in statistics.sides.items()}


@jax.jit
def _covariances(statistics: Statistics) -> dict[str, Weights]:
    """C and D of every matrix; a diagonal has a last axis of one."""
    found = {}
    for name, sides in statistics.sides.items():
        stack, both = sides.rows.ndim, statistics.covariances(name)
        c, d = (
            x[..., None] if x is not None and x.ndim == stack + 1 else x for x in both
        )
        found[name] = (c, d)
    return found


def weights_of(
    statistics: Statistics | None, names: Iterable[str], run: Run
) -> dict[str, Weights]:
    """The weights of those of the names that have statistics."""
    if statistics is None:
        return {}
    known = run.get(run.call(is_known, statistics))
    found = run.call(_covariances, statistics)
    return {x: found[x] for x in names if x in found and known[x]}


def unused(name: str, axes: Axes) -> Matrix:
    """A matrix of which nothing but its shape is known."""
    return Matrix(name, axes, rows=0, kind="dot")


def ranks_by(
    rule: RankRule,
    spectra: Sequence[np.ndarray],
    matrices: Sequence[Matrix],
    leaves: Sequence[Any],
    weights: Container[str],
) -> list[int | None]:
    """The ranks that a rule chooses; by loss, those with weights compete.

    The others get their share of the budget, by what they cost dense.

    Raises:   ValueError: a rule by loss without statistics, or with a price where a
              matrix has no uses; a budget is too small.
    """
    axes = [x.axes for x in matrices]
    if rule.by == "value":
        return _of_finite(rule, spectra, axes)
    price = rule.price or Matrix.weights
    known = [i for i, x in enumerate(matrices) if x.path in weights]
    if not known:
        raise ValueError(
            "a rule with by='loss' weighs directions by statistics, and no matrix has "
            "any: give statistics=curvature(loss, matrices)(params, *batch), or to "
            "`adaptive` and `training` weighing=Weighing(loss)"
        )
    for matrix in matrices:
        if not price(matrix, None) > 0:
            raise ValueError(
                f"{matrix.path} costs nothing by the rule's `price`: cut matrices that "
                "find_matrices has found, whose uses are counted"
            )
    total = rule.budget or 0
    budget, whole = total, sum(price(x, None) for x in matrices)
    ranks: list[int | None] = [None] * len(matrices)
    prices: list[Prices] = []
    for i, (matrix, leaf) in enumerate(zip(matrices, leaves, strict=True)):
        most = leaf.rank if is_low_rank(leaf) else min(matrix.m, matrix.n)
        costs = np.array([price(matrix, r) for r in range(1, most + 1)], np.float64)
        dense = price(matrix, None)
        prices.append(Prices(costs, None if is_low_rank(leaf) else dense))
        if i not in known:
            share = total * dense / whole
            least = min(most, rule.min_rank(min(matrix.m, matrix.n)))
            rank = max(least, int(np.searchsorted(costs, share, side="right")))
            ranks[i], budget = rank, budget - costs[rank - 1]
    chosen = _of_finite(
        dataclasses.replace(rule, budget=max(budget, 0 if rule.price else 1)),
        [spectra[i] for i in known],
        [axes[i] for i in known],
        [prices[i] for i in known],
    )
    for i, rank in zip(known, chosen, strict=True):
        ranks[i] = rank
    return ranks


def _of_finite(
    rule: RankRule,
    spectra: Sequence[np.ndarray],
    axes: Sequence[Axes],
    prices: Sequence[Prices] | None = None,
) -> list[int | None]:
    """The rank that a rule gives each matrix, None where it stays as it is.

    It does where it is not finite, and where the rule leaves it dense.

    Args:     prices: of each matrix, for a rule that goes by loss.
    """
    good = [i for i, sigma in enumerate(spectra) if np.isfinite(sigma).all()]
    chosen = rule.choose_all(
        [spectra[i].reshape(-1, spectra[i].shape[-1]) for i in good],
        [(axes[i].m, axes[i].n) for i in good],
        None if prices is None else [prices[i] for i in good],
    )
    ranks: list[int | None] = [None] * len(spectra)
    for i, r in zip(good, chosen, strict=True):
        ranks[i] = r
    return ranks
