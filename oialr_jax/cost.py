"""The work of W = U S Vᵀ in every order of contraction.

One use of a matrix maps T rows of m entries to T rows of n. Plain numbers, no JAX: the
shapes and the rank are known when a program is traced, and decide.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import NamedTuple, final


class Order(enum.StrEnum):
    """The order in which rows are multiplied by a matrix or its factors."""

    CHAIN = "chain"
    """((x U) S) Vᵀ."""
    MERGED = "merged"
    """S folded into the smaller base once per use, into Vᵀ when m = n, then a chain."""
    REBUILT = "rebuilt"
    """W = U S Vᵀ by way of the smaller base, then x W; only S has a gradient."""
    DENSE = "dense"
    """x W of an ordinary array that is trained itself."""


LOW_RANK = (Order.CHAIN, Order.MERGED, Order.REBUILT)


@final
@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs or bytes of the forward and of the backward pass."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Of one training step."""
        return self.forward + self.backward


@final
@dataclasses.dataclass(frozen=True)
class Rates:
    """The rates of a device, measured by `python -m train.bench --suite layers`.

    A product takes the longer of its FLOPs at the rate of its kind and its bytes at
    `bandwidth`, plus `overhead`. Gradients of a weight (`_kernel`), which sum over the
    rows, are slower than other products on most devices, and so is each product of a
    convolution (it, and its gradients to input and kernel) in its own measure.

    Args:     dot, dot_kernel, conv, conv_input, conv_kernel: FLOP/s.
              bandwidth: bytes/s. overhead: s. conv_merging: whether `MERGED` may be
              chosen for convolutions; it multiplies the gradient of the output twice,
              and a backend that fuses what made that gradient into a change of layout
              then computes it twice.
    Raises:   ValueError: a rate that is not positive, a negative overhead.
    """

    dot: float
    dot_kernel: float
    conv: float
    conv_input: float
    conv_kernel: float
    bandwidth: float
    overhead: float = 0.0
    conv_merging: bool = True

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        for name, value in dataclasses.asdict(self).items():
            if name == "conv_merging":
                continue
            if name == "overhead":
                if not 0 <= value < math.inf:
                    raise ValueError(f"`overhead` must be at least 0, got {value}")
            elif not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}")


