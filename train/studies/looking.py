"""What it costs to look at curvature: python -m train.studies.looking [--json FILE].

One batch that is looked at, over one training step of the same network on the same
batch, timed in turn; the memory of both programs, and of the sums. No data is needed.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import oialr_jax as oialr
from train import markdown, process
from train.bench.problem import Problem, Program
from train.bench.settings import Row
from train.bench.timing import command, interleaved


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    models: tuple[str, ...] = ("mini-vit", "resnet18", "mlp")
    """Of train.bench."""
    batch: int = 64
    """Inputs in a batch."""
    fractions: tuple[float, ...] = (1 / 2, 1 / 4)
    """Ranks over the small side of each matrix, beside the dense network."""
    independent_rows: bool = False
    """K-FAC's sums in the place of those of whole examples."""
    repeats: int = 7
    """Rounds; each times one sample of every row."""
    json: pathlib.Path | None = None
    """Where the rows go, with device, versions and date."""


def rows(settings: Settings) -> list[Row]:
    """Host side: a row for each model, dense and at each fraction.

    Raises:   ValueError: an unknown model.
    """
    return [
        row
        for name in settings.models
        for fraction in (None, *settings.fractions)
        for row in _rows(name, fraction, settings)
    ]


def _rows(name: str, fraction: float | None, settings: Settings) -> list[Row]:
    problem = Problem(name, settings.batch, "float32")
    params = problem.params if fraction is None else problem.low_rank(fraction)
    tx = oialr.freeze_bases(problem.optimizer)
    batch = (problem.image, problem.label)
    forward = oialr.factored(problem.forward)
    holder = {"state": problem.state(params, tx)}
    step = Program(problem.train_step(forward), holder, *batch)

    def loss(params: Any, image: Array, rest: Any, key: Array) -> Array:
        logits, _ = problem.forward(params, rest, image)
        label = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return jnp.mean(each)

    look = oialr.curvature(
        loss, problem.matrices, independent_rows=settings.independent_rows
    )
    given = (params, problem.image, problem.rest, jax.random.key(0))
    compiled = jax.jit(look).lower(*given).compile()
    sums = compiled(*given)
    runs: list[Callable[[], Any]] = [
        step.run,
        lambda: jax.block_until_ready(compiled(*given)),
    ]
    (base, *_), (taken, least, most) = interleaved(runs, settings.repeats)
    analysis: Any = compiled.memory_analysis()
    return [
        {
            "model": name,
            "batch": settings.batch,
            "rank_fraction": fraction,
            "step_ms": 1e3 * base,
            "look_ms": 1e3 * taken,
            "look_ms_min": 1e3 * least,
            "look_ms_max": 1e3 * most,
            "ratio": taken / base,
            "step_temp_bytes": step.temp_bytes,
            "look_temp_bytes": int(analysis.temp_size_in_bytes),
            "sums_bytes": sum(np.asarray(x).nbytes for x in jax.tree.leaves(sums)),
            "weights_bytes": 4 * oialr.counts(params).stored,
            "backend": jax.default_backend(),
        }
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown of the rows."""
    head = ["model", "rank", "step, ms", "look, ms", "ratio", "sums over weights"]
    lines = []
    for row in rows:
        rank = row["rank_fraction"]
        cells = [row["model"], "dense" if rank is None else f"{rank:.3g}"]
        cells += [f"{row[x]:.1f}" for x in ("step_ms", "look_ms")]
        share = row["sums_bytes"] / row["weights_bytes"]
        lines.append([*cells, f"{row['ratio']:.2f}", f"{share:.2f}"])
    return markdown.table(head, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    command("train.studies.looking", Settings, rows, table, arguments)


if __name__ == "__main__":
    process.use_huge_pages()
    main()
