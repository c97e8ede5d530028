"""The suite tracking: what a record of its bases costs the preset digits."""

import statistics
import time
from typing import Any

import jax
from jaxtyping import Array

import oialr_jax as oialr
from train import images
from train.bench.problem import Program, State
from train.bench.settings import Row, Settings
from train.settings import optimizer
from train.tracking import Tracking

STRETCH = 5
"""Steps that are timed with and without a record: a longer time varies by more."""


def tracking(settings: Settings) -> list[Row]:
    """Host side: what a record every epoch costs the preset `digits`, by its kind.

    The run is dense, or at a quarter of all ranks. `record_ms` is what `STRETCH` steps
    with a record take beyond those before them without, the median over the rounds, and
    `share` its part of an epoch; the kind "all" is the mean over the records of a run,
    of which few are detailed.
    """
    return [row for low in (False, True) for row in _tracking(settings, low)]


def _tracking(settings: Settings, low: bool) -> list[Row]:
    preset = images.PRESETS["digits"][1]
    task = images.task(preset)
    noise = jax.random.key(1)
    params = task.init(jax.random.key(0))["params"]
    found = oialr.find_matrices(task.loss, params, {}, task.batch(0), noise)
    tx = oialr.freeze_bases(optimizer(preset, found))
    opt_state = tx.init(params)
    if low:
        ranks = {x.path: max(1, min(x.m, x.n) // 4) for x in found}
        params, opt_state, _ = oialr.factorize(
            params, opt_state, found, tx=tx, rank=ranks
        )
    loss = oialr.factored(task.loss)

    def step(state: State, image: Array, label: Array) -> tuple[State, Any]:
        grad = oialr.value_and_grad(loss, has_aux=True)
        batch = {"image": image, "label": label}
        (value, _), grads = grad(state.params, {}, batch, noise)
        return state.apply_gradients(grads=grads), {"loss": value}

    state = State.create(apply_fn=None, params=params, tx=tx, rest=None)
    holder = {"state": state.replace(opt_state=opt_state)}
    first = task.batch(0)
    program = Program(step, holder, first["image"], first["label"])
    steps = round(task.epoch)
    follow = Tracking(found, every=steps, steps=preset.steps, epoch=task.epoch)
    held = {"followed": follow.start(params, 0), "t": 0}

    def train(record: int | None = None) -> None:
        """Write the record after that many epochs, if any, while training a while."""
        numbers = None
        if record is not None:
            held["followed"], numbers = follow.compare(
                held["followed"], holder["state"].params, record * steps
            )
        for _ in range(STRETCH):
            batch = task.batch(held["t"])
            held["t"] += 1
            holder["state"], metrics = program.compiled(
                holder["state"], batch["image"], batch["label"]
            )
        if numbers is not None:
            numbers()
        jax.block_until_ready(metrics)

    points = range(1, preset.steps // steps + 1)
    detailed = [x for x in points if follow.is_detailed(x * steps)]
    plain = next(x for x in points if x not in detailed)
    kinds = {"usual": plain, "detailed": detailed[0]}
    extra: dict[str, list[float]] = {kind: [] for kind in kinds}
    without = []
    for i in range(settings.repeats + 1):  # the first round compiles
        for kind, record in kinds.items():
            start = time.perf_counter()
            train()
            between = time.perf_counter()
            train(record)
            end = time.perf_counter()
            if i:
                without.append(between - start)
                extra[kind].append(end - 2 * between + start)
    often = len(detailed) / len(points)
    took = {kind: statistics.median(values) for kind, values in extra.items()}
    took["all"] = (1 - often) * took["usual"] + often * took["detailed"]
    base = statistics.median(without) * steps / STRETCH
    return [
        {
            "what": "digits, a quarter of the ranks" if low else "digits, dense",
            "record": kind,
            "epoch_ms": 1e3 * base,
            "record_ms": 1e3 * taken,
            "share": taken / base,
            "backend": jax.default_backend(),
        }
        for kind, taken in took.items()
    ]
