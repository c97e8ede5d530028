"""Orthogonal gradients beside their controls: python -m train.studies.orthogonal.

Every arm has the same grid of learning rates and the same seeds; the rate is chosen by
the accuracy on held-out training images, reported is that on the test set. Runs that
are in the record already are not repeated.

digits      BasicCNN, batch 256, 24 steps, a constant rate: the paper's naive recipe
cosine      the same for 120 steps, the rate falling to zero: the tuned one
batch-N     BasicCNN on digits, batches of 4, 16, 64 and 256, the same epochs
depth-N     ResNet-8 and ResNet-20 on digits, batch 256, 40 steps
fashion     BasicCNN on 20,000 images of Fashion-MNIST, batch 256, 156 steps
cores       the vision transformer on digits, 400 steps, after a third in low rank
dense       the same without low rank
cores-time  as cores, each optimizer for as long as AdamW takes, at its best rate
text        a transformer on characters, 200 steps of 16 passages of 64
selfsup     Barlow Twins on digits, batch 256, 67 steps; `test` is a linear classifier,
            `loss` that of the last tenth of the training, by which the rate is chosen

Command:   python -m train.studies.orthogonal --data-dir data [--json FILE]
Results:   train/results/orthogonal.md
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from tqdm import tqdm

from train import files, markdown, names, process
from train.bench.settings import Row
from train.bench.timing import interleaved, write
from train.markdown import spread
from train.studies.arms import ARMS, DECAYS, Kind, Program, Unlabelled, batches, load

RATES = tuple(float(f"{x:.0e}") for x in np.logspace(-3, 0, 7))
"""1e-3 to 1 in half decades, the grid of every arm."""
FEWER = {
    "selfsup": RATES[:6],
    "cores": RATES[:5],
    "dense": RATES[:5],
    "fashion": RATES[2:6],
    "text": RATES[:4],
    "depth-20": RATES[:5],
}
"""The grid of every arm in studies that take long."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which runs."""

    studies: tuple[str, ...] = ()
    """Of the list above; by default all."""
    seeds: int = 3
    """Runs of each kind, from seed 0 on."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where `python -m train.data.prepare` put Fashion-MNIST."""
    out: pathlib.Path = pathlib.Path("runs/orthogonal.jsonl")
    """The record, one line for each run."""
    json: pathlib.Path | None = None
    """Where the rows of the tables go, with device, versions and date."""


class Run(NamedTuple):
    """One training run."""

    study: str
    kind: Kind
    rate: float
    seed: int


# Which runs


MAIN = ("sgd", "normalize_tensor", "normalize_components", "orthogonal")