class Product(NamedTuple):
    """One matrix product (a, b) times (b, c) of a use.

    `kind` is a rate of `Rates`; `shared` says which of the three arrays (ab, bc, ac)
    has the entries of a convolution's input, each read by `window` of its rows.
    """

    a: int
    b: int
    c: int
    backward: bool
    kind: str = "dot"
    shared: str = ""
    window: int = 1

    @property
    def flops(self) -> int:
        """2 for a multiplication and sum."""
        return 2 * self.a * self.b * self.c

    @property
    def entries(self) -> int:
        """Entries of the three arrays, each moved once."""
        sizes = {"ab": self.a * self.b, "bc": self.b * self.c, "ac": self.a * self.c}
        if self.shared:
            sizes[self.shared] = -(-sizes[self.shared] // self.window)
        return sum(sizes.values())


@final
@dataclasses.dataclass(frozen=True)
class Workload:
    """One use of a matrix: y = x W, and the gradients of x and of W or S.

    A convolution is a use with m = window * channels in and one row per output
    position; the factor that meets x carries the window.

    Args:     rows: T, of each stacked matrix. window: taps of a convolution, 0 for a
              dot product. stack: matrices of the same shape, each with its own rows.
              input_gradient: whether x has one; the first layer needs none.
              training: False for the forward pass alone.
    Raises:   ValueError: a negative number of rows; m, n or `stack` below 1,
              a window that does not divide m; a rank below 1 (a use may see a cut of
              the matrix, whose sides are shorter than its rank).
    """

    rows: int
    m: int
    n: int
    rank: int
    window: int = 0
    stack: int = 1
    input_gradient: bool = True
    training: bool = True

    def __post_init__(self) -> None:
        """Refuse sizes out of range."""
        if self.rows < 0:
            raise ValueError(f"`rows` must be at least 0, got {self.rows}")
        for name, least in (("m", 1), ("n", 1), ("window", 0), ("stack", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        if self.window and self.m % self.window:
            raise ValueError(
                f"`window` must divide m={self.m}, the taps times the channels; "
                f"got {self.window}"
            )
        if self.rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {self.rank}")


def products(order: Order, load: Workload) -> tuple[Product, ...]:
    """The matrix products of one use, forward and then backward.

    The rank says nothing about `DENSE`.

    Source:   Coquelin et al. 2024 (arXiv 2401.08505) for the method; the authors' code
              contracts in the order `REBUILT`.
    """
    t, m, n, r, window = load.rows, load.m, load.n, load.rank, load.window

    def meet(columns: int) -> Product:  # x times (m, columns)
        if not window:
            return Product(t, m, columns, False)
        return Product(t, m, columns, False, "conv", "ab", window)

    def to_input(columns: int) -> Product:  # (T, columns) times (columns, m)
        if not window:
            return Product(t, columns, m, True)
        return Product(t, columns, m, True, "conv_input", "ac", window)

    def to_kernel(columns: int) -> Product:  # xᵀ times (T, columns)
        if not window:
            return over_rows(m, columns)
        return Product(m, t, columns, True, "conv_kernel", "ab", window)

    def over_rows(a: int, c: int) -> Product:
        return Product(a, t, c, True, "dot_kernel")

    rebuild = [(m, r, r) if m < n else (r, r, n), (m, r, n)]
    match order:
        case Order.DENSE:
            forward = [meet(n)]
            trained = [to_kernel(n)]
            inputs = [to_input(n)]
        case Order.REBUILT:
            forward = [*(Product(*x, False) for x in rebuild), meet(n)]
            # Uᵀ (xᵀ g) V the way back
            trained = [to_kernel(n), *(Product(*x, True) for x in rebuild)]
            inputs = [to_input(n)]
        case Order.CHAIN:
            forward = [meet(r), Product(t, r, r, False), Product(t, r, n, False)]
            trained = [Product(t, n, r, True), over_rows(r, r)]  # gV, (xU)ᵀ (gV)
            inputs = [Product(t, r, r, True), to_input(r)]  # ((gV) Sᵀ) Uᵀ
        case Order.MERGED if n <= m:  # y = (xU) B, B = S Vᵀ
            forward = [Product(r, r, n, False), meet(r), Product(t, r, n, False)]
            trained = [over_rows(r, n), Product(r, n, r, True)]  # (xU)ᵀ g, V
            inputs = [Product(t, n, r, True), to_input(r)]  # (g Bᵀ) Uᵀ
        case Order.MERGED:  # y = (xA) Vᵀ, A = U S
            forward = [Product(m, r, r, False), meet(r), Product(t, r, n, False)]
            # gV, xᵀ (gV), Uᵀ times it
            trained = [Product(t, n, r, True), to_kernel(r), Product(r, m, r, True)]
            inputs = [to_input(r)]  # (gV) Aᵀ
    backward = trained + inputs * load.input_gradient
    return (*forward, *(backward * load.training))


def flops(order: Order, load: Workload) -> Cost:
    """FLOPs of the products of a workload.

    >>> load = Workload(1024, 768, 768, rank=96)
    >>> low, dense = (flops(x, load) for x in (Order.CHAIN, Order.DENSE))
    >>> round(low.total / dense.total, 3)
    0.182
    """
    done = products(order, load)
    return Cost(
        forward=load.stack * sum(x.flops for x in done if not x.backward),
        backward=load.stack * sum(x.flops for x in done if x.backward),
    )


def traffic(order: Order, load: Workload, itemsize: int = 4) -> Cost:
    """Bytes that the products of a workload read and write, each array once.

    An entry of a convolution's input counts once, not once per tap (exact for stride
    1). What a compiler fuses or keeps in a cache is not known here.

    >>> traffic(Order.DENSE, Workload(1024, 768, 768, 96)).forward  # x, W and y
    8650752
    """
    if itemsize < 1:
        raise ValueError(f"`itemsize` must be at least 1, got {itemsize}")
    done, size = products(order, load), load.stack * itemsize
    return Cost(
        forward=size * sum(x.entries for x in done if not x.backward),
        backward=size * sum(x.entries for x in done if x.backward),
    )


def seconds(order: Order, load: Workload, rates: Rates, itemsize: int = 4) -> float:
    """Estimated time of a workload on a device of these rates, a stack as one call.

    Source:   the roofline model, Williams et al. 2009.
    """
    return sum(
        max(
            load.stack * x.flops / getattr(rates, x.kind),
            load.stack * itemsize * x.entries / rates.bandwidth,
        )
        + rates.overhead
        for x in products(order, load)
    )


def cheapest(load: Workload, rates: Rates | None = None, itemsize: int = 4) -> Order:
    """The order of least work for a low-rank leaf, the first listed of equals.

    Without `rates` work is FLOPs: chain at low rank (for many rows: below a third of
    the small side), then merged, then rebuilt. With them it is time, which moves these
    borders where a product is bound by bandwidth or a gradient is slow; times that
    differ by less than `MARGIN` are equal.

    >>> [cheapest(Workload(10**5, 768, 768, r)).value for r in (200, 300, 500)]
    ['chain', 'merged', 'rebuilt']
    """
    if rates is None:
        return min(LOW_RANK, key=lambda order: flops(order, load).total)
    times = {
        order: seconds(order, load, rates, itemsize)
        for order in LOW_RANK
        if order != Order.MERGED or not load.window or rates.conv_merging
    }
    least = min(times.values())
    return next(order for order, time in times.items() if time * (1 - MARGIN) <= least)


MARGIN = 0.025
"""Part of its time by which one order must be estimated faster to replace another."""

RATES: Mapping[str, Rates] = {
    # two cores with AVX-512, jax 0.10.2, float32; their ratios are what decides
    "cpu": Rates(
        dot=500e9,
        dot_kernel=320e9,
        conv=370e9,
        conv_input=340e9,
        conv_kernel=215e9,
        bandwidth=45e9,
        overhead=1e-6,
        conv_merging=False,
    ),
}
"""Measured rates by JAX backend; a backend that is not listed is judged by FLOPs."""
