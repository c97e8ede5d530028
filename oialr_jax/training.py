"""The front door: one call around a loss, built from the public layers below.

These are `find_matrices`, `select`, `factored`, `freeze_bases` and `adaptive`, with the
choices of `defaults`; a run has them as attributes, for loops that need them directly.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from oialr_jax.adapters import FrozenBase, adapters, attached, on_base
from oialr_jax.adaptive import AdaptiveStep, Timing, adaptive
from oialr_jax.defaults import Choice, Selection, check_params, scheduled
from oialr_jax.factored import factored
from oialr_jax.lowrank import PyTree, arrays_only, materialize
from oialr_jax.matrices import Matrix, find_matrices
from oialr_jax.rehearsal import line, shown, traced
from oialr_jax.reports import Report
from oialr_jax.schedule import RankRule, Schedule
from oialr_jax.sharding import Layout
from oialr_jax.transform import (
    FrozenBases,
    freeze_bases,
    trainable,
    value_and_grad,
    with_trainable,
)
from oialr_jax.weighing import Weighing

Follow = Mapping[str, Callable[[PyTree, PyTree], PyTree]]
NOTHING: Mapping[str, Any] = MappingProxyType({})


@final
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingState:
    """The state of a run: a pytree that `Checkpoints` can save.

    Attributes:
        extra: what the model keeps beside its params, such as batch statistics.
        key: of the run; the loss gets it folded with the step.
        beside: copies of the params, by name, that `training(follow=...)` updates.
        curvature: sums of the batches before a cut, with `training(weighing=...)`.
    """

    step: Any
    params: Any
    opt_state: Any
    extra: Any = None
    key: Any = None
    beside: Any = None
    curvature: Any = None

    def replace(self, **changes: Any) -> "TrainingState":
        """The state with other values of some fields."""
        return dataclasses.replace(self, **changes)


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

    Args:     tx: an optimizer of Optax; `freeze_bases` is put around it here.
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
    _check_optimizer(tx)
    settings = _frozen_base(base)
    if settings is not None:
        plan = _events_on_base(delay, steps, budget, schedule, rule)
        choice = Choice(None, rule, select, once=False)
    else:
        plan = scheduled(delay, steps, schedule)
        choice = Choice(
            budget, rule, select, once=schedule is None, by_loss=bool(weighing)
        )
    return Training(
        loss,
        freeze_bases(tx),
        plan,
        choice,
        base=settings,
        has_aux=has_aux,
        follow=follow,
        weighing=weighing,
        layout=layout,
        options=options,
    )


def _check_optimizer(tx: Any) -> None:
    """Raise unless `tx` is an optimizer that is not frozen yet."""
    if isinstance(tx, FrozenBases):
        raise ValueError(
            "`tx` is frozen already, which `training` does itself: give it the "
            "optimizer without freeze_bases, training(loss, optax.adamw(3e-4), ...)"
        )
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            "`tx` has to be an optimizer of Optax, training(loss, optax.adamw(3e-4), "
            f"...); got {tx!r}"
        )


def _frozen_base(base: Any) -> FrozenBase | None:
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


NEVER = Schedule(delay=2**62, every=1)
"""A schedule without events."""


def _events_on_base(
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


class Training:
    """Host side: what `training` returns.

    Its parts are `tx`, `schedule`, `train_step` (pure) and, after `init`, `matrices`
    and `rule`: arguments of `adaptive`, for loops that need more than this one offers.
    On a frozen base `base` has what does not train, and `train_step` takes it after the
    batch.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        tx: FrozenBases,
        schedule: Schedule,
        choice: Choice,
        *,
        base: FrozenBase | None,
        has_aux: bool,
        follow: Follow,
        weighing: bool | Weighing,
        layout: Layout | None,
        options: Mapping[str, Any],
    ) -> None:
        """Use `training`, which checks its arguments."""
        self.tx = tx
        self.schedule = schedule
        self.matrices: tuple[Matrix, ...] = ()
        self.rule: RankRule | None = None
        self.base: PyTree = None
        self._frozen = base
        self._loss = loss
        self._forward = factored(loss) if base is None else on_base(loss)
        self._choice = choice
        self._has_aux = has_aux
        self._follow = dict(follow)
        self._given = [x for x in follow if x in inspect.signature(loss).parameters]
        self._layout = layout
        if isinstance(weighing, Weighing):
            options = {**options, "weighing": weighing}
        elif weighing:
            options = {**options, "weighing": Weighing(self._value)}
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
        check_params(params, only_arrays="jit" not in self._options)
        arrays = arrays_only(params)

        def create(arrays: PyTree, extra: Any, key: Any) -> TrainingState:
            return TrainingState(
                step=jnp.zeros((), jnp.int32),
                params=_copy(arrays),
                opt_state=_copy(self.tx.init(arrays)),
                extra=_copy(extra),
                key=_copy(key),
                beside={name: _copy(arrays) for name in self._follow},
            )

        state = jax.eval_shape(create, arrays, extra, key)
        args, kwargs = jax.eval_shape(self._arguments, state, example)
        out = traced(self._loss, params, *args, **kwargs)
        if isinstance(out, Exception):
            given = ["params", *map(shown, args), *(f"{name}=..." for name in kwargs)]
            raise ValueError(
                f"loss({', '.join(given)}) fails: give run.init the params of the "
                f"model and one batch, as run.step gets it ({line(out)})"
            ) from out
        self._parts(out, state.extra)
        found = find_matrices(self._loss, params, *args, **kwargs)
        self.matrices = self._choice.matrices(found)
        seen = example
        if self._frozen is None:
            self.rule = self._choice.rule_for(params, self.matrices)
        else:
            self.rule = self._choice.rule or RankRule()
            settings = self._frozen
            params, self.base = adapters(
                params,
                self.matrices,
                settings.rank,
                train=settings.train,
                dtype=settings.dtype,
                of=settings.of,
            )
            if self._layout is not None:
                self.base = jax.device_put(self.base, self._layout(self.base))
            seen = (*example, self.base)
            arrays = arrays_only(params)
            state = jax.eval_shape(create, arrays, extra, key)
        options = self._options
        if self.rule.raise_by:
            options = {"directions": self._gradient, **options}
        self._step = adaptive(
            self.train_step,
            self.tx,
            self.matrices,
            self.schedule,
            self.rule,
            follow=("beside",) if self._follow else (),
            layout=self._layout,
            **options,
        )
        self._step.check(state.replace(params=_merged(state.params, params)), *seen)
        if self._layout is not None:
            state = self._layout.initialize(create, arrays, extra, key)
        else:
            state = jax.jit(create)(arrays, extra, key)
        return state.replace(params=_merged(state.params, params))

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

    def train_step(
        self, state: TrainingState, *batch: Any
    ) -> tuple[TrainingState, Any]:
        """The pure step: gradient, update, trees beside the params."""
        forward, given = self._on_base(batch)
        args, kwargs = self._arguments(state, given)
        has_aux = self._has_aux or state.extra is not None
        gradient = value_and_grad(forward, has_aux=has_aux)
        out, grads = gradient(state.params, *args, **kwargs)
        value, extra, aux = self._parts(out, state.extra)

        def value_fn(params: PyTree) -> Any:  # for a line search
            return self._value(state.replace(params=params), *batch)

        arrays = arrays_only(state.params)
        updates, opt_state = self.tx.update(
            grads, state.opt_state, arrays, value=value, grad=grads, value_fn=value_fn
        )
        arrays = optax.apply_updates(arrays, updates)
        beside = {}
        for name, update in self._follow.items():
            copy = state.beside[name]
            new = update(trainable(arrays), trainable(copy))
            beside[name] = with_trainable(copy, new)
        state = state.replace(
            step=state.step + 1,
            params=_merged(arrays, state.params),
            opt_state=opt_state,
            extra=extra,
            beside=beside,
        )
        return state, (value, aux) if self._has_aux else value

    def _value(self, state: TrainingState, *batch: Any) -> Any:
        """The loss of a batch, alone."""
        forward, batch = self._on_base(batch)
        args, kwargs = self._arguments(state, batch)
        return self._parts(forward(state.params, *args, **kwargs), state.extra)[0]

    def _gradient(self, state: TrainingState, *batch: Any) -> PyTree:
        """That of the dense params, for directions of ranks that go up."""
        params, given = state.params, batch
        if self._frozen is not None:
            params, given = attached(params, batch[-1]), batch[:-1]
        args, kwargs = self._arguments(state, given)

        def value(params: PyTree) -> Any:
            out = factored(self._loss)(params, *args, **kwargs)
            return self._parts(out, state.extra)[0]

        return value_and_grad(value)(materialize(params))[1]

    def _on_base(
        self, batch: tuple[Any, ...]
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The loss of params and batch, and the batch without the frozen base."""
        if self._frozen is None:
            return self._forward, batch
        return _given_base(self._forward, batch[-1]), batch[:-1]

    def _arguments(
        self, state: TrainingState, batch: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the loss gets after the params."""
        args = batch if state.extra is None else (state.extra, *batch)
        kwargs = {name: state.beside[name] for name in self._given}
        if state.key is not None:
            kwargs["key"] = jax.random.fold_in(state.key, state.step)
        return args, kwargs

    def _parts(self, out: Any, extra: Any) -> tuple[Any, Any, Any]:
        """Value, extra and aux, of which the loss returned some.

        Raises:   TypeError: it returned something else.
        """
        form = "(value, extra)" if extra is not None else "value"
        if self._has_aux:
            form = "(value, aux)" if extra is None else "(value, (extra, aux))"
        value, new, aux = out, None, None
        fits = form == "value" or _is_pair(out)
        if fits and form != "value":
            value, new = out
            if form == "(value, aux)":
                new, aux = None, new
            elif self._has_aux:
                fits = _is_pair(new)
                new, aux = new if fits else (None, None)
        is_float = jnp.issubdtype(getattr(value, "dtype", type(value)), jnp.floating)
        if not fits or np.shape(value) != () or not is_float:
            hint = "the value is a float, say jnp.mean(...)"
            if isinstance(value, tuple):
                hint = "for aux say training(..., has_aux=True)"
            raise TypeError(f"loss must return {form}, got {shown(out)}: {hint}")
        if _form(new) != _form(extra):
            raise TypeError(
                "loss must return `extra` as run.init got it, "
                f"{shown(extra)}; got {shown(new)}"
            )
        return value, new, aux

    def _adaptive(self) -> AdaptiveStep:
        if self._step is None:
            raise ValueError(
                "the params are not known yet: state = run.init(params, *batch) comes "
                "first, also before a checkpoint is restored"
            )
        return self._step


def _given_base(forward: Callable[..., Any], base: PyTree) -> Callable[..., Any]:
    def of_cores(cores: PyTree, *args: Any, **kwargs: Any) -> Any:
        return forward(cores, base, *args, **kwargs)

    return of_cores


def _merged(arrays: PyTree, whole: PyTree) -> PyTree:
    """`arrays`, with what is no array of `whole` in the place of None."""
    return jax.tree.map(
        lambda x, y: y if x is None else x, arrays, whole, is_leaf=lambda x: x is None
    )


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def _placed(x: Any, layout: Layout) -> Any:
    """A part of a batch where the layout wants it, unless it is on a mesh."""
    on_mesh = isinstance(getattr(x, "sharding", None), jax.sharding.NamedSharding)
    return x if on_mesh or np.ndim(x) == 0 else jax.device_put(x, layout.batch)


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2


def _form(tree: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(np.shape(x), getattr(x, "dtype", type(x))) for x in leaves]