def kinds(study: str) -> list[Kind]:
    """What a study compares.

    Raises:   ValueError: there is no study of this name.
    """
    cnn = functools.partial(Kind, "digits", "basic-cnn")
    deep = functools.partial(Kind, "digits", batch=256, steps=40)
    controlled = ("sgd", "normalize_components", "orthogonal")
    epochs = {4: 1, 16: 1, 64: 4, 256: 6}
    table: dict[str, list[Kind]] = {
        "digits": [cnn(x, 256, 24) for x in ARMS],
        "cosine": [cnn(x, 256, 120, cosine=True) for x in ARMS],
        "fashion": [
            Kind("fashion", "basic-cnn", x, 256, 156)
            for x in (*MAIN, "orthogonal but the head")
        ],
        "cores": [
            Kind("digits", "vit-digits", x, 64, 400, cosine=True, named=True, rank=0.25)
            for x in DECAYS
        ],
        "dense": [
            Kind("digits", "vit-digits", x, 64, 400, cosine=True, named=True)
            for x in ("adamw", "adam", "orthogonal_sgd", "muon")
        ],
        "text": [
            Kind("shakespeare", "transformer", x, 16, 200, cosine=True, named=True)
            for x in ("adamw", "muon", "swan")
        ],
        "selfsup": [Kind("digits", "barlow-twins", x, 256, 67) for x in MAIN],
    }
    table |= {
        f"batch-{b}": [
            cnn(x, b, n * 1149 // b) for x in (*MAIN, "momentum, then orthogonal")
        ]
        for b, n in epochs.items()
    }
    table |= {
        f"depth-{n}": [deep(f"resnet{n}", arm=x) for x in controlled] for n in (8, 20)
    }
    return names.find("study", study, table)


STUDIES = (
    "digits",
    *(f"batch-{b}" for b in (4, 16, 64, 256)),
    "cores",
    "cores-time",
    "cosine",
    "depth-8",
    "selfsup",
    "dense",
    "fashion",
    "text",
    "depth-20",
)


def missing(record: pathlib.Path, runs: Iterable[Run]) -> Iterator[Run]:
    """Host side: those of the runs that the file does not have, kinds together."""
    done = {identity(row) for row in read(record)}
    return (x for x in runs if identity(as_row(x)) not in done)


def as_row(run: Run) -> dict[str, Any]:
    """What a line of the record says of the run itself."""
    own = {"study": run.study, "rate": run.rate, "seed": run.seed}
    return own | dataclasses.asdict(run.kind)


OWN = ("study", "rate", "seed", *(x.name for x in dataclasses.fields(Kind)))
"""What a line of the record says of the run itself."""


def identity(row: Mapping[str, Any]) -> str:
    """The same for lines of the same run."""
    return json.dumps([row[x] for x in OWN])


def read(record: pathlib.Path) -> list[dict[str, Any]]:
    """Host side: the lines of the record, none if there is no file."""
    if not record.exists():
        return []
    return [
        {**row, "validation": _or(row["validation"], -np.inf)}
        | {"loss": _or(row["loss"], np.inf)}
        for row in files.lines(record, {*OWN, "validation", "accuracy", "loss"})
    ]


def _or(x: float | None, infinite: float) -> float:
    """What was not finite is null in the record."""
    return infinite if x is None else x


def perform(runs: Sequence[Run], settings: Settings) -> None:
    """Host side: train what is missing; every run is a line when it has ended."""
    if settings.out.exists():
        files.mend(settings.out)
    todo = list(missing(settings.out, runs))
    program: Program | Unlabelled | None = None
    for run in tqdm(todo, runs[0].study, leave=False):
        if program is None or program.kind != run.kind:
            if run.kind.model == "barlow-twins":
                program = Unlabelled(run.kind, settings.data_dir)
            else:
                program = Program(run.kind, load(run.kind.data, settings.data_dir))
        row = as_row(run) | program.run(run.rate, run.seed)
        files.append(settings.out, row)


def swept(study: str, seeds: int) -> list[Run]:
    """Every kind at every rate."""
    return [
        Run(study, kind, rate, seed)
        for kind in kinds(study)
        for rate in FEWER.get(study, RATES)
        for seed in range(seeds)
    ]


def as_long(
    rows: Sequence[Mapping[str, Any]], took: Mapping[str, float], seeds: int
) -> list[Run]:
    """The study of cores again, each for as many steps as the time of AdamW allows."""
    best = chosen(rows)
    return [
        Run(
            "cores-time",
            dataclasses.replace(x, steps=round(x.steps * took["adamw"] / took[x.arm])),
            best[x.arm],
            seed,
        )
        for x in kinds("cores")
        for seed in range(seeds)
    ]


def times(data_dir: pathlib.Path, rounds: int = 15) -> dict[str, float]:
    """Host side: seconds of the cores' runs by arm, a third of them dense.

    All take five steps in turn, medians over the rounds.
    """
    timed: list[Callable[[], Any]] = []

    def add(program: Program, carry: Any) -> None:
        order = batches(0, len(program.data.train.label), program.kind.batch, 5)
        holder = [carry]

        def run() -> None:
            holder[0], _ = program.phase(holder[0], 1e-3, order)

        timed.append(run)

    for kind in kinds("cores"):
        program = Program(kind, load(kind.data, data_dir))
        for low in (False, True):
            carry = program.initial(jax.random.key(0))
            add(program, program.converted(carry, kind.rank or 1.0) if low else carry)
    middle = [x for x, *_ in interleaved(timed, rounds)]
    return {
        kind.arm: kind.steps / 5 * (dense + 2 * low) / 3
        for kind, dense, low in zip(
            kinds("cores"), middle[::2], middle[1::2], strict=True
        )
    }


# Tables


def chosen(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rate of each arm with the best mean accuracy on held-out training images."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        by_rate = found.setdefault(row["arm"], {})
        by_rate.setdefault(row["rate"], []).append(row["validation"])
    return {
        arm: max(by_rate, key=lambda x: float(np.mean(by_rate[x])))
        for arm, by_rate in found.items()
    }


UNTUNED = 0.01
"""The paper's rate."""


def summary(study: str, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row for each arm: what its best rate gives, in the order of the seeds.

    `plateau` counts the rates within one point of the best of the arm.
    """
    found = []
    for arm, rate in chosen(rows).items():
        by_rate: dict[float, list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["arm"] == arm:
                by_rate.setdefault(row["rate"], []).append(row)
        means = {
            k: float(np.mean([x["accuracy"] for x in v])) for k, v in by_rate.items()
        }
        found.append(
            {
                **{"study": study, "arm": arm, "rate": rate},
                "steps": by_rate[rate][0]["steps"],
                "accuracy": [x["accuracy"] for x in by_rate[rate]],
                "loss": [x["loss"] for x in by_rate[rate]],
                "untuned": means.get(UNTUNED),
                "plateau": sum(x > max(means.values()) - 0.01 for x in means.values()),
                "rates": len(means),
            }
        )
    return found


TABLES = (
    ("digits", "cosine", "fashion", "depth-8", "depth-20", "selfsup"),
    tuple(f"batch-{b}" for b in (4, 16, 64, 256)),
    ("dense", "cores", "cores-time", "text"),
)
"""The studies that share a table."""


def table(rows: Sequence[Row]) -> str:
    """Tables of arms by study: test accuracy, loss, and untuned in brackets; Markdown.

    Mean ± deviation over seeds, in per cent, at the rate that was chosen.
    """
    tables = []
    for studies in TABLES:
        found = {(x["study"], x["arm"]): x for x in rows if x["study"] in studies}
        if not found:
            continue
        lines = []
        for arm in dict.fromkeys(arm for _, arm in found):
            cells = [arm]
            for row in (found.get((study, arm)) for study in studies):
                if row is None:
                    cells.append("")
                    continue
                cell = spread(row["accuracy"], ".1f", scale=100, ddof=0)
                finite = [_or(x, np.inf) for x in row["loss"]]
                cell += f" / {np.mean(finite):.3f}"
                if row["untuned"] is not None:
                    cell += f" ({100 * row['untuned']:.1f})"
                cells.append(cell)
            lines.append(cells)
        tables.append(markdown.table(["arm", *studies], lines))
    return "\n\n".join(tables)


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: train what is missing, print the tables."""
    settings = tyro.cli(
        Settings, args=arguments, prog="python -m train.studies.orthogonal"
    )
    try:
        settings = files.with_paths_expanded(settings)
        if settings.json is not None:
            files.writable_file(settings.json)
        with files.held(files.writable(settings.out.parent)):
            rows = [row for x in settings.studies or STUDIES for row in of(x, settings)]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(rows))
    if settings.json is not None:
        write("train.studies.orthogonal", arguments, rows, settings.json)


def of(study: str, settings: Settings) -> list[Row]:
    """Host side: the rows of a study, what is missing trained.

    Raises:   ValueError: there is no study of this name, or runs that it needs.
    """
    if study == "cores-time":
        rows = [x for x in read(settings.out) if x["study"] == "cores"]
        if not rows:
            raise ValueError("`cores-time` needs the runs of `cores` first")
        took = times(settings.data_dir)
        print({arm: f"{x:.2f} s" for arm, x in took.items()})
        runs = as_long(rows, took, settings.seeds)
    else:
        runs = swept(study, settings.seeds)
    perform(runs, settings)
    wanted = {identity(as_row(x)) for x in runs}
    return summary(study, [x for x in read(settings.out) if identity(x) in wanted])


if __name__ == "__main__":
    process.use_huge_pages()
    main()
