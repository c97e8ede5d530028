"""What exported programs cost to run, beside the dense network: python -m train.serve.

Command:   python -m train.serve --json serve.json
Hardware:  two CPU cores, otherwise idle; wall time 10 minutes

The mini-ViT with random bases is exported in every form and rank asked for, and each
program is called in turn with the dense network in JAX: medians of `repeats` rounds,
the ratio to dense, what weights and temporary arrays take in memory, the size of the
file, and the largest difference to the training form over the largest output.
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import oialr_jax as oialr
from oialr_jax.export import Exported
from train import process
from train.bench.problem import Problem
from train.bench.timing import command, interleaved

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which programs are timed."""

    model: str = "mini-vit"
    """As in `train.bench`."""
    ranks: tuple[float, ...] = (0.125, 0.25, 0.5, 0.6, 0.75, 1.0)
    """Parts of each short side, in auto form and float32."""
    rank: float = 0.25
    """The one at which the other forms are timed."""
    forms: tuple[str, ...] = (
        "identity/float32",
        "factors/bfloat16",
        "core/int8",
        "dense/float32",
    )
    """FORM/DTYPE each."""
    batches: tuple[int, ...] = (1, 64)
    """Images in a call."""
    repeats: int = 5
    """Rounds."""
    json: pathlib.Path | None = None
    """Where the rows go."""


def run(settings: Settings) -> list[Row]:
    """Host side: a row for each program and batch, the dense network first.

    Raises:   ValueError: an unknown model, form or dtype.
    """
    problem = Problem(settings.model, max(settings.batches), "float32")

    def forward(params: Any, image: Any) -> Any:
        return problem.forward(params, problem.rest, image)[0]

    wanted = [(part, "auto", "float32") for part in settings.ranks]
    for entry in settings.forms:
        form, _, dtype = entry.partition("/")
        wanted.append((settings.rank, form, dtype))
    rows: list[Row] = []
    programs: list[tuple[Row, Exported]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (part, form, dtype) in enumerate(wanted):
            low = problem.low_rank(part)
            program = oialr.export(
                pathlib.Path(folder, str(i)),
                forward,
                low,
                problem.image,
                form=form,
                dtype=dtype,
            )
            few = problem.image[:2]
            desired = np.asarray(jax.jit(oialr.factored(forward))(low, few))
            error = np.max(np.abs(program(few) - desired)) / np.max(np.abs(desired))
            weights = sum(x.nbytes for x in program.arrays.values())
            row = {
                "rank": part,
                "form": form,
                "dtype": dtype,
                "difference": float(error),
                "stored_weights": program.manifest["numbers"]["stored"],
                "dense_weights": program.manifest["numbers"]["dense"],
                "weights_mb": weights / 1e6,
                "file_mb": program.manifest["files"]["weights.safetensors"]["bytes"]
                / 1e6,
                "program_mb": program.manifest["files"]["program.stablehlo"]["bytes"]
                / 1e6,
            }
            print(json.dumps(row), flush=True)
            programs.append((row, program))
    for batch in settings.batches:
        rows += timed(problem, forward, programs, batch, settings.repeats)
    return rows


def timed(
    problem: Problem,
    forward: Callable[..., Any],
    programs: Sequence[tuple[Row, Exported]],
    batch: int,
    repeats: int,
) -> list[Row]:
    """Host side: the rows of one batch size, all timed in turn."""
    image = problem.image[:batch]
    dense = jax.jit(forward).lower(problem.params, image).compile()
    compiled = [dense, *(x.compiled(image) for _, x in programs)]
    given: list[tuple[Any, ...]] = [(problem.params, image)]
    given += [(x.weights, image) for _, x in programs]

    def call(program: Any, args: tuple[Any, ...]) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(program(*args))

    times = interleaved(
        [call(x, args) for x, args in zip(compiled, given, strict=True)], repeats
    )
    whole = sum(x.nbytes for x in jax.tree.leaves(problem.params)) / 1e6
    first = {
        "rank": None,
        "form": "JAX, dense",
        "dtype": "float32",
        "weights_mb": whole,
    }
    rows = []
    for row, program, (median, least, most) in zip(
        [first, *(row for row, _ in programs)], compiled, times, strict=True
    ):
        analysis: Any = program.memory_analysis()
        rows.append(
            row
            | {
                "batch": batch,
                "ms": 1e3 * median,
                "least_ms": 1e3 * least,
                "most_ms": 1e3 * most,
                "images_per_second": batch / median,
                "ratio": median / times[0][0],
                "temporary_mb": analysis.temp_size_in_bytes / 1e6,
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, a line for each program with both batches."""
    sizes = list(dict.fromkeys(x["batch"] for x in rows))
    head = [f"batch {b}, ms | / dense | temporary MB" for b in sizes]
    lines = [f"| rank | form | {' | '.join(head)} | file MB | difference |"]
    lines.append("| --- " * (4 + 3 * len(sizes)) + "|")
    count = len(rows) // len(sizes)
    for i in range(count):
        each = [rows[i + count * j] for j in range(len(sizes))]
        row = each[0]
        name = row["form"] + ("" if row["dtype"] == "float32" else f", {row['dtype']}")
        cells = [
            f"{x['ms']:.1f} ({x['least_ms']:.1f} to {x['most_ms']:.1f}) | "
            f"{x['ratio']:.2f} | {x['temporary_mb']:.1f}"
            for x in each
        ]
        file = f"{row['file_mb']:.1f}" if "file_mb" in row else ""
        error = f"{row['difference']:.0e}" if "difference" in row else ""
        rank = "" if row["rank"] is None else f"{row['rank']:g}"
        lines.append(f"| {rank} | {name} | {' | '.join(cells)} | {file} | {error} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    command("train.serve", Settings, run, table, arguments)


if __name__ == "__main__":
    process.use_huge_pages()
    main()
