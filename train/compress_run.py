"""Compress a trained dense run: python -m train.compress run RUN --keep 0.4.

The matrices of the latest checkpoint are cut until they store `keep` of their weights,
`plain` by their singular values and `curvature` by what each direction is worth in the
run's loss; `tuned` is the second after a few updates of its cores. OUT/summary.json has
the evaluation of each, and OUT/checkpoints the last: `python -m train.export OUT`.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tyro
from jaxtyping import Array

import oialr_jax as oialr
from oialr_jax.matrices import Matrix
from oialr_jax.surgery import apply_rule
from oialr_jax.weighted import Statistics
from train import export, files, recipe
from train.tuning import tuned


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which run is compressed, and how far."""

    run: tyro.conf.Positional[pathlib.Path]
    """Folder of a run that has ended."""
    keep: float = 0.5
    """Part of the matrices' weights that is stored: both bases and the core."""
    out: pathlib.Path | None = None
    """Where summary.json and the checkpoint go; by default RUN-compressed."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where `python -m train.data.prepare` put the dataset."""
    batches: int = 16
    """From which curvature is taken."""
    steps: int = 0
    """Updates of the cores, 0 for none."""
    learning_rate: float = 1e-3
    """At its highest."""
    seed: int = 0
    """Of noise in the loss."""


def run(settings: Settings) -> dict[str, Any]:
    """Host side: compress, evaluate, write the summary, which it gives.

    Raises:   ValueError: `keep` outside (0, 1), no batches, a run in low rank, no
              matrix to cut, OUT is there already. FileNotFoundError: there is no run.
    """
    if not 0 < settings.keep < 1:
        raise ValueError(f"`keep` must be in (0, 1), got {settings.keep}")
    if settings.batches < 1:
        raise ValueError(f"`batches` must be at least 1, got {settings.batches}")
    settings = files.with_paths_expanded(settings)
    usual = settings.run.absolute()
    out = settings.out or usual.with_name(f"{usual.name}-compressed")
    if files.writable(out).exists():
        raise ValueError(f"{out} is there already: name another --out")
    opened = export.opened(settings.run, settings.data_dir)
    if oialr.ranks(opened.variables["params"]):
        raise ValueError(
            f"{settings.run} is in low rank already: compress a dense run, --method "
            "dense; python -m train.export writes this one"
        )
    summary, state = _compressed(opened, settings)
    with oialr.Checkpoints(out / files.CHECKPOINTS) as checkpoints:
        checkpoints.save(state, {"settings": opened.stored})
    files.finish(out, summary)
    return summary


def _compressed(
    opened: export.Opened, settings: Settings
) -> tuple[dict[str, Any], recipe.State]:
    start = time.perf_counter()
    task, begun = opened.task, opened.begun
    extra = {k: x for k, x in opened.variables.items() if k != "params"}
    params, matrices = opened.variables["params"], begun.matrices
    if not matrices:
        raise ValueError(f"{settings.run} has no matrix for which low rank pays")
    key = jax.random.key(settings.seed)
    dense = sum(x.weights() for x in matrices)
    budget = int(settings.keep * dense)
    summary: dict[str, Any] = {
        "run": settings.run.name,
        "keep": settings.keep,
        "dense_weights": oialr.counts(params).dense,
        "labels": "empirical" if task.drawn is None else "drawn",
    }

    def evaluated(name: str, low: Any) -> None:
        found = export.evaluated(task, {"params": low, **extra})
        stored = oialr.counts(low).stored
        summary[name] = {**found, "stored_weights": stored}
        shown = ", ".join(f"{k} {x:.4g}" for k, x in found.items())
        print(f"{name}: {shown}, {stored} weights", flush=True)

    evaluated("dense", params)
    rule = oialr.RankRule(budget=budget)
    low, *_ = apply_rule(params, None, matrices, rule, matrices, tx=None)
    evaluated("plain", low)
    sums = _looked(task, params, extra, matrices, key, settings.batches)
    low, cuts = oialr.compress(params, matrices, sums, budget)
    summary["predicted"] = sum(x.rise for x in cuts)
    summary["ranks"] = {x.path: x.rank for x in cuts}
    evaluated("curvature", low)
    if settings.steps:
        steps, rate = settings.steps, settings.learning_rate

        def loss(params: Any, extra: Any, batch: Any, key: Array) -> Array:
            return begun.loss(params, extra, batch, key)[0]

        batches = (
            (extra, task.batch(t), jax.random.fold_in(key, t)) for t in range(steps)
        )
        low, _ = tuned(loss, low, batches, rate, steps)
        evaluated("tuned", low)
    summary["seconds"] = time.perf_counter() - start
    state = recipe.State.create(
        apply_fn=begun.loss, params=low, tx=begun.tx, extra=extra
    )
    return summary, state.replace(step=jax.numpy.asarray(0, jax.numpy.int32))


def _looked(
    task: recipe.Task,
    params: Any,
    extra: Mapping[str, Any],
    matrices: Sequence[Matrix],
    key: Array,
    batches: int,
) -> Statistics:
    """Host side: the curvature of some batches."""

    def loss(params: Any, batch: Any, extra: Any, key: Array) -> Array:
        if task.drawn is not None:
            return task.drawn(params, extra, batch, key)
        return task.loss(params, extra, batch, key)[0]

    terms = task.terms
    given = None if terms is None else lambda batch, *_: terms(batch)
    look = jax.jit(oialr.curvature(loss, matrices, terms=given))
    sums = (
        look(params, task.batch(t), extra, jax.random.fold_in(key, t))
        for t in range(batches)
    )
    return functools.reduce(Statistics.add, sums)
