"""The drop-in for jax.jit(train_step): schedule and surgery around a compiled step."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import optax

from oialr_jax.bases import shown
from oialr_jax.checks import check_optimizer
from oialr_jax.compiling import filters, options_for, shape_of, zeros_of
from oialr_jax.decompose import AHEAD, NOW, Run
from oialr_jax.due import Chooser, LastExecutedFirst
from oialr_jax.following import Identities, bare, followed, rebase
from oialr_jax.lowrank import (
    PyTree,
    is_low_rank,
    leaf_at,
    named_leaves,
    without_identity,
)
from oialr_jax.matrices import Matrix
from oialr_jax.moments import MomentRule
from oialr_jax.projection import project_to_rank
from oialr_jax.ranking import choose
from oialr_jax.rehearsal import check_opt_state, check_state, rehearse
from oialr_jax.reports import Report
from oialr_jax.schedule import RankRule, Schedule
from oialr_jax.sharding import Layout
from oialr_jax.surgery import Setup, apply_ranks, apply_rule, compile_ahead
from oialr_jax.transform import pending_ranks, with_pending
from oialr_jax.weighing import Weighing, added
from oialr_jax.weighted import Statistics


def adaptive(
    step: Callable[..., Any],
    tx: optax.GradientTransformation,
    matrices: Sequence[Matrix],
    schedule: Schedule,
    rule: RankRule = RankRule(),  # noqa: B008 -- frozen
    *,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    due: Chooser | None = None,
    steps_per_call: int = 1,
    follow: Sequence[str] = (),
    weighing: Weighing | None = None,
    directions: Callable[..., PyTree] | None = None,
    layout: Layout | None = None,
    jit: Callable[..., Any] = jax.jit,
    **jit_options: Any,
) -> "AdaptiveStep":
    """Host side: `step(state, *args)`, compiled, with OIALR's events between the calls.

    `state` is anything with `.step`, `.params`, `.opt_state` and `.replace`, such as
    Flax's TrainState. Before the batch of a step at which `schedule` has an event, the
    `matrices` are converted (once) and the last executed of them truncated. With
    `Schedule.lag` ranks are chosen that many steps ahead and wait in the optimizer
    state, while a background thread compiles the programs for the new shapes. The event
    waits for the thread, so that a run does not depend on the compiler's speed. Without
    a lag the step waits for the compiler. The thread has the mesh of `jax.set_mesh`,
    but no other context of JAX.

    Projections (`Schedule.projections`) change no shapes and have no reports, but their
    time is in `timings`. What happens at a step depends on the step number and the
    state alone, so a run resumed from a saved state repeats the uninterrupted one.
    Ranks that are missing at their event (because another loop ran in between) are
    chosen then.

    An event changes `.params`, `.opt_state`, and the fields of the state named by
    `follow`: trees beside the params such as an average, a target network or the start
    point of a penalty, which are rebased. A tree in old bases, in another field or in
    an argument, is refused before the step. The first call traces the step at full
    rank, by shapes alone, and refuses what would fail at the conversion. The state is
    donated, but not by a call that is refused; `donate_argnums=()` keeps it.

    With `weighing` every cut and projection is weighed by curvature, measured on a few
    batches before they are trained on. Reports then have the rise of the loss, as
    predicted and as measured on the batch of the event.

    A rule with `raise_by` raises ranks too, by the same events. A core gets zeros for
    the directions in which what `directions` shows of its matrix is largest outside of
    both bases, so W does not change.

    Args:     matrices: in execution order, as `find_matrices` and `select` give them.
              due: which of them an update treats, as `stability.when_settled()`; by
              default all are converted and the last executed are truncated first.
              steps_per_call: the number by which one call raises `state.step`.
              directions: of (state, *args), a tree like the dense params: a gradient,
              say. It is computed at events where ranks may go up.
              layout: the sharding of the state, before, after and across events, as
              `layout.initialize` gives it.
              jit: what compiles the step: `jax.jit`, `nnx.jit`, `eqx.filter_jit`,
              which donates by donate="all" alone, or `jax.pmap`, with in_axes=(None, 0)
              and out_axes=None, so that the state has no device axis.
              jit_options: passed to it (static_argnames, donate_argnums, ...).
    Raises:   ValueError: no matrices, `steps_per_call` below 1, or options that `jit`
              does not take; on call, what `factorize`, `truncate` and `due` raise, a
              state, optimizer or step that would fail at the conversion, a tree in the
              bases of before an event, and a step whose `state.step` does not advance
              by `steps_per_call`; at an event, what failed in the background.
              TypeError: the state has no `.step`, ...
    """
    if not matrices:
        raise ValueError("`matrices` is empty: there is nothing to hold in low rank")
    if rule.by == "loss" and weighing is None:
        raise ValueError(
            "a rule with by='loss' weighs directions by curvature: give "
            "adaptive(..., weighing=Weighing(lambda state, *batch: loss(...)))"
        )
    if bool(rule.raise_by) != (directions is not None):
        raise ValueError(
            "to raise ranks give both RankRule(raise_by=...) and adaptive(..., "
            "directions=lambda state, *batch: ...), which shows where to, or none"
        )
    if directions is not None and getattr(jit, "func", jit) is not jax.jit:
        raise ValueError("`directions` need jit=jax.jit: with others it is not built")
    if weighing is not None and getattr(jit, "func", jit) is jax.pmap:
        raise ValueError("`weighing` needs jit=jax.jit: with jax.pmap it is not built")
    if steps_per_call < 1:
        raise ValueError(f"`steps_per_call` must be at least 1, got {steps_per_call}")
    follow = (follow,) if isinstance(follow, str) else tuple(follow)
    for name in follow:
        if name in ("step", "params", "opt_state"):
            raise ValueError(
                f"`follow` names {name!r}: it is for other fields of the state; params "
                "and optimizer state follow an event by themselves"
            )
    return AdaptiveStep(
        step,
        Setup(tx, moment_rule, layout),
        tuple(matrices),
        schedule,
        rule,
        LastExecutedFirst(schedule, rule) if due is None else due,
        steps_per_call,
        follow,
        weighing,
        directions,
        jit,
        options_for(jit, jit_options),
    )


class Timing(NamedTuple):
    """Seconds that the host spent on a decision, event or projection before a step.

    `looking` is the time for the curvature of one batch.

    The steps before it have ended when the clock starts.
    """

    step: int
    choosing: float = 0.0
    waiting: float = 0.0
    surgery: float = 0.0
    looking: float = 0.0


class AdaptiveStep:
    """A compiled training step whose params change shape between calls.

    `reports` has a report of each event of this process, two for a conversion and a
    truncation at one step; `timings` the host's time for decisions and events (without
    the compilation that follows an event without a lag); `compilations` the number of
    times that the step was traced and compiled. They are records and decide nothing.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        setup: Setup,
        matrices: tuple[Matrix, ...],
        schedule: Schedule,
        rule: RankRule,
        due: Chooser,
        steps_per_call: int,
        follow: tuple[str, ...],
        weighing: Weighing | None,
        directions: Callable[..., PyTree] | None,
        jit: Callable[..., Any],
        jit_options: dict[str, Any],
    ) -> None:
        """Use `adaptive`, which checks its arguments."""
        self.reports: list[Report] = []
        self.timings: list[Timing] = []
        self.compilations = 0
        self._matrices = matrices
        self._schedule = schedule
        self._rule = rule
        self._due = due
        self._setup = setup
        self._stride = steps_per_call
        self._follow = follow
        self._step = step
        self._is_checked = False
        self._identities = Identities()
        self._last: tuple[Any, int] = (None, 0)  # the latest `state.step`, its value
        self._thread = ThreadPoolExecutor(1, "compile-ahead")
        self._ahead: Future[None] | None = None

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.compilations += 1  # runs when jit traces, once per set of shapes
            out = step(*args, **kwargs)
            return out if setup.layout is None else _placed(out, setup.layout)

        self._jit_options = getattr(jit, "keywords", {}) | jit_options
        self._wants_arrays = filters(jit)  # and takes shapes for static
        self._jitted = jit(counted, **jit_options)
        self._weighing = weighing
        plain = {k: v for k, v in jit_options.items() if not k.startswith("donate")}
        self._show: Any = None
        if directions is not None:
            self._show = jit(shown(directions, matrices), **plain)
        if weighing is not None:
            look = functools.partial(weighing.statistics, matrices)
            self._look, self._value = jit(look, **plain), jit(weighing.value, **plain)

    def __call__(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """What the step returns: the new state, alone or first in a tuple."""
        state, number = self.before(state, *args, **kwargs)
        sums = self._statistics(state)
        state = _without_sums(state, sums)  # no part of the step: it would compile anew
        event = f"the event at step {self.reports[-1].step}" if self.reports else ""
        state, args, kwargs = self._identities.off(
            (state, args, kwargs), state.params, event or "an event"
        )
        out = self._identities.on(self._jitted(state, *args, **kwargs))
        new_state = out[0] if _is_pair(out) else out
        self.after(new_state.step, number)
        if sums is not None:
            new_state = new_state.replace(curvature=sums)
            out = (new_state, *out[1:]) if _is_pair(out) else new_state
        return out

    def quiet(self, step: Any) -> int | None:
        """The number of a state with this `.step`, if nothing is due before its step.

        None where something is, or where the number is not known yet.
        """
        known, number = self._last
        if known is None or step is not known:
            return None
        previous = number - self._stride
        busy = (
            self._schedule.projected(number, previous)
            or self._schedule.decided(number, previous) is not None
            or self._schedule.due(number, previous) is not None
            or self._looks(number)
        )
        return None if busy else number

    def before(self, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, int]:
        """The state after what is due before its step, and the number of the step.

        Args:     args, kwargs: what the step gets beside the state.
        """
        known, number = self._last
        if known is None or getattr(state, "step", None) is not known:
            self._check(state, args, kwargs)
            number = int(jax.device_get(state.step))  # waits for the device
            self._ahead = None
            ranks = pending_ranks(state.params, state.opt_state)
            if ranks:
                self._compile_ahead(state, number, ranks, args, kwargs)
        previous = number - self._stride
        if self._looks(number):
            state = self._looked(state, number, args, kwargs)
        if self._schedule.projected(number, previous):
            state = self._projection(state, number)
        decided = self._schedule.decided(number, previous)
        due = self._schedule.due(number, previous)
        if due is not None:
            late = decided == due
            state = self._event(state, number, due, args, kwargs, late=late)
        if decided is not None and decided != due:
            state = self._decision(state, number, decided, args, kwargs)
        return state, number

    def after(self, step: Any, number: int) -> None:
        """Note the `.step` of the state that step `number` returned.

        Raises:   ValueError: it has not advanced by `steps_per_call`.
        """
        if self._last[0] is None:
            after = int(jax.device_get(step))
            if after != number + self._stride:
                raise ValueError(
                    f"one call took `state.step` from {number} to {after}; "
                    f"`steps_per_call` is {self._stride}"
                )
        self._last = (step, number + self._stride)

    def check(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """Raise what the first call would; by shapes alone, nothing runs."""
        self._check(state, args, kwargs)

    def _check(self, state: Any, args: Any, kwargs: Any) -> None:
        """What can be said of a state that another call has not returned."""
        check_state(state, self._follow, (args, kwargs))
        self._due.check(state.opt_state, self._rule)
        if self._is_checked:
            return
        if self._weighing is not None and not hasattr(state, "curvature"):
            raise TypeError(
                f"`weighing` keeps sums in the state, and {type(state).__name__} has "
                "no field for them: add `curvature: Any = None` to it"
            )
        if self._statistics(state) is not None:
            state = state.replace(curvature=None)
        named = named_leaves(state.params)
        leaves = [leaf_at(x.path, named, x.axes.shape) for x in self._matrices]
        tx = self._setup.tx
        check_opt_state(state, tx)
        check_optimizer(tx, without_identity(state.params), self._matrices)
        if not all(map(is_low_rank, leaves)):
            rehearse(
                self._step,
                tx,
                self._matrices,
                *without_identity((state, args, kwargs)),
                follow=self._follow,
                rebase=rebase,
                options=self._jit_options,
                multiple=self._rule.multiple,
            )
        self._is_checked = True

    def _after(
        self, state: Any, params: PyTree, opt_state: PyTree, run: Run = NOW
    ) -> Any:
        """The state after an event, and what follows it."""
        trees = {name: getattr(state, name) for name in self._follow}
        trees = followed(trees, state.params, params, self._setup.layout, run)
        return state.replace(params=params, opt_state=opt_state, **trees)

    def _looks(self, number: int) -> bool:
        weighing = self._weighing
        return weighing is not None and weighing.looks(
            self._schedule, number, self._stride
        )

    def _statistics(self, state: Any) -> Statistics | None:
        return None if self._weighing is None else state.curvature

    def _looked(self, state: Any, number: int, args: Any, kwargs: Any) -> Any:
        """The state with the curvature of a batch added to its sums."""
        jax.block_until_ready(state)
        started = time.perf_counter()
        sums = state.curvature
        given = (_without_sums(state, sums), *args)
        given, named = without_identity((given, kwargs))
        new = self._look(*given, **named)
        sums = jax.block_until_ready(new if sums is None else added(sums, new))
        self.timings.append(Timing(number, looking=time.perf_counter() - started))
        return state.replace(curvature=sums)

    def _projection(self, state: Any, number: int) -> Any:
        """The state with its dense matrices cut, and still dense."""
        jax.block_until_ready(state)
        started = time.perf_counter()
        sums = self._statistics(state)
        params = project_to_rank(state.params, self._rule, self._matrices, sums)
        jax.block_until_ready(params)
        self.timings.append(Timing(number, surgery=time.perf_counter() - started))
        return _without_sums(state.replace(params=params), sums)

    def _decision(
        self, state: Any, number: int, update: int, args: Any, kwargs: Any
    ) -> Any:
        """The state with ranks waiting for their event, whose programs compile."""
        jax.block_until_ready(state)  # steps still running are no part of the event
        started = time.perf_counter()
        state, held, cut = self._due(state, update, self._matrices)
        leaves = named_leaves(state.params)
        dense = [x for x in held if not is_low_rank(leaves.get(x.path))]
        if self._rule.by == "loss":  # which leaves some of the treated dense
            dense = [x for x in dense if x not in cut]
        ranks = {x.path: min(x.m, x.n) for x in dense}
        if cut:
            sums = self._statistics(state)
            ranks |= choose(state.params, self._rule, cut, sums)
        opt_state = with_pending(state.params, state.opt_state, ranks)
        state = state.replace(opt_state=opt_state)
        self._compile_ahead(state, number, ranks, args, kwargs)
        self.timings.append(Timing(number, choosing=time.perf_counter() - started))
        return state

    def _compile_ahead(
        self, state: Any, number: int, ranks: dict[str, int], args: Any, kwargs: Any
    ) -> None:
        state, args, kwargs = jax.tree.map(shape_of, (state, args, kwargs))
        decided = self._schedule.decided(number, previous=-1)
        then: tuple[Matrix, ...] = ()
        if not self._due.looks_at_state:
            following = 0 if decided is None else decided + 1
            then = self._due(None, following, self._matrices).cut
        mesh = jax.sharding.get_mesh()  # known to this thread alone
        sums = self._statistics(state)
        state = _without_sums(state, sums)

        def compile_all() -> None:
            with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
                now = without_identity((state, args, kwargs))
                shows = self._shows(now, ranks, AHEAD)
                params, opt_state = compile_ahead(
                    state.params,
                    state.opt_state,
                    self._matrices,
                    ranks,
                    statistics=sums,
                    directions=shows,
                    **self._setup._asdict(),
                )
                new = self._after(state, params, opt_state, AHEAD)
                given = (new, args, kwargs)
                given = bare(given, new.params, "the event that is due")
                if self._wants_arrays:
                    given, now = jax.tree.map(zeros_of, (given, now))
                _compiled(self._jitted, given)
                new_sums = None
                if sums is not None:
                    _compiled(self._value, now)
                    _compiled(self._value, given)
                    out = getattr(_compiled(self._look, given), "out_info", None)
                    new_sums = jax.tree.map(_plain, out)  # filter_jit tells of none
                if new_sums is not None:
                    added.lower(new_sums, new_sums).compile()
                choose(params, self._rule, then, new_sums, AHEAD)

        self._ahead = self._thread.submit(compile_all)

    def _shows(
        self, given: Any, ranks: Mapping[str, int] | None, run: Run = NOW
    ) -> dict[str, Any]:
        """What `directions` shows of the cores whose rank goes up, or may: None."""
        if self._show is None:
            return {}
        state, args, kwargs = given
        nodes = named_leaves(state.params)
        paths = [x.path for x in self._matrices]
        cores = {x: nodes[x] for x in paths if is_low_rank(nodes[x])}
        if ranks is not None:
            cores = {x: y for x, y in cores.items() if ranks.get(x, 0) > y.rank}
        if not cores:
            return {}
        found = run.call(self._show, state, *args, **kwargs)
        return {x: found[x] for x in cores}

    def _event(
        self,
        state: Any,
        number: int,
        update: int,
        args: Any,
        kwargs: Any,
        *,
        late: bool,
    ) -> Any:
        """The state after an event; `late` where its ranks are still to be chosen."""
        jax.block_until_ready(state)
        started = time.perf_counter()
        ranks = {} if late else pending_ranks(state.params, state.opt_state)
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.result()
        waited = time.perf_counter()
        sums = self._statistics(state)
        now = without_identity((_without_sums(state, sums), args, kwargs))
        shows = self._shows(now, ranks or None)
        more = {"statistics": sums, "directions": shows}
        setup = {**self._setup._asdict(), **more}
        params, opt_state = state.params, state.opt_state
        reports: list[Report] = []
        if ranks:
            params, opt_state, reports = apply_ranks(
                params, opt_state, self._matrices, ranks, **setup
            )
        elif late or not self._due.looks_at_state:  # else nothing was due
            state, held, cut = self._due(state, update, self._matrices)
            params, opt_state, reports = apply_rule(
                params, state.opt_state, held, self._rule, cut, **setup
            )
        done = time.perf_counter()
        self.timings.append(
            Timing(number, waiting=waited - started, surgery=done - waited)
        )
        state = _without_sums(self._after(state, params, opt_state), sums)
        actual = None
        if sums is not None and reports:
            old, given, named = now
            values = (
                self._value(x, *given, **named) for x in (old, without_identity(state))
            )
            was, then = (float(jax.device_get(x)) for x in values)
            actual = then - was
        last = len(reports) - 1  # the cut, and not the conversion before it
        self.reports += [
            dataclasses.replace(x, step=number, actual=actual if i == last else None)
            for i, x in enumerate(reports)
        ]
        return state


def _compiled(program: Any, given: Any) -> Any:
    """A jitted program, compiled for its arguments: the lowered one."""
    first, others, named = given
    lowered = program.lower(first, *others, **named)
    lowered.compile()
    return lowered


def _plain(info: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(info.shape, info.dtype)


def _without_sums(state: Any, sums: Statistics | None) -> Any:
    return state if sums is None else state.replace(curvature=None)


def _placed(out: Any, layout: Layout) -> Any:
    """What a step returns, its state where the layout wants it."""
    if not _is_pair(out):
        return layout.constrain(out)
    return (layout.constrain(out[0]), *out[1:])


def _is_pair(out: Any) -> bool:
    """Whether a step returned its state with something else, not the state alone."""
    is_state = hasattr(out, "params") and hasattr(out, "opt_state")
    return isinstance(out, tuple) and not is_state
