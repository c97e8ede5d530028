"""The front door: one call around a loss, built from the public layers below.

These are `find_matrices`, `select`, `factored`, `freeze_bases` and `adaptive`, with the
choices of `defaults`; a run has them as attributes, for loops that need them directly.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import optax

from oialr_jax.adapters import FrozenBase, adapters, attached
from oialr_jax.adaptive import AdaptiveStep, Timing, adaptive
from oialr_jax.defaults import (
    Choice,
    Selection,
    check_optimizer,
    check_params,
    frozen_base,
    is_function_of_matrices,
    made_of,
    of_rate,
    scheduled,
    scheduled_on_base,
)
from oialr_jax.loss_step import Follow, LossStep, TrainingState, merged
from oialr_jax.lowrank import PyTree, arrays_only
from oialr_jax.matrices import Matrix, find_matrices
from oialr_jax.rehearsal import line, shown, traced
from oialr_jax.reports import Report
from oialr_jax.schedule import RankRule, Schedule
from oialr_jax.sharding import Layout
from oialr_jax.transform import freeze_bases
from oialr_jax.weighing import Weighing

__all__ = ["Training", "TrainingState", "training"]

NOTHING: Mapping[str, Any] = MappingProxyType({})


def training(
    loss: Callable[..., Any],
    tx: Any,
    *,
    delay: int | None = None,
    steps: int | None = None,
    budget: float | int | None = None,
    base: str | FrozenBase | None = None,
    has_aux: bool = False,
    select: Selection = NOTHING,
    follow: Follow = NOTHING,
    schedule: Schedule | None = None,
    rule: RankRule | None = None,
    weighing: bool | Weighing = False,
    layout: Layout | None = None,
    **options: Any,
) -> "Training":
    """Host side: training that minimises loss(params, *batch) and ends in low rank.

        run = training(loss, optax.adamw(3e-4), delay=2500)
        state = run.init(params, *batch)
        state, value = run.step(state, *batch)  # for every batch
        params = materialize(state.params)

    The first `delay` steps are dense. Then every matrix for which low rank pays becomes
    U S Vᵀ, of ranks that fit the `budget`, and only its core S is trained. In the last
    70 % of the dense steps the matrices are projected 12 to 14 times to the ranks that
    they would get then, so that little is lost at the conversion: at small budgets one
    cut after such a warm-up kept more accuracy than many cuts without it
    (train/results/experiments.md). A warm-up of less than 20 steps has no projections.

    Args:     tx: an optimizer of Optax, around which `freeze_bases` is put here; a
              function of the matrices that returns one, lambda matrices:
              orthogonal.core_muon(schedule, matrices, rms=0.2); or a learning rate
              alone, that of AdamW, for this one: on cores Muon kept the accuracy of its
              dense run, and AdamW did not (train/results/orthogonal.md).
              delay: the step of the conversion, by default a third of `steps`, the
              paper's rule of thumb. Later is safer, up to two thirds in short runs, but
              dense for longer.
              steps: the length of the run.
              budget: a float in (0, 1) is the share of *all* weights of the params to
              store after the conversion: bases, cores and what stays dense. An int is
              the number of weights in matrices, as in `RankRule(budget=)`. By default
              the matrices keep a quarter of their weights, or their least ranks if
              these have more. Every network can meet that, as leaves that stay dense
              (embeddings, heads) are not counted.
              base: "frozen", or a `FrozenBase`, for params that were trained before:
              they are frozen, and on each matrix a core of zeros trains from the first
              step, W = W0 + U S Vᵀ. There is no conversion; a schedule and a rule, both
              or none, cut the cores' ranks. `run.attached(state)` has the params.
              With RankRule(raise_by=...) ranks go up too, on a base or without one:
              into directions of the dense gradient of the batch of the event, the only
              moment at which one is formed.
              has_aux: the loss returns (value, aux), and so does `run.step`.
              select: options of `select`, as {"exclude": "embed"}, or the matrices.
              follow: copies of the params in `state.beside`, by name, each with the
              function of (params, copy) that returns the copy after a step; both have
              cores in the place of matrices. A running average is {"ema":
              functools.partial(optax.incremental_update, step_size=1e-3)}. A loss with
              a parameter of this name gets the copy, as a target network.
              schedule: instead of `delay` and `steps`. rule: instead of `budget`.
              weighing: True has the budget divided by what each direction is worth in
              loss, measured on 8 batches before each cut and projection; a `Weighing`
              sets their number, or another loss of (state, *batch).
              layout: the sharding of state and batches.
              options: of `adaptive`: `moment_rule`, `due`, `jit`, and those of `jit`.
    Raises:   ValueError, TypeError: a value out of range, two that exclude each other,
              a `tx` that is frozen already or no optimizer.
    """
    tx = of_rate(tx) if isinstance(tx, int | float) else tx
    of_matrices = is_function_of_matrices(tx)
    if not of_matrices:
        check_optimizer(tx)
    frozen = frozen_base(base)
    if frozen is None:
        plan = scheduled(delay, steps, schedule)
    else:
        plan = scheduled_on_base(delay, steps, budget, schedule, rule)
    choice = Choice(
        budget,
        rule,
        select,
        once=frozen is None and schedule is None,
        by_loss=bool(weighing),
    )
    known = optax.identity() if of_matrices else tx
    pure = LossStep(
        loss, freeze_bases(known), dict(follow), has_aux, frozen is not None
    )
    if weighing:
        given = isinstance(weighing, Weighing)
        options["weighing"] = weighing if given else Weighing(pure.value)
    made = tx if of_matrices else None
    return Training(pure, made, plan, choice, frozen, layout, options)


class Training:
    """Host side: what `training` returns.

    After `init` its parts are `tx`, `schedule`, `train_step` (pure), `matrices` and
    `rule`: arguments of `adaptive`, for loops that need more than this one offers.
    On a frozen base `base` has what does not train, and `train_step` takes it after the
    batch.
    """

    def __init__(
        self,
        pure: LossStep,
        tx: Callable[[Sequence[Matrix]], Any] | None,
        schedule: Schedule,
        choice: Choice,
        frozen: FrozenBase | None,
        layout: Layout | None,
        options: Mapping[str, Any],
    ) -> None:
        """Use `training`, which checks its arguments."""
        self.tx = pure.tx
        self.train_step = pure.step
        self.schedule = schedule
        self.matrices: tuple[Matrix, ...] = ()
        self.rule: RankRule | None = None
        self.base: PyTree = None
        self._pure = pure
        self._of_matrices = tx
        self._choice = choice
        self._frozen = frozen
        self._layout = layout
        self._options = options
        self._step: AdaptiveStep | None = None

    @property
    def reports(self) -> list[Report]:
        """A report of each event of this process."""
        return self._adaptive().reports

    @property
    def timings(self) -> list[Timing]:
        """Seconds that decisions, events and projections took on the host."""
        return self._adaptive().timings

    @property
    def compilations(self) -> int:
        """How often the step was traced and compiled."""
        return self._adaptive().compilations

    def init(
        self, params: PyTree, *example: Any, extra: Any = None, key: Any = None
    ) -> TrainingState:
        """Host side: the initial state; `params` are copied, not donated.

        Finds and selects the matrices, and checks by shapes alone the loss, the budget,
        the optimizer and the step as it will be after the conversion.

        Args:     example: one batch, as `step` gets it; shapes suffice.
                  extra: other collections of the model. The loss is then
                  loss(params, extra, *batch) and returns (value, extra), or
                  (value, (extra, aux)).
                  key: the loss then gets key=, a new one at every step.
        Raises:   ValueError, TypeError: an argument that does not fit, with the line to
                  change.
        """
        pure, layout = self._pure, self._layout
        check_params(params, only_arrays="jit" not in self._options)
        state = jax.eval_shape(pure.create, arrays_only(params), extra, key)
        args, kwargs = jax.eval_shape(pure.arguments, state, example)
        out = traced(pure.loss, params, *args, **kwargs)
        if isinstance(out, Exception):
            names = ["params", *map(shown, args), *(f"{name}=..." for name in kwargs)]
            raise ValueError(
                f"loss({', '.join(names)}) fails: give run.init the params of the "
                f"model and one batch, as run.step gets it ({line(out)})"
            ) from out
        pure.parts(out, state.extra)
        found = find_matrices(pure.loss, params, *args, **kwargs)
        self.matrices = self._choice.matrices(found)
        if self._of_matrices is not None:
            tx = made_of(self._of_matrices, self.matrices)
            pure = dataclasses.replace(pure, tx=freeze_bases(tx))
            self.tx, self.train_step = pure.tx, pure.step
        if self._frozen is None:
            self.rule = self._choice.rule_for(params, self.matrices)
        else:
            self.rule = self._choice.rule or RankRule()
            params, base = adapters(params, self.matrices, **vars(self._frozen))
            self.base = base if layout is None else jax.device_put(base, layout(base))
            example = (*example, self.base)
        options = dict(self._options)
        if self.rule.raise_by:
            options.setdefault("directions", pure.dense_gradient)
        self._step = adaptive(
            self.train_step,
            self.tx,
            self.matrices,
            self.schedule,
            self.rule,
            follow=("beside",) if pure.follow else (),
            layout=layout,
            **options,
        )
        given = arrays_only(params), extra, key
        state = jax.eval_shape(pure.create, *given)
        self._step.check(state.replace(params=merged(state.params, params)), *example)
        if layout is None:
            state = jax.jit(pure.create)(*given)
        else:
            state = layout.initialize(pure.create, *given)
        return state.replace(params=merged(state.params, params))

    def step(self, state: TrainingState, *batch: Any) -> tuple[TrainingState, Any]:
        """The next state, and the result of the loss; `state` is donated."""
        layout = self._layout
        if layout is not None:
            batch = jax.tree.map(lambda x: _placed(x, layout), batch)
        if self._frozen is not None:
            batch = (*batch, self.base)
        return self._adaptive()(state, *batch)

    def attached(self, state: TrainingState) -> PyTree:
        """The params of a state with the base they stand on, if there is one.

        It is for `factored`, `materialize`, `merge` and `export`.
        """
        if self._frozen is None:
            return state.params
        return attached(state.params, self.base)

    def _adaptive(self) -> AdaptiveStep:
        if self._step is None:
            raise ValueError(
                "the params are not known yet: state = run.init(params, *batch) comes "
                "first, also before a checkpoint is restored"
            )
        return self._step


def _placed(x: Any, layout: Layout) -> Any:
    """A part of a batch where the layout wants it, unless it is on a mesh."""
    on_mesh = isinstance(getattr(x, "sharding", None), jax.sharding.NamedSharding)
    return x if on_mesh or np.ndim(x) == 0 else jax.device_put(x, layout.batch)
