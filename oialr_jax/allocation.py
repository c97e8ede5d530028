"""Which ranks a budget buys: directions of all matrices in one list, by worth and cost.

Plain numpy, no JAX: worth is in units of loss (`weighted.Directions`), cost in whatever
the budget is counted in.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Prices(NamedTuple):
    """What one matrix, or stack, costs at each rank, and dense.

    `dense` is None for a matrix that cannot be dense: it is in low rank already.

    Shapes:   low_rank: (q,), the cost at rank 1, 2, ..., q, increasing.
    """

    low_rank: Float[np.ndarray, " q"]
    dense: float | int | None


def allocate(
    sigmas: Sequence[np.ndarray],
    prices: Sequence[Prices],
    budget: float | int,
    *,
    multiple: int = 1,
    least: Sequence[int] | None = None,
) -> list[int | None]:
    """Host side: the rank of each matrix that a budget buys, None where it stays dense.

    Directions of all matrices stand in one list: those stay that are worth most loss
    for what they cost, σ² over the cost of one more rank. Where the step to the dense
    matrix is worth more for its cost than the next direction, it is that step which
    stands in the list. All of a stack share one rank, and are worth their sum.

    Shapes:   sigmas: (q,) or (*l, q) each, of `Directions`.
    Args:     multiple: ranks are multiples of it, where q is not less.
              least: the rank of each matrix below which nothing is dropped, by default
              1, rounded up to a multiple.
    Raises:   ValueError: `multiple` below 1; sigmas that are not finite; the budget
              does not pay the least ranks.

    >>> steep, flat = np.array([9.0, 0.1, 0.1, 0.1]), np.array([3.0, 3.0, 3.0, 3.0])
    >>> square = Prices(8.0 * np.arange(1, 5), dense=16.0)
    >>> allocate([steep, flat], [square, square], budget=24)
    [1, None]
    """
    if multiple < 1:
        raise ValueError(f"`multiple` must be at least 1, got {multiple}")
    least = [1] * len(sigmas) if least is None else least
    offers = [
        _Offers.of(i, sigma, price, multiple, floor)
        for i, (sigma, price, floor) in enumerate(
            zip(sigmas, prices, least, strict=True)
        )
    ]
    left = budget - sum(x.cost[0] for x in offers)
    if left < 0:
        raise ValueError(
            f"`budget` is {budget:g}: the least ranks of the {len(offers)} matrices "
            f"cost {budget - left:g}"
        )
    place = [0] * len(offers)
    queue = [(-x.best(0, left)[0], i) for i, x in enumerate(offers)]
    heapq.heapify(queue)
    while queue:
        listed, i = heapq.heappop(queue)
        slope, target = offers[i].best(place[i], left)
        if target == place[i]:
            continue  # nothing that is left to buy fits
        if -slope == listed:  # else it does not fit any more: back into the list
            left -= offers[i].cost[target] - offers[i].cost[place[i]]
            place[i] = target
            slope, target = offers[i].best(target, left)
        heapq.heappush(queue, (-slope, i))
    return [x.rank[p] for x, p in zip(offers, place, strict=True)]


class _Offers(NamedTuple):
    """The ranks that one matrix can have, dearer and dearer, None for dense."""

    rank: list[int | None]
    cost: np.ndarray
    worth: np.ndarray

    @classmethod
    def of(
        cls, index: int, sigma: np.ndarray, prices: Prices, multiple: int, least: int
    ) -> "_Offers":
        sigma = np.asarray(sigma, np.float64)
        if not np.isfinite(sigma).all():
            raise ValueError(
                f"`sigmas` must be finite, those of matrix {index} are not"
            )
        squares = np.square(sigma).reshape(-1, sigma.shape[-1]).sum(axis=0)
        worth, q = np.cumsum(squares), len(squares)
        first = -(-least // multiple) * multiple
        ranks: list[int | None] = [*range(first, q, multiple), q]
        at = [x - 1 for x in ranks if x is not None]
        cost, worth = np.asarray(prices.low_rank, np.float64)[at], worth[at]
        if prices.dense is not None:
            pays = int(np.sum(cost < prices.dense))
            ranks = [*ranks[:pays], None]
            cost = np.append(cost[:pays], prices.dense)
            worth = np.append(worth[:pays], squares.sum())
        # of equal cost, as FLOPs may be, only the greatest rank is worth buying
        cheapest = np.append(np.minimum.accumulate(cost[::-1])[::-1][1:], np.inf)
        some = np.flatnonzero(cost < cheapest)
        return cls([ranks[i] for i in some], cost[some], worth[some])

    def best(self, place: int, left: float) -> tuple[float, int]:
        """The most worth for its cost of what can be bought, and its place."""
        cost = self.cost[place + 1 :] - self.cost[place]
        slopes = np.where(
            cost <= left, (self.worth[place + 1 :] - self.worth[place]) / cost, -np.inf
        )
        if not slopes.size or slopes.max() == -np.inf:
            return -np.inf, place
        chosen = int(np.argmax(slopes))
        return float(slopes[chosen]), place + 1 + chosen
