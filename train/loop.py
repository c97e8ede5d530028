"""The one training loop: it alone turns a step into a run with a record.

Order of operations, for every step t from `state.step` to the last:

1. batch t, which depends on the seed and t alone;
2. the compiled step; a rank event that is due at t happens at its start;
3. the event, if there was one, goes into the record and its table on the screen;
   then, where bases are tracked, every so many steps how far they have moved is
   computed, and recorded by the next of 2, where it has an event, 4, 5 and 6;
4. every `log_every` steps and after the last: losses are fetched, checked, recorded;
5. every `eval_every` steps and after the last: the test set is evaluated, recorded,
   and where it has not become better for too long the run is over; a number that is
   not finite is no better than any, null in the record and named on the screen;
6. every `save_every` steps, after the last, and when asked to stop: a checkpoint, with
   the length of the record, so that a resumed run cuts it there and writes on.

The loop waits for the device in 4, 5 and 6, and events do. Between them the host reads
ahead, at most `AHEAD` steps: so many batches are held, and a stop waits for no more.
"""

import dataclasses
import math
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import jax
import numpy as np
from flax.training.train_state import TrainState
from jax.experimental import multihost_utils
from tqdm import tqdm

import oialr_jax as oialr
from oialr_jax.reports import Report
from train import files
from train.tracking import Tracking

AHEAD = 2
"""Steps that wait for the device, the running one with them."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a run is and how often it says and saves something, in steps."""

    steps: int
    log_every: int
    eval_every: int
    save_every: int

    def __post_init__(self) -> None:
        """Refuse what would never step, log, evaluate or save."""
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True)
class Goal:
    """Which number of an evaluation counts, and when to give up."""

    metric: str = "accuracy"
    """Its name."""
    best: Literal["max", "min"] = "max"
    """Which end of it is good."""
    patience: int | None = None
    """So many evaluations without a better one end the run; by default none do."""
    since: int = 0
    """Evaluations up to this step count for nothing: what is evaluated is another
    network, still dense."""

    def __post_init__(self) -> None:
        """Refuse a run that would end before its first evaluation."""
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"`patience` must be at least 1, got {self.patience}")

    def prefers(self, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
        """Whether an evaluation is better than another, or than none.

        One that is not finite is no better than none.
        """
        if not old or not math.isfinite(new[self.metric]):
            return math.isfinite(new[self.metric])
        a, b = new[self.metric], old[self.metric]
        return a > b if self.best == "max" else a < b


@dataclasses.dataclass(frozen=True)
class Progress:
    """What of a run is neither in its state nor a function of the step."""

    bytes: int = 0
    """Length of the record."""
    seconds: float = 0.0
    """Time trained so far."""
    window: Sequence[Mapping[str, float]] = ()
    """Metrics of the steps since the last line about training."""
    evaluation: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The last evaluation."""
    best: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The best one, with its `step`."""
    waited: int = 0
    """Evaluations since then."""
    fetching: float = 0.0
    """Seconds the host spent on reading batches."""
    flops: int = 0
    """Of all steps so far, in their matrices."""


class StoppedError(Exception):
    """A run that was asked to stop has saved and stopped before `step`."""

    def __init__(self, step: int, steps: int) -> None:
        """Before which step of how many."""
        self.step, self.steps = step, steps
        super().__init__(f"stopped before step {step} of {steps}; it is saved")


class Interrupts:
    """Whether this run was asked to stop: by SIGTERM, or by SIGINT once.

    A second SIGINT quits at once. Of several processes each is asked by JAX's own
    service, which has SIGTERM there and finds a step before which all of them stop.
    Outside the main thread signals cannot be had and nothing ever asks.
    """

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT]
            if jax.process_count() == 1:
                numbers.append(signal.SIGTERM)
            for number in numbers:
                self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        del frame
        if number == signal.SIGINT and self.asked:
            os._exit(128 + number)
        self.asked = True
        print("\nstopping after this step, with a checkpoint", file=sys.stderr)
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step, the same in all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked


class _Run:
    """A run that goes on: what `Progress` saves of it, and what waits to be written."""

    def __init__(
        self,
        params: Any,
        first: int,
        progress: Progress,
        record: pathlib.Path,
        goal: Goal,
        reports: Sequence[Report],
        tracking: Tracking | None,
        flops: Callable[[Any], int],
    ) -> None:
        self.path, self.goal, self.flops = record, goal, flops
        self.started = time.perf_counter() - progress.seconds
        self.window: list[Mapping[str, Any]] = list(progress.window)
        self.evaluation, self.best = progress.evaluation, progress.best
        self.waited, self.fetching = progress.waited, progress.fetching
        self.work, self.each = progress.flops, flops(params)
        self.reports, self.written = reports, len(reports)
        self.tracking = tracking
        self.followed = None if tracking is None else tracking.start(params, first)
        self.moved: list[tuple[int, Callable[[], Mapping[str, Any]]]] = []
        self.view: dict[str, str] = {}

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        seconds = round(time.perf_counter() - self.started, 3)
        files.append(self.path, {"kind": kind, **values, "seconds": seconds})

    def record_moved(self) -> None:
        for done, numbers in self.moved:
            self.record("stability", {"step": done, **numbers()})
        self.moved.clear()

    @property
    def hopeless(self) -> bool:
        return self.goal.patience is not None and self.waited >= self.goal.patience

    def stepped(
        self, t: int, metrics: Mapping[str, Any], params: Any, bar: Any
    ) -> None:
        """Steps 2 and 3, with the event of this step if there was one."""
        self.window.append(metrics)
        if self.reports[self.written :]:
            self.each = self.flops(params)
        self.work += self.each
        for report in self.reports[self.written :]:
            now = _fractions(params)
            self.record("event", {"step": t, **now, "event": report.to_dict()})
            if jax.process_index() == 0:
                bar.write(f"{report}\n")
        self.written = len(self.reports)
        if self.tracking is not None and (t + 1) % self.tracking.every == 0:
            self.followed, numbers = self.tracking.compare(self.followed, params, t + 1)
            self.moved.append((t + 1, numbers))

    def log(self, params: Any, done: int) -> None:
        """Step 4, of numbers that are on the host."""
        means, self.window = _means(self.window), []
        self.record("train", {"step": done, **means, **_fractions(params)})
        self.view["loss"] = f"{means['loss']:.3f}"

    def evaluated(self, found: Mapping[str, float], done: int, bar: Any) -> None:
        """Step 5."""
        self.evaluation = dict(found)
        if done > self.goal.since:
            better = self.goal.prefers(found, self.best)
            self.best = {"step": done, **found} if better else self.best
            self.waited = 0 if better else self.waited + 1
        else:
            self.waited = 0
        self.record("eval", {"step": done, **found})
        bad = [name for name, x in found.items() if not math.isfinite(x)]
        if bad and jax.process_index() == 0:
            bar.write(f"step {done}: {', '.join(bad)} of the evaluation not finite")
        self.view[self.goal.metric] = f"{found[self.goal.metric]:.4f}"

    def progress(self) -> Progress:
        """What step 6 saves."""
        return Progress(
            bytes=files.length(self.path),
            seconds=time.perf_counter() - self.started,
            window=self.window,
            evaluation=self.evaluation,
            best=self.best,
            waited=self.waited,
            fetching=self.fetching,
            flops=self.work,
        )


def train(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]],
    batch: Callable[[int], Any],
    evaluate: Callable[[Any], Mapping[str, float]],
    *,
    pace: Pace,
    goal: Goal = Goal(),
    folder: pathlib.Path,
    checkpoints: oialr.Checkpoints,
    settings: Mapping[str, Any],
    interrupts: Interrupts,
    progress: Progress = Progress(),
    reports: Sequence[Report] = (),
    tracking: Tracking | None = None,
    flops: Callable[[Any], int] = lambda params: 0,
) -> tuple[TrainState, Progress]:
    """Host side: the state after the last step, and how the run went.

    Args:     step: (state, batch) -> (state, metrics), metrics with a "loss".
              batch: the batch of a step.
              evaluate: state -> numbers over the whole test set; `goal`: the best one.
              folder: where `metrics.jsonl` is written, by process 0 alone.
              checkpoints: every process calls it; `settings` go into each.
              interrupts: of the program, entered before whatever takes time.
              progress: that of the checkpoint from which `state` was restored.
              reports: the growing list of rank events of the step.
              tracking: which bases to follow, if any; of a resumed run from here on.
              flops: of a step with these params.
    Raises:   FloatingPointError: a loss is not finite; names the step, which is the
              number of updates before the bad one. StoppedError: a signal asked for it.
    """
    first, path = int(state.step), folder / files.METRICS
    run = _Run(state.params, first, progress, path, goal, reports, tracking, flops)
    with _bar(first, pace.steps) as bar:
        for t in range(first, pace.steps):
            if run.hopeless:
                break
            before = time.perf_counter()
            values = batch(t)
            run.fetching += time.perf_counter() - before
            if tracking is not None and tracking.alone(t):
                run.record_moved()
            state, metrics = step(state, values)
            run.stepped(t, metrics, state.params, bar)
            jax.block_until_ready(run.window[-1 - AHEAD : -AHEAD])
            done = t + 1
            logged, evaluated, saved = (
                done % every == 0 or done == pace.steps
                for every in (pace.log_every, pace.eval_every, pace.save_every)
            )
            stop = interrupts.reached(t)
            if logged or evaluated or saved or stop:
                run.record_moved()
                run.window = _on_host(run.window, done)
            if logged:
                run.log(state.params, done)
            if evaluated:
                run.evaluated(evaluate(state), done, bar)
            if saved or stop or (evaluated and run.hopeless):
                progress = run.progress()
                counts = evaluated and done > goal.since
                checkpoints.save(
                    state,
                    {"progress": files.nulled(progress), "settings": settings},
                    metric=run.evaluation[goal.metric] if counts else None,
                )
            bar.set_postfix(run.view, refresh=False)
            bar.update()
            if stop and done < pace.steps:
                checkpoints.wait()
                raise StoppedError(done, pace.steps)
    checkpoints.wait()
    return state, progress


def _bar(first: int, steps: int) -> Any:
    return tqdm(
        total=steps,
        initial=first,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=jax.process_index() != 0,
    )


def _on_host(
    window: Sequence[Mapping[str, Any]], done: int
) -> list[Mapping[str, float]]:
    """Metrics of the last steps as numbers, once every loss is known to be finite."""
    values: list[Mapping[str, float]] = [
        {name: math.nan if x is None else float(x) for name, x in each.items()}
        for each in jax.device_get(list(window))
    ]
    for i, each in enumerate(values):
        if not math.isfinite(each["loss"]):
            raise FloatingPointError(
                f"the loss is {each['loss']} at step {done - len(values) + i}; the run "
                "stops here. A lower learning rate or gradient clipping may help"
            )
    return values


def _means(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        name: float(np.mean([each[name] for each in window], dtype=np.float64))
        for name in window[0]
    }


def _fractions(params: Any) -> dict[str, float]:
    count = oialr.counts(params)
    return {
        "stored_fraction": count.stored / count.dense,
        "trainable_fraction": count.trainable / count.dense,
    }
