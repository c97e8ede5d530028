"""What the one idea saves: FLOPs of W = U S Vᵀ in every order of contraction.

One use of a matrix maps T rows of m entries to T rows of n. Plain integers, no JAX: the
shapes and the rank are known when a program is traced, and decide.
"""

import dataclasses
import enum
from typing import final


class Order(enum.StrEnum):
    """In what order a matrix meets its rows."""

    CHAIN = "chain"
    """((x U) S) Vᵀ."""
    MERGED = "merged"
    """S folded into the smaller base once per use, into Vᵀ when m = n, then a chain."""
    REBUILT = "rebuilt"
    """W = U S Vᵀ by way of the smaller base, then x W; only S has a gradient."""
    DENSE = "dense"
    """x W of an ordinary array that is trained itself."""


@final
@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of the forward and of the backward pass; 2 for a multiplication and sum."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """FLOPs of one training step."""
        return self.forward + self.backward


def flops(
    order: Order,
    rows: int,
    m: int,
    n: int,
    rank: int,
    *,
    stack: int = 1,
    input_gradient: bool = True,
    training: bool = True,
) -> Cost:
    """FLOPs of one use: y = x W, and from the gradient g of y those of x and of W or S.

    Matrix products alone, 2 a b c for (a, b) times (b, c). A convolution is a use with
    m = window * channels in and one row per output position. `rank` says nothing about
    `DENSE`.

    Args:     rows: T, of each stacked matrix. input_gradient: whether x has one; the
              first layer needs none. training: False for the forward pass alone.
    Raises:   ValueError: a negative number of rows; m, n or `stack` below 1; a rank
              outside [1, min(m, n)].
    Source:   Coquelin et al. 2024 (arXiv 2401.08505) for the method; the authors' code
              contracts in the order `REBUILT`.

    >>> low = flops(Order.CHAIN, 1024, 768, 768, rank=96)
    >>> dense = flops(Order.DENSE, 1024, 768, 768, rank=96)
    >>> round(low.total / dense.total, 3)
    0.182
    """
    _check(rows, m, n, rank, stack)
    q = min(m, n)
    rebuild = q * rank**2 + m * n * rank  # the smaller base times S, times the other
    match order:
        case Order.DENSE:
            forward = rows * m * n
            trained = rows * m * n  # xᵀ g
            inputs = rows * m * n  # g Wᵀ
        case Order.REBUILT:
            forward = rebuild + rows * m * n
            trained = rows * m * n + rebuild  # xᵀ g, and Uᵀ (xᵀ g) V the way back
            inputs = rows * m * n
        case Order.CHAIN:
            forward = rows * rank * (m + rank + n)
            trained = rows * rank * (n + rank)  # gV, and (xU)ᵀ (gV)
            inputs = rows * rank * (rank + m)  # gV is there: (gV) Sᵀ, times Uᵀ
        case Order.MERGED:
            forward = q * rank**2 + rows * rank * (m + n)
            if n <= m:  # y = (xU) B, B = S Vᵀ
                trained = rows * rank * n + q * rank**2  # (xU)ᵀ g, times V
                inputs = rows * rank * (n + m)  # g Bᵀ, times Uᵀ
            else:  # y = (xA) Vᵀ, A = U S
                trained = rows * rank * (n + m) + q * rank**2  # gV, xᵀ(gV), Uᵀ times it
                inputs = rows * rank * m  # gV is there: times Aᵀ
    backward = (trained + inputs * input_gradient) * training
    return Cost(forward=2 * stack * forward, backward=2 * stack * backward)


def cheapest(
    rows: int,
    m: int,
    n: int,
    rank: int,
    *,
    input_gradient: bool = True,
    training: bool = True,
) -> Order:
    """The order with the fewest FLOPs for a low-rank leaf, the first listed of equals.

    Chain at low rank (for many rows: below a third of the small side), then merged,
    then rebuilt. A stack multiplies all alike and has no say.

    >>> [cheapest(10**5, 768, 768, r).value for r in (200, 300, 500)]
    ['chain', 'merged', 'rebuilt']
    """

    def total(order: Order) -> int:
        cost = flops(
            order,
            rows,
            m,
            n,
            rank,
            input_gradient=input_gradient,
            training=training,
        )
        return cost.total

    return min((Order.CHAIN, Order.MERGED, Order.REBUILT), key=total)


def _check(rows: int, m: int, n: int, rank: int, stack: int) -> None:
    if rows < 0:
        raise ValueError(f"`rows` must be at least 0, got {rows}")
    for name, value in (("m", m), ("n", n), ("stack", stack)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"`rank` must be in [1, {min(m, n)}], got {rank}")
