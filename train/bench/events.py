"""The suite events: what conversion and truncations cost, and how long steps stall."""

import statistics
import time

import jax

import oialr_jax as oialr
from train.bench.problem import Problem
from train.bench.settings import Row, Settings, read_rates
from train.bench.timing import compile_times, covered

LADDER = 0.95
"""Cutoff at which random cores halve at every event, which `max_drop` allows."""


AROUND = 3
"""Steps after an event that still count as its stall."""


LADDER_EVENTS = 4
"""Conversion to half the ranks, then three more halvings."""


def events(settings: Settings) -> list[Row]:
    """Host side: a row for each event of a run that halves all ranks again and again.

    `stall_ms` is what the steps from the choice of ranks to `AROUND` steps after the
    event took beyond as many ordinary ones (medians of the steps before and after);
    `event_ms` the part of the host in it (singular values, SVDs, turning the state),
    `compile_ms` what tracing and compiling took meanwhile, in any thread and not
    counted in `event_ms`. Once without a lag, where the step waits for the compiler,
    and once with it.
    """
    rows = []
    for lag in dict.fromkeys((0, settings.lag)):
        rows += _events(settings, lag)
    return rows


def _events(settings: Settings, lag: int) -> list[Row]:
    problem = Problem(settings.models[0], settings.batch, settings.dtype)
    tx = oialr.freeze_bases(problem.optimizer)
    every = max(20, 2 * lag)
    schedule = oialr.Schedule(delay=every // 2, every=every, layer_step=1.0, lag=lag)
    forward = oialr.factored(problem.forward, rates=read_rates(settings.rates))
    step = oialr.adaptive(
        problem.train_step(forward),
        tx,
        problem.matrices,
        schedule,
        oialr.RankRule(cutoff=LADDER, multiple=8),
    )
    state = problem.state(problem.params, tx)
    steps = schedule.delay + LADDER_EVENTS * every
    times, compiling, counts = [], [], []
    with compile_times() as log:
        for _ in range(steps):
            before = covered(log, main=True) + covered(log, main=False)
            start = time.perf_counter()
            state, metrics = step(state, problem.image, problem.label)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
            after_step = covered(log, main=True) + covered(log, main=False)
            compiling.append(after_step - before)
            counts.append(step.compilations)
    bound = schedule.compilations(steps)
    if step.compilations > bound:
        raise ValueError(f"{step.compilations} compilations, more than {bound}")
    rows = []
    for chosen in range(schedule.delay, steps, every):
        event = chosen + lag
        end = event + AROUND
        before = statistics.median(times[max(2, chosen - every // 3) : chosen])
        after = statistics.median(times[end : chosen + every])
        usual = (event - chosen) * before + (end - event) * after
        mine = [x for x in step.timings if chosen <= x.step <= event]
        host = sum(x.choosing + x.surgery for x in mine)
        stall = sum(times[chosen:end]) - usual
        rows.append(
            {
                "model": settings.models[0],
                "batch": settings.batch,
                "lag": lag,
                "step": event,
                "step_ms": 1e3 * before,
                "step_after_ms": 1e3 * after,
                "choosing_ms": 1e3 * sum(x.choosing for x in mine),
                "waiting_ms": 1e3 * sum(x.waiting for x in mine),
                "event_ms": 1e3 * host,
                "stall_ms": 1e3 * stall,
                "stall_steps": stall / before,
                "compile_ms": 1e3 * sum(compiling[chosen:end]),
                "compilations": counts[end - 1] - counts[chosen - 1],
                "share_of_500_steps": host / (500 * after),
                "backend": jax.default_backend(),
            }
        )
    return rows
