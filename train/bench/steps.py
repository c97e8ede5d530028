"""The suite steps: a training step dense, in low rank in every order, and of peers."""

from typing import Any

import jax

import oialr_jax as oialr
from train import names
from train.bench.peers import PEERS, compares
from train.bench.problem import Problem, Program
from train.bench.settings import Row, Settings, read_rates
from train.bench.timing import interleaved


def steps(settings: Settings) -> list[Row]:
    """Host side: a row for each model, rank fraction and order or peer.

    Where two orders give the same program (auto and the order that it picked for every
    matrix) it is timed once and has two rows.

    Raises:   ValueError: an unknown model or peer, or a peer for none of the models.
    """
    for peer in settings.peers:
        names.find("peer", peer, PEERS)
        if not any(compares(peer, name) for name in settings.models):
            raise ValueError(
                f"{peer} is for vision transformers alone, not {settings.models}"
            )
    return [row for name in settings.models for row in of_model(name, settings)]


def of_model(name: str, settings: Settings) -> list[Row]:
    """Host side: the rows of one model."""
    problem = Problem(name, settings.batch, settings.dtype)
    rates = read_rates(settings.rates)
    batch = (problem.image, problem.label)
    tx = oialr.freeze_bases(problem.optimizer)
    dense = {"state": problem.state(problem.params, tx)}
    programs = {"dense": Program(problem.train_step(problem.forward), dense, *batch)}
    labels: list[tuple[float, str, float | None, str]] = [(1.0, "dense", 1.0, "dense")]
    for fraction in settings.fractions:
        params = problem.low_rank(fraction)
        holder = {"state": problem.state(params, tx)}
        for order in settings.orders:
            options: Any = {"order": None if order == "auto" else order, "rates": rates}
            told = oialr.explain(
                problem.forward, params, problem.rest, problem.image, **options
            )
            key = f"{fraction} {[line.order for line in told.lines]}"
            if key not in programs:
                forward = oialr.factored(problem.forward, **options)
                step = problem.train_step(forward)
                programs[key] = Program(step, holder, *batch)
            labels.append((fraction, order, told.flops / told.dense_flops, key))
        for peer in settings.peers:
            if not compares(peer, name):
                continue
            key = f"{fraction} {peer}"
            programs[key] = PEERS[peer](problem, fraction)
            labels.append((fraction, peer, None, key))
    times = interleaved([x.run for x in programs.values()], settings.repeats)
    by_key = dict(zip(programs, times, strict=True))
    base, *_ = by_key["dense"]
    rows = []
    for fraction, order, share, key in labels:
        middle, least, most = by_key[key]
        rows.append(
            {
                "model": name,
                "batch": settings.batch,
                "dtype": settings.dtype,
                "rank_fraction": fraction,
                "order": order,
                "step_ms": 1e3 * middle,
                "step_ms_min": 1e3 * least,
                "step_ms_max": 1e3 * most,
                "ratio_to_dense": middle / base,
                "flops_ratio": share,
                "temp_bytes": programs[key].temp_bytes,
                "state_bytes": programs[key].state_bytes,
                "backend": jax.default_backend(),
            }
        )
    return rows
