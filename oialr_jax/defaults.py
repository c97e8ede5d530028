"""The defaults of `training` and `wrap`, and what they refuse at once."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import jax.numpy as jnp
import optax

from oialr_jax.adapters import FrozenBase
from oialr_jax.lowrank import PyTree, check_forms, counts, is_low_rank, named_leaves
from oialr_jax.matrices import Matrices, Matrix, select, skipped_lines
from oialr_jax.orthogonal import core_muon
from oialr_jax.rehearsal import line
from oialr_jax.schedule import RankRule, Schedule
from oialr_jax.transform import FrozenBases

Selection = Mapping[str, Any] | Sequence[Matrix]
"""Options of `select`, or the matrices themselves, in execution order."""


def scheduled(
    delay: int | None, steps: int | None, schedule: Schedule | None = None
) -> Schedule:
    """One conversion, at `delay`, after a warm-up whose last 70 % are projected.

    Ranks are chosen a few steps ahead, so that the new step compiles meanwhile.

    Raises:   ValueError: neither is given, one is out of range, or both say the same.

    >>> scheduled(delay=None, steps=3000).events(3000)
    (1000,)
    """
    if schedule is not None:
        if delay is not None or steps is not None:
            raise ValueError("`schedule` has a delay: leave out `delay` and `steps`")
        return schedule
    if delay is None and steps is None:
        raise ValueError(
            "when to convert is open: give steps=, the length of the run, of which a "
            "third will be dense, or delay=, the step of the conversion"
        )
    for name, value in (("delay", delay), ("steps", steps)):
        if value is not None and value < 0:
            raise ValueError(f"`{name}` must be at least 0, got {value}")
    delay = (steps or 0) // 3 if delay is None else delay
    if steps is not None and delay >= steps:
        raise ValueError(
            f"delay={delay} is not before the end of a run of steps={steps}, which "
            f"would stay dense; a third is delay={steps // 3}"
        )
    lag, every = min(25, delay // 10), delay // 20
    return Schedule(
        delay=delay - lag,
        every=lag + 1,
        lag=lag,
        stop=delay - lag + 1,
        projections=range(3 * delay // 10, delay - lag, every) if every else (),
    )


NEVER = Schedule(delay=2**62, every=1)
"""A schedule without events."""


def scheduled_on_base(
    delay: int | None,
    steps: int | None,
    budget: float | int | None,
    schedule: Schedule | None,
    rule: RankRule | None,
) -> Schedule:
    """When cores on a frozen base are cut: never, or as the schedule says.

    Raises:   ValueError: a setting of the conversion, which there is not; a schedule
              without a rule, or the reverse.
    """
    for name, value in (("delay", delay), ("steps", steps), ("budget", budget)):
        if value is not None:
            raise ValueError(
                f"`{name}` is for a conversion, and on a frozen base there is none: "
                "leave it out, and say base=FrozenBase(rank=...)"
            )
    if (schedule is None) != (rule is None):
        raise ValueError(
            "to cut ranks give both `schedule` and `rule`, or none of them"
        )
    return NEVER if schedule is None else schedule


@final
@dataclasses.dataclass(frozen=True)
class Choice:
    """Which of the matrices are held in low rank, and with how many weights.

    Raises:   ValueError: a budget out of range, a budget and a rule, or a rule that one
              event cannot follow.
    """

    budget: float | int | None
    rule: RankRule | None
    selection: Selection
    once: bool
    by_loss: bool = False

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.rule is not None and self.budget is not None:
            raise ValueError("`rule` has a budget of its own: give one of the two")
        if self.rule is not None and self.rule.budget is None and self.once:
            raise ValueError(
                "a `rule` by cutoff cuts a few of the matrices at each of many events: "
                "give it a schedule=Schedule(delay=..., every=...), or give a budget"
            )
        if self.budget is None:
            return
        share = isinstance(self.budget, float)
        if not (0 < self.budget < 1 if share else self.budget >= 1):
            raise ValueError(
                "`budget` must be a float in (0, 1), the share of all weights stored, "
                "or an int of at least 1, the number of weights in matrices; "
                f"got {self.budget}"
            )

    def matrices(self, found: Sequence[Matrix]) -> tuple[Matrix, ...]:
        """Those of `found` that are selected, or those that were given.

        Raises:   ValueError: there is none.
        """
        if not isinstance(self.selection, Mapping):
            if not self.selection:
                raise ValueError("`select` is empty: nothing is to be in low rank")
            return tuple(self.selection)
        if not found:
            skipped = found.skipped if isinstance(found, Matrices) else ()
            why = "; ".join(skipped_lines(skipped)) or "none has two axes"
            raise ValueError(f"no leaf of the params is used as a matrix: {why}")
        chosen = select(found, **self.selection)
        if not chosen:
            names = ", ".join(f"{x.path} {x.m}x{x.n}" for x in found)
            raise ValueError(
                "no matrix pays in low rank, as each is small, narrow, a head or has "
                f"other uses: {names}. To take some: select={{'include': ['PATH']}}"
            )
        return chosen

    def rule_for(self, params: PyTree, matrices: Sequence[Matrix]) -> RankRule:
        """The rule that brings params into the budget.

        Raises:   ValueError: none does; the least that can be had.
        """
        rule = RankRule() if self.rule is None else self.rule
        whole = counts(params).dense
        inside = sum(math.prod(x.axes.shape) for x in matrices)
        dense = whole - inside
        floors = [rule.min_rank(min(x.m, x.n)) for x in matrices]
        least = sum(
            math.prod(x.axes.l) * r * (x.m + x.n + r)
            for x, r in zip(matrices, floors, strict=True)
        )
        if least >= inside:
            raise ValueError(
                f"the matrices have {inside} weights dense and {least} at their least "
                "ranks: low rank would make them larger, so exclude the small ones"
            )
        weights: float | int = max(inside // 4, least)
        if self.rule is not None:
            weights = self.rule.budget or weights
        elif isinstance(self.budget, float):
            weights = int(self.budget * whole) - dense
        elif self.budget is not None:
            weights = self.budget
        if weights < least and rule.price is None:
            share = math.ceil(1e4 * (dense + least) / whole) / 1e4
            raise ValueError(
                f"budget={self.budget or weights} is out of reach: of {whole} weights "
                f"{dense} stay dense, and the matrices have {least} at their least "
                f"ranks; the least is budget={share}, or {least} as an int"
            )
        if self.rule is not None:
            return self.rule
        return RankRule(budget=weights, by="loss" if self.by_loss else "value")


def is_function_of_matrices(tx: Any) -> bool:
    """Whether `tx` is no optimizer, but a function that may return one.

    Raises:   TypeError: it is one of a learning rate, as `optax.adamw` is.
    """
    if not callable(tx) or hasattr(tx, "init") or isinstance(tx, type):
        return False
    if "learning_rate" in inspect.signature(tx).parameters:
        name = getattr(tx, "__name__", tx)
        raise TypeError(
            f"`tx` has to be an optimizer, got {name} itself: write {name}(3e-4)"
        )
    return True


def of_rate(rate: float) -> Callable[[Sequence[Matrix]], Any]:
    """The optimizer for a learning rate alone: Muon on the matrices, Adam elsewhere.

    Its steps are as large as AdamW's, so that rates carry over (Liu et al. 2025).

    Raises:   ValueError: the rate is not positive and finite.
    """
    if isinstance(rate, bool) or not 0 < rate < math.inf:
        raise ValueError(
            f"`tx` as a learning rate must be positive and finite, got {rate!r}"
        )
    return lambda matrices: core_muon(rate, matrices, rms=0.2)


def made_of(
    tx: Callable[[Sequence[Matrix]], Any], matrices: Sequence[Matrix]
) -> optax.GradientTransformation:
    """The optimizer that a function gives for the matrices.

    Raises:   TypeError, ValueError: it fails, or gives none that fits.
    """
    try:
        found = tx(matrices)
    except Exception as error:
        raise TypeError(
            "`tx` is no optimizer, and calling it with the matrices fails: give "
            "optax.adamw(schedule), or lambda matrices: core_muon(schedule, matrices) "
            f"({line(error)})"
        ) from error
    check_optimizer(found)
    return found


def check_optimizer(tx: Any) -> None:
    """Raise unless `tx` is an optimizer that is not frozen yet."""
    if isinstance(tx, FrozenBases):
        raise ValueError(
            "`tx` is frozen already, which `training` does itself: give it the "
            "optimizer without freeze_bases, training(loss, optax.adamw(3e-4), ...)"
        )
    has_both = hasattr(tx, "init") and hasattr(tx, "update")
    if not has_both or isinstance(tx, type):
        raise TypeError(
            "`tx` has to be an optimizer of Optax, training(loss, optax.adamw(3e-4), "
            f"...); got {tx!r}"
        )


def frozen_base(base: Any) -> FrozenBase | None:
    """What `base` says.

    Raises:   ValueError: another word, or what is no `FrozenBase`.
    """
    if base == "frozen":
        return FrozenBase()
    if base is not None and not isinstance(base, FrozenBase):
        raise ValueError(
            f"`base` must be 'frozen', a FrozenBase(rank=...) or None, got {base!r}"
        )
    return base


def check_params(params: PyTree, *, only_arrays: bool) -> None:
    """Raise unless params are dense and can be trained.

    Raises:   ValueError: a leaf is in low rank already, no float, or no array; there
              are other collections beside "params".
    """
    if isinstance(params, Mapping) and "params" in params and len(params) > 1:
        others = [name for name in params if name != "params"]
        extra = ", ".join(f"{name!r}: ..." for name in others)
        raise ValueError(
            f"{', '.join(others)} beside 'params' would be trained like them: take "
            "variables['params'] alone and keep the others apart, "
            f"run.init(variables['params'], *batch, extra={{{extra}}})"
        )
    check_forms(params, what="training takes")
    for name, leaf in named_leaves(params).items():
        if is_low_rank(leaf):
            raise ValueError(
                f"{name} is in low rank already: begin with "
                "oialr_jax.materialize(params), or restore a checkpoint to go on"
            )
        if hasattr(leaf, "dtype") and hasattr(leaf, "value"):
            raise ValueError(
                f"{name} of the params is no array but a {type(leaf).__name__}, which "
                "holds one: give its `.value`"
            )
        if hasattr(leaf, "dtype"):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise ValueError(
                    f"{name} of the params is {leaf.dtype} and cannot be trained: keep "
                    "it apart from them, as `extra`"
                )
        elif only_arrays:
            raise ValueError(
                f"{name} of the params is no array but {leaf!r}: train arrays alone, "
                "params, static = eqx.partition(model, eqx.is_inexact_array), with "
                "eqx.combine(params, static) in the loss; or give jit=eqx.filter_jit"
            )
