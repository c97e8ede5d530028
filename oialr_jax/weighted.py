"""What a direction of a matrix is worth in loss: weighted cuts, ranks for a budget.

With C = E[x xᵀ] of what comes in and D = E[δ δᵀ] of the gradients of what goes out, the
loss rises by about ½ tr(Eᵀ C E D) when W becomes W - E. In that norm the best matrix of
rank k has a closed form, and its error is in units of loss, the same for all matrices.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oialr_jax.linalg import compute_dtype, signed_qr, svd, token_of

RIDGE = 1e-3
"""What is added to the diagonal of C and D, in parts of their mean eigenvalue."""


class Directions(NamedTuple):
    """A matrix as a sum of directions, the one that is worth most first.

    W = left . right; a cut to rank k keeps the first k columns and rows, and the loss
    rises by ½ Σ σ² over the others. A matrix that no row of a loss reached is worth
    nothing: its sigma are zeros, its directions those of its SVD.

    Shapes:   left: (*l, m, q); sigma: (*l, q), descending; right: (*l, q, n).
    """

    left: Array
    sigma: Array
    right: Array


def directions(
    matrix: Float[Array, "*l m n"],
    inputs: Array | None,
    outputs: Array | None,
    *,
    ridge: float = RIDGE,
) -> Directions:
    """The directions of W, weighed by C on the side of inputs and D on that of outputs.

    With C = A A, D = B B (symmetric roots) and P Σ Qᵀ = svd(A W B), left is A⁻¹ P Σ
    and right Qᵀ B⁻¹: no W of rank k has a smaller tr(EᵀCED) than their first k. None
    stands for the identity; without both this is the SVD.

    Shapes:   inputs: (*l, m, m), or (*l, m) for a diagonal; outputs: the same with n.
    Source:   K-FAC's Fisher C ⊗ D (Martens and Grosse 2015); the closed form of both
              sides as in GFWSVD (arXiv 2505.17974), with roots from `eigh`, which a
              semidefinite C does not break.
    """
    matrix = matrix.astype(compute_dtype(matrix.dtype))
    stack = matrix.ndim - 2
    with jax.default_matmul_precision("highest"):
        a, a_inverse, known_a = _roots(inputs, stack, ridge)
        if a is not None and outputs is not None:
            outputs = outputs + token_of([a])
        b, b_inverse, known_b = _roots(outputs, stack, ridge)
        p, sigma, qt = svd(_times(a, matrix, b))
        left = _times(a_inverse, p * sigma[..., None, :], None)
        right = _times(None, qt, b_inverse)
    known = known_a & known_b
    return Directions(left, jnp.where(known[..., None], sigma, 0), right)


def cut(found: Directions, rank: int) -> tuple[Array, Array, Array]:
    """The factors u, s, vt of the first directions; u and vt are orthonormal.

    Shapes:   u: (*l, m, r); s: (*l, r, r), not diagonal; vt: (*l, r, n).
    """
    with jax.default_matmul_precision("highest"):
        u, left = signed_qr(found.left[..., :rank])
        token = token_of([u])
        v, right = signed_qr(found.right[..., :rank, :].mT + token)
        return u, left @ right.mT, v.mT


def rise(sigma: Float[Array, "*l q"], rank: int) -> Float[Array, "*l"]:
    """How much the loss rises, as predicted, when a matrix is cut to `rank`."""
    return 0.5 * jnp.sum(jnp.square(sigma[..., rank:]), axis=-1)


def _roots(
    covariance: Array | None, stack: int, ridge: float
) -> tuple[Array | None, Array | None, Array]:
    """Symmetric root, its inverse, and whether there is anything, for each matrix.

    A covariance of zeros counts as the identity.
    """
    if covariance is None:
        return None, None, jnp.asarray(True)
    covariance = covariance.astype(compute_dtype(covariance.dtype))
    full = covariance.ndim == stack + 2
    diagonal = jnp.diagonal(covariance, axis1=-2, axis2=-1) if full else covariance
    mean = jnp.mean(diagonal, axis=-1)
    known = mean > 0
    scale = jnp.where(known, mean, 1)[..., None]  # squares neither overflow nor vanish
    if full:
        values, vectors = jnp.linalg.eigh(covariance / scale[..., None])
    else:
        values, vectors = covariance / scale, None
    values = jnp.where(known[..., None], jnp.maximum(values, 0) + ridge, 1)

    def built(values: Array) -> Array:
        if vectors is None:
            return values
        return (vectors * values[..., None, :]) @ vectors.mT

    root = jnp.sqrt(values * scale)
    return built(root), built(1 / root), known


def _times(a: Array | None, matrix: Array, b: Array | None) -> Array:
    """A . matrix . B; a side may be a diagonal, or None for the identity."""
    if a is not None:
        matrix = a @ matrix if a.ndim == matrix.ndim else a[..., None] * matrix
    if b is not None:
        matrix = matrix @ b if b.ndim == matrix.ndim else matrix * b[..., None, :]
    return matrix


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
) -> list[int | None]:
    """Host side: the rank of each matrix that a budget buys, None where it stays dense.

    Directions of all matrices stand in one list: those stay that are worth most loss
    for what they cost, σ² over the cost of one more rank. Where the step to the dense
    matrix is worth more for its cost than the next direction, it is that step which
    stands in the list. All of a stack share one rank, and are worth their sum.

    Shapes:   sigmas: (q,) or (*l, q) each, of `Directions`.
    Args:     multiple: ranks are multiples of it, where q is not less.
    Raises:   ValueError: `multiple` below 1; sigmas that are not finite; the budget
              does not pay the least ranks.

    >>> steep, flat = np.array([9.0, 0.1, 0.1, 0.1]), np.array([3.0, 3.0, 3.0, 3.0])
    >>> square = Prices(8.0 * np.arange(1, 5), dense=16.0)
    >>> allocate([steep, flat], [square, square], budget=24)
    [1, None]
    """
    if multiple < 1:
        raise ValueError(f"`multiple` must be at least 1, got {multiple}")
    offers = [
        _Offers.of(i, sigma, price, multiple)
        for i, (sigma, price) in enumerate(zip(sigmas, prices, strict=True))
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
        cls, index: int, sigma: np.ndarray, prices: Prices, multiple: int
    ) -> "_Offers":
        sigma = np.asarray(sigma, np.float64)
        if not np.isfinite(sigma).all():
            raise ValueError(
                f"`sigmas` must be finite, those of matrix {index} are not"
            )
        squares = np.square(sigma).reshape(-1, sigma.shape[-1]).sum(axis=0)
        worth, q = np.cumsum(squares), len(squares)
        ranks: list[int | None] = [*range(multiple, q, multiple), q]
        at = [x - 1 for x in ranks if x is not None]
        cost, worth = np.asarray(prices.low_rank, np.float64)[at], worth[at]
        if prices.dense is not None:
            pays = int(np.sum(cost < prices.dense))
            ranks = [*ranks[:pays], None]
            cost = np.append(cost[:pays], prices.dense)
            worth = np.append(worth[:pays], squares.sum())
        return cls(ranks, cost, worth)

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
