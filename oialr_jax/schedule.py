"""Which ranks stay, and which step treats which layers.

Plain integers and numpy, no JAX: every answer is a function of its arguments alone, so
a resumed run does what the uninterrupted one does.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
from jaxtyping import Float

from oialr_jax.allocation import Prices, allocate
from oialr_jax.renames import renamed, replaced


@final
@renamed(floor="min_rank_share")
@dataclasses.dataclass(frozen=True)
class RankRule:
    """How many singular values of a core stay.

    Values below `cutoff` times the largest go. One update drops at most the part
    `max_drop` of the rank (rounded up), and no rank falls below `min_rank_share` times
    the small side of the dense matrix. `multiple` rounds the choice up. A core of zeros
    has no value below its largest and keeps its rank.

    With `raise_by` the rank of a core of which no value is below `cutoff` goes up by so
    many, up to the small side: it is full. Where new directions come from is said to
    `adaptive`; a core is cut again where they come to nothing.

    With a `budget` the bases and cores of all matrices have at most so many weights,
    and their ranks are chosen together (`choose_all`): singular values are compared by
    σ/σ₀ within their own matrix, and the largest of all stay, up to the budget. This is
    the lowest common cutoff that the budget allows. No matrix keeps more weights than
    its dense form. `cutoff` and `max_drop` have no meaning then; every matrix keeps its
    `min_rank`, and above it `multiple` directions come or go at once.

    With by="loss" the matrices share the budget by what their directions are worth in
    loss (`allocation.allocate`), which takes statistics of `curvature`; a matrix that
    is worth more for its cost when dense stays dense. `price` says what a matrix costs
    at a rank, None for dense: `Matrix.weights` by default, `Matrix.flops`, or what
    gives seconds, functools.partial(Matrix.seconds, rates=...).

    Raises:   ValueError: `cutoff` or `min_rank_share` outside [0, 1], `max_drop`
              outside (0, 1], `multiple` or `budget` below 1, another `by`, by="loss"
              without a budget, a `price` without by="loss", `raise_by` below 0, or with
              a budget.
    Source:   Coquelin et al. 2024 (arXiv 2401.08505), the rule of the authors' code at
              the defaults. Their floor may exceed the present rank, which asks for
              directions that are gone: here no choice is below 1, and none is above
              the rank but by `raise_by`.

    >>> rule = RankRule(cutoff=0.1)
    >>> rule.choose(np.array([4.0, 2.0, 1.0, 0.3, 0.1]), small_side=5)
    3
    >>> rule.choose(np.array([4.0, 0.0, 0.0, 0.0]), small_side=4)  # 1, but half at most
    2
    """

    cutoff: float = 0.1
    min_rank_share: float = 0.01
    max_drop: float = 0.5
    multiple: int = 1
    budget: float | int | None = None
    by: str = "value"
    price: Callable[..., float | int] | None = None
    raise_by: int = 0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.by not in ("value", "loss"):
            raise ValueError(f"`by` must be 'value' or 'loss', got {self.by!r}")
        if self.by == "loss" and self.budget is None:
            raise ValueError("by='loss' divides a budget: give RankRule(budget=...)")
        if self.by == "value" and self.price is not None:
            raise ValueError("a `price` counts a budget that is divided by='loss'")
        for name in ("cutoff", "min_rank_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {value}")
        if not 0 < self.max_drop <= 1:
            raise ValueError(f"`max_drop` must be in (0, 1], got {self.max_drop}")
        if self.multiple < 1:
            raise ValueError(f"`multiple` must be at least 1, got {self.multiple}")
        if self.budget is not None and not self.budget >= (0 if self.price else 1):
            raise ValueError(f"`budget` must be at least 1, got {self.budget}")
        if self.raise_by < 0:
            raise ValueError(f"`raise_by` must be at least 0, got {self.raise_by}")
        if self.raise_by and self.budget is not None:
            raise ValueError(
                "`raise_by` is for a rule by `cutoff`: a `budget` only says how many "
                "of the directions that are there stay"
            )

    def min_rank(self, small_side: int) -> int:
        """The rank below which nothing is dropped, at least 1."""
        return max(1, int(self.min_rank_share * small_side))

    def choose(self, sigma: Float[np.ndarray, "*l k"], small_side: int) -> int:
        """The new rank of a core with the singular values `sigma`, in [1, k].

        With `raise_by` it is in [1, `small_side`].

        Shapes:   sigma: (k,), descending; or (l, k), a stack that shares one rank and
                  gets the largest choice of its members.
        Args:     small_side: min(m, n) of the dense matrix.
        Raises:   ValueError: `sigma` is empty, neither 1-D nor 2-D, not finite,
                  negative or not descending; `small_side` is below k; there is a
                  `budget`.
        """
        if self.budget is not None:
            raise ValueError("with a `budget` ranks are chosen together: `choose_all`")
        spectra = _spectra(sigma, small_side)
        return max(self._choose(spectrum, small_side) for spectrum in spectra)

    def choose_all(
        self,
        sigmas: Sequence[np.ndarray],
        sides: Sequence[tuple[int, int]],
        prices: Sequence[Prices] | None = None,
    ) -> list[int | None]:
        """The new ranks of several cores, each as `choose` or all within the budget.

        None, by="loss" alone, is a matrix that stays dense.

        Shapes:   sigmas: (k,) or (l, k) each, as `choose` takes them.
        Args:     sides: (m, n) of each dense matrix. prices: of each, for by="loss".
        Raises:   ValueError: as `choose`; or the least ranks are above the budget.

        >>> rule = RankRule(budget=2 * (16 + 8 + 2) + 1 * (8 + 8 + 1))
        >>> steep, flat = np.array([3.0, 0.3, 0.2, 0.1]), np.array([5.0, 4.0, 1.0, 0.5])
        >>> rule.choose_all([steep, flat], sides=[(8, 8), (16, 8)])
        [1, 2]
        """
        if self.budget is None:
            return [
                self.choose(sigma, min(side))
                for sigma, side in zip(sigmas, sides, strict=True)
            ]
        if self.by == "loss":
            if prices is None:
                raise ValueError("by='loss' needs the `prices` of the matrices")
            floors = [self.min_rank(min(side)) for side in sides]
            return allocate(
                [_spectra(x, min(y)) for x, y in zip(sigmas, sides, strict=True)],
                prices,
                self.budget,
                multiple=self.multiple,
                least=[
                    min(x.shape[-1], y) for x, y in zip(sigmas, floors, strict=True)
                ],
            )
        return [*self._within(self.budget, sigmas, sides)]

    def _within(
        self,
        budget: float | int,
        sigmas: Sequence[np.ndarray],
        sides: Sequence[tuple[int, int]],
    ) -> list[int]:
        """Ranks within a budget of weights, by σ/σ₀."""
        ranks: list[int] = []
        blocks: list[tuple[float, int, int]] = []
        for i, (sigma, (m, n)) in enumerate(zip(sigmas, sides, strict=True)):
            spectra = _spectra(sigma, min(m, n))
            k = spectra.shape[1]
            largest = np.where(spectra[:, :1] > 0, spectra[:, :1], 1)
            part = np.mean(spectra / largest, axis=0)
            ranks.append(min(k, self.min_rank(min(m, n))))
            for first in range(ranks[i], k, self.multiple):
                rank = min(k, first + self.multiple)
                if rank * (m + n + rank) < m * n:
                    worth = np.mean(part[first:rank])
                    blocks.append((-float(worth), i, rank))
        stacks = [math.prod(sigma.shape[:-1]) for sigma in sigmas]

        def cost(i: int, rank: int) -> int:
            return stacks[i] * rank * (sum(sides[i]) + rank)

        spent = sum(cost(i, rank) for i, rank in enumerate(ranks))
        if spent > budget:
            raise ValueError(
                f"`budget` is {budget} weights: the matrices have {spent} at "
                f"their least ranks, {ranks}"
            )
        for _, i, rank in sorted(blocks):
            more = cost(i, rank) - cost(i, ranks[i])
            if spent + more <= budget:
                ranks[i], spent = rank, spent + more
        return ranks

    def _choose(self, sigma: np.ndarray, small_side: int) -> int:
        k = len(sigma)
        floor = self.min_rank(small_side)
        least = k - k * self.max_drop  # exact where k * (1 - 0.9) would be a bit less
        below = np.flatnonzero(sigma < self.cutoff * sigma[0])
        if self.raise_by and not below.size and sigma[0] > 0:
            return min(small_side, self._rounded(k + self.raise_by))
        # cutoff <= 1, so the largest value stays and every branch gives at least 1
        r = int(below[0]) if below.size else k
        if r < least and least > floor:
            r = int(least)
        elif r < floor:
            r = floor
        return min(k, self._rounded(r))

    def _rounded(self, rank: int) -> int:
        return -(-rank // self.multiple) * self.multiple


def _spectra(
    sigma: Float[np.ndarray, "*l k"], small_side: int
) -> Float[np.ndarray, "l k"]:
    """Singular values, one row for each matrix of the stack.

    Raises:   ValueError: as `RankRule.choose`.
    """
    if sigma.ndim not in (1, 2) or sigma.size == 0:
        raise ValueError(
            f"`sigma` must have shape (k,) or (l, k), none 0; got {sigma.shape}"
        )
    spectra = np.atleast_2d(sigma).astype(np.float64)
    for spectrum in spectra:
        if not np.isfinite(spectrum).all():
            raise ValueError(f"`sigma` must be finite, got {spectrum}")
        if (spectrum < 0).any() or (np.diff(spectrum) > 0).any():
            raise ValueError(
                f"`sigma` must be descending and not negative, got {spectrum}"
            )
    k = spectra.shape[1]
    if small_side < k:
        raise ValueError(
            f"`small_side` must be at least the rank {k}, got {small_side}"
        )
    return spectra


@final
@replaced(
    project="projections=range(first, delay, every)",
    project_from="projections=range(first, delay, every)",
    when="adaptive(..., due=oialr_jax.stability.when_settled(threshold))",
    threshold="adaptive(..., due=oialr_jax.stability.when_settled(threshold))",
)
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which step converts and which steps update how many layers.

    Before the batch of step `delay`, counted from 0, dense matrices become low-rank.
    Update j = 0, 1, ... is decided at u_j = delay + j * every while u_j < stop, the
    first one with the conversion. It treats the last executed layers: a share
    `layer_step` of them at first, and as many more each time. It is applied `lag` steps
    after its ranks were chosen; in between the step for the new shapes is compiled.

    Before the steps in `projections`, say `range(300, 2500, 20)`, each matrix of the
    dense warm-up becomes the nearest one of the rank that the rule chooses (singular
    value projection, Jain, Meka and Dhillon 2010) and trains on, dense. So bases turn
    towards what a low rank can hold, and the conversion loses the last few steps alone.

    Raises:   ValueError: `delay` below 0, `every` below 1, `layer_step` outside [0, 1],
              `lag` outside [0, every), `stop` not after `delay`, `projections` that do
              not ascend or lie outside [0, `delay`). TypeError: `projections` is no
              sequence.
    Source:   Coquelin et al. 2024 (arXiv 2401.08505). The authors' code counts steps
              from 1 and acts when a counter equals the next update, so a counter that
              starts past it or jumps over it never acts again; here an update is due
              from its step on. Where a share is less than one layer their code treats
              all layers at every update; here each update treats one more.

    >>> schedule = Schedule(delay=100, every=50)
    >>> schedule.events(300)
    (100, 150, 200, 250)
    >>> [schedule.treated(j, layers=24) for j in range(4)]
    [2, 4, 6, 8]
    """

    delay: int
    every: int
    layer_step: float = 0.1
    lag: int = 0
    stop: int | None = None
    projections: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.delay < 0:
            raise ValueError(f"`delay` must be at least 0, got {self.delay}")
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1, got {self.every}")
        if not 0 <= self.layer_step <= 1:
            raise ValueError(f"`layer_step` must be in [0, 1], got {self.layer_step}")
        if not 0 <= self.lag < self.every:
            raise ValueError(
                f"`lag` must be in [0, every={self.every}), got {self.lag}"
            )
        if self.stop is not None and self.stop <= self.delay:
            raise ValueError(
                f"`stop` must be after delay={self.delay}, got {self.stop}"
            )
        steps = self.projections
        if not isinstance(steps, Sequence):
            raise TypeError(
                "`projections` must be steps, as "
                f"range(first, {self.delay}, every); got {steps!r}"
            )
        if any(a >= b for a, b in itertools.pairwise(steps)) or (
            steps and not 0 <= steps[0] <= steps[-1] < self.delay
        ):
            raise ValueError(
                f"`projections` must ascend within [0, delay={self.delay}), as "
                f"range(first, {self.delay}, every); got {steps}"
            )

    def converted(self, step: int) -> bool:
        """Whether the batch of this step meets low-rank params."""
        return step >= self.delay + self.lag

    def decided(self, step: int, previous: int | None = None) -> int | None:
        """The newest update j with previous < u_j <= step, or None: choose its ranks.

        A loop that takes several steps per call passes the step of its call before as
        `previous` (default step - 1) and misses no update; of several that lie in
        between it gets the newest, which treats the layers of all of them.
        """
        previous = step - 1 if previous is None else previous
        last = step if self.stop is None else min(step, self.stop - 1)
        if last < self.delay:
            return None
        j = (last - self.delay) // self.every
        return j if self.delay + j * self.every > previous else None

    def due(self, step: int, previous: int | None = None) -> int | None:
        """The newest update j with previous < u_j + lag <= step, or None: do it."""
        previous = step - 1 if previous is None else previous
        return self.decided(step - self.lag, previous - self.lag)

    def projected(self, step: int, previous: int | None = None) -> bool:
        """Whether a projection lies in (previous, step]: cut what is dense now."""
        previous = step - 1 if previous is None else previous
        i = bisect.bisect_right(self.projections, step)
        return i > 0 and self.projections[i - 1] > previous

    def acts(self, step: int) -> bool:
        """Whether matrices are decomposed before the batch of this step."""
        updates = self.decided(step) is not None or self.due(step) is not None
        return updates or self.projected(step)

    def treated(self, j: int, layers: int) -> int:
        """How many layers, from the last executed backwards, update j treats."""
        if j < 0:
            raise ValueError(f"`j` must be at least 0, got {j}")
        if layers < 1:
            raise ValueError(f"`layers` must be at least 1, got {layers}")
        return min(layers, (j + 1) * max(1, int((layers - 1) * self.layer_step)))

    def events(self, steps: int) -> tuple[int, ...]:
        """The steps below `steps` at which shapes may change, the conversion first.

        Raises:   ValueError: a run of `steps` steps ends before the conversion.
        """
        if self.delay + self.lag >= steps:
            late = f" + lag={self.lag}" if self.lag else ""
            raise ValueError(
                f"the conversion at delay={self.delay}{late} is never reached in "
                f"{steps} steps"
            )
        end = steps if self.stop is None else min(steps, self.stop + self.lag)
        return tuple(range(self.delay + self.lag, end, self.every))

    def compilations(
        self,
        steps: int,
        rule: RankRule | None = None,
        sides: Sequence[int] = (),
        *,
        one_by_one: bool = False,
    ) -> int:
        """How often a step whose other shapes are constant is compiled at most.

        Once dense, and once for each event. With the `rule`, and the small `sides` of
        all matrices, once for the conversion and once for each fall of a rank, which is
        through multiples of `rule.multiple`; a matrix that is not finite at the
        conversion, and so converts later, adds one.

        A rule that raises ranks has no such bound.

        Args:     one_by_one: each matrix may be converted at an update of its own, as
                  with `stability.when_settled`.

        >>> schedule = Schedule(delay=100, every=50)
        >>> schedule.compilations(1000)
        19
        >>> schedule.compilations(1000, RankRule(multiple=16), sides=[64, 64])
        8
        """
        events = len(self.events(steps))
        if rule is not None and not rule.raise_by:
            falls = sum(-(-side // rule.multiple) - 1 for side in sides)
            conversions = len(sides) if one_by_one else 1
            events = min(events, conversions + falls)
        return 1 + events
