"""What storage dtypes cost in accuracy: python -m train.studies.storage RUN...

Command:   python -m train.studies.storage runs/digits-oialr-* --json storage.json

Each finished run is written in every form asked for and read back. The numbers are of
the test set: of what the file holds, beside those of the run. `lost` is by how much the
run's own metric is worse, in its unit.
"""

import dataclasses
import json
import pathlib
import re
import tempfile
from collections.abc import Sequence

import numpy as np
import tyro

from oialr_jax.export.manifest import WEIGHTS
from train import export
from train.bench.settings import Row
from train.bench.timing import command


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which runs are written, and how."""

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    """Folders of finished runs."""
    forms: tuple[str, ...] = (
        "dense/float32",
        "factors/float32",
        "factors/bfloat16",
        "factors/float16",
        "core/int8",
    )
    """FORM/DTYPE each, as of `python -m train.export`."""
    batch: int = 64
    """Of the example by which orders are chosen."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where `python -m train.data.prepare` put the datasets."""
    json: pathlib.Path | None = None
    """Where the rows go."""


def run(settings: Settings) -> list[Row]:
    """Host side: a row for each run and form.

    Raises:   ValueError: no runs, or what `train.export` raises.
    """
    if not settings.runs:
        raise ValueError("name the folders of finished runs, as runs/digits-oialr-*")
    rows: list[Row] = []
    for folder in settings.runs:
        found = export.opened(folder, settings.data_dir)
        goal = found.task.goal
        before = export.evaluated(found.task, found.variables)[goal.metric]
        for entry in settings.forms:
            form, _, dtype = entry.partition("/")
            with tempfile.TemporaryDirectory() as place:
                new = pathlib.Path(place, "export")
                written = export.written(found, new, form, dtype, settings.batch)
                after = export.evaluated(found.task, written.params)[goal.metric]
                size = sum(x.stat().st_size for x in new.iterdir())
            counts = written.manifest["numbers"]
            rows.append(
                {
                    "run": folder.name,
                    "form": form,
                    "dtype": dtype,
                    "metric": goal.metric,
                    "of_run": before,
                    "of_export": after,
                    "lost": lost(before, after, goal.best),
                    "bytes": size,
                    "weights_bytes": written.manifest["files"][WEIGHTS]["bytes"],
                    "stored_weights": counts["stored"],
                    "dense_weights": counts["dense"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def lost(before: float, after: float, best: str) -> float:
    """By how much a metric is worse, negative where it is better; `best`: min or max.

    >>> lost(0.75, 0.5, "max"), lost(0.75, 0.5, "min")
    (0.25, -0.25)
    """
    return before - after if best == "max" else after - before


def table(rows: Sequence[Row]) -> str:
    """In Markdown: for runs that differ in their seed the mean and the most lost.

    Accuracy is in points.
    """
    lines = ["| runs | form | of the runs | lost, mean | lost, most | bytes, mean |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    kinds = dict.fromkeys((_kind(x), x["form"], x["dtype"]) for x in rows)
    for kind, form, dtype in kinds:
        key = (kind, form, dtype)
        mine = [x for x in rows if (_kind(x), x["form"], x["dtype"]) == key]
        factor = 100 if mine[0]["metric"] == "accuracy" else 1
        before, less = ([factor * x[k] for x in mine] for k in ("of_run", "lost"))
        lines.append(
            f"| {len(mine)} {kind} | {form}, {dtype} | {np.mean(before):.2f} | "
            f"{np.mean(less):.2f} | {max(less):.2f} | "
            f"{np.mean([x['bytes'] for x in mine]):,.0f} |"
        )
    return "\n".join(lines)


def _kind(row: Row) -> str:
    """The name of a run without its seed."""
    return re.sub(r"-seed\d+$", "", row["run"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    command("train.studies.storage", Settings, run, table, arguments)


if __name__ == "__main__":
    main()
