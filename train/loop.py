"""The one training loop: it alone turns a step into a run with a record.

Order of operations, for every step t from `state.step` to the last:

1. batch t, which depends on the seed and t alone;
2. the compiled step; a rank event that is due at t happens at its start;
3. the event, if there was one, goes into the record and its table on the screen;
4. every `log_every` steps and after the last: losses are fetched, checked, recorded;
5. every `eval_every` steps and after the last: the test set is evaluated, recorded.

The loop waits for the device in 4 and 5 only, so the host reads ahead between them.
"""

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.training.train_state import TrainState
from tqdm import tqdm

import oialr_jax as oialr

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a run is and how often it says something, in steps."""

    steps: int
    log_every: int
    eval_every: int

    def __post_init__(self) -> None:
        """Refuse what would never step, log or evaluate."""
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")


def train(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]],
    batches: Sequence[Any],
    evaluate: Callable[[Any], Mapping[str, float]],
    *,
    pace: Pace,
    folder: pathlib.Path,
    reports: Sequence[oialr.Report] = (),
) -> tuple[TrainState, Mapping[str, float]]:
    """Host side: the state after the last step, and its evaluation.

    Args:     step: (state, batch) -> (state, metrics), metrics with a "loss".
              batches: item t is the batch of step t.
              evaluate: params -> numbers over the whole test set, with an "accuracy".
              folder: where `metrics.jsonl` is written, by process 0 alone.
              reports: the growing list of rank events of the step.
    Raises:   FloatingPointError: a loss is not finite; names the step, which is the
              number of updates before the bad one.
    """
    first = int(state.step)
    started = time.perf_counter()
    written = len(reports)
    window: list[Mapping[str, Any]] = []
    evaluation: Mapping[str, float] = {}
    view: dict[str, str] = {}

    def record(kind: str, values: Mapping[str, Any]) -> None:
        seconds = round(time.perf_counter() - started, 3)
        append(folder / METRICS, {"kind": kind, **values, "seconds": seconds})

    with tqdm(
        total=pace.steps,
        initial=first,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=jax.process_index() != 0,
    ) as bar:
        for t in range(first, pace.steps):
            state, metrics = step(state, batches[t])
            window.append(metrics)
            for report in reports[written:]:
                now = _fractions(state.params)
                record("event", {"step": t, **now, "event": report.to_dict()})
                bar.write(f"{report}\n")
            written = len(reports)
            done = t + 1
            if done % pace.log_every == 0 or done == pace.steps:
                means = _means(window, done)
                window = []
                record("train", {"step": done, **means, **_fractions(state.params)})
                view |= {"loss": f"{means['loss']:.3f}"}
            if done % pace.eval_every == 0 or done == pace.steps:
                evaluation = dict(evaluate(state.params))
                record("eval", {"step": done, **evaluation})
                view |= {"test": f"{evaluation['accuracy']:.2%}"}
            bar.set_postfix(view, refresh=False)
            bar.update()
    return state, evaluation


def append(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Host side: one JSON line at the end of `path`; process 0 alone writes."""
    if jax.process_index() == 0:
        with path.open("a") as stream:
            stream.write(json.dumps(values, allow_nan=False) + "\n")


def begin(folder: pathlib.Path) -> None:
    """Host side: an empty record in `folder`, and no summary of an older run."""
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS).write_text("")
        (folder / SUMMARY).unlink(missing_ok=True)


def finish(folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Host side: the result of the run, as `summary.json`."""
    if jax.process_index() == 0:
        text = json.dumps(summary, indent=2, allow_nan=False)
        (folder / SUMMARY).write_text(text + "\n")


def _means(window: Sequence[Mapping[str, Any]], done: int) -> dict[str, float]:
    """Means over the last steps, once every loss among them is known to be finite."""
    values = jax.device_get(list(window))
    for i, each in enumerate(values):
        if not math.isfinite(each["loss"]):
            raise FloatingPointError(
                f"the loss is {each['loss']} at step {done - len(values) + i}; the run "
                "stops here. A lower learning rate or gradient clipping may help"
            )
    return {
        name: float(np.mean([each[name] for each in values], dtype=np.float64))
        for name in values[0]
    }


def _fractions(params: Any) -> dict[str, float]:
    count = oialr.counts(params)
    return {
        "stored_fraction": count.stored / count.dense,
        "trainable_fraction": count.trainable / count.dense,
    }
