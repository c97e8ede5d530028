"""When bases settle, with controls: python -m train.studies.stability --data-dir data.

Trains the dense presets with the learning rate falling and constant, follows every
matrix over twentieths of a run (the paper's interval: 5 epochs of 100), and draws
RUNS/stability-PRESET.png: the mean curves of both, over seeds, beside a random change
as large. Prints tables, also of the mean stability of each layer in thirds of the run.
Runs that are in the folder already are not repeated.

Command:   python -m train.studies.stability --seeds 3 --data-dir data [--json FILE]
Results:   train/results/stability.md
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train import files, images, markdown, names, process, report
from train.bench.settings import Row
from train.bench.timing import command

Found = Mapping[Any, Sequence[Sequence[files.Record]]]
"""Lines about stability by learning rate and seed."""

RATES: tuple[Literal["cosine", "constant"], ...] = ("cosine", "constant")
INTERVALS = 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which runs."""

    presets: tuple[str, ...] = ("digits", "fashion")
    """Of train.images."""
    seeds: int = 3
    """Runs of each kind, from seed 0 on."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where `python -m train.data.prepare` put the dataset."""
    out: pathlib.Path = pathlib.Path("runs")
    """Runs go to folders in here."""
    json: pathlib.Path | None = None
    """Where the rows go, with device, versions and date."""


def run(settings: Settings, preset: str, rate: Any, seed: int) -> list[files.Record]:
    """Host side: the lines about stability of one run, trained if it is not there."""
    name = f"stability-{preset}-{rate}-seed{seed}"
    folder = settings.out / name
    if not (folder / files.SUMMARY).exists():
        usual = images.PRESETS[preset][1]
        given = dataclasses.replace(
            usual,
            method="dense",
            rate=rate,
            seed=seed,
            track_every=usual.steps // INTERVALS,
            save_every=usual.steps,
            resume=True,
            data_dir=settings.data_dir,
            out=settings.out,
        )
        images.run(given, name=name)
    return [r for r in files.read(folder) if r["kind"] == "stability"]


def draw(found: Found, preset: str) -> Figure:
    """One panel per learning rate: means over layers, with the range of seeds."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (rate, runs) in zip(panels, found.items(), strict=True):
        report.draw_means(panel, runs)
        panel.set(title=f"{preset}, learning rate {rate}", xlabel="epoch")
    panels[0].set_ylim(min(panel.dataLim.y0 for panel in panels) - 0.01, 1)
    for panel in panels[1:]:
        panel.set_ylabel("")
    curves, titles = panels[0].get_legend_handles_labels()
    figure.legend(
        curves, titles, loc="outside lower center", frameon=False, fontsize=8, ncols=4
    )
    return figure


def curves(found: Found, preset: str) -> list[Row]:
    """Means over layers and seeds at every interval."""
    return [
        {
            **{"preset": preset, "rate": rate, "what": title},
            "epochs": [r["epoch"] for r in runs[0]],
            "means": values.mean(0).tolist(),
            "deviation": float(np.nanmax(np.std(values, axis=0, ddof=1)))
            if len(runs) > 1
            else None,
        }
        for rate, runs in found.items()
        for name, title, *_ in report.SERIES
        for values in [np.array([[report.run_mean(r, name) for r in x] for x in runs])]
    ]


def layers(found: Found, preset: str) -> list[Row]:
    """Stability of each layer and of its null in thirds of the runs."""

    def thirds(runs: Any, path: str, name: str) -> list[float]:
        each = [[report.layer_mean(r, path, name) for r in run] for run in runs]
        parts = np.array_split(np.array(each), 3, axis=1)
        return [float(np.nanmean(part)) for part in parts]

    return [
        {
            **{"preset": preset, "rate": rate, "layer": path},
            **{x: thirds(runs, path, x) for x in ("basis", "null")},
        }
        for path in next(iter(found.values()))[0][0]["layers"]
        for rate, runs in found.items()
    ]


def accuracy(settings: Settings, preset: str) -> list[Row]:
    """Test accuracy of the runs, in the order of their seeds."""

    def of(rate: str, seed: int) -> float:
        folder = settings.out / f"stability-{preset}-{rate}-seed{seed}"
        return float(files.summary(folder)["test_accuracy"])

    return [
        {
            **{"preset": preset, "rate": rate},
            "accuracy": [of(rate, seed) for seed in range(settings.seeds)],
        }
        for rate in RATES
    ]


def _shown(x: float | None) -> str:
    """Three digits; a dash for what was not recorded."""
    return f"{x:.3f}" if _is_known(x) else "-"


def _is_known(x: float | None) -> bool:
    """Whether it was recorded; if not it is NaN, and null in JSON."""
    return x is not None and not np.isnan(x)


def table(rows: Sequence[Row]) -> str:
    """Markdown: a table of curves for each preset and rate, one of layers, accuracy.

    Curves are shown where all of them are known, and at the end.
    """
    tables: list[str] = []
    by_layer: dict[str, list[str]] = {}
    for preset, rate in dict.fromkeys((x["preset"], x["rate"]) for x in rows):
        mine = [x for x in rows if (x["preset"], x["rate"]) == (preset, rate)]
        found = [x for x in mine if "what" in x]
        points = zip(*(x["means"] for x in found), strict=True)
        known = [i for i, each in enumerate(points) if all(map(_is_known, each))]
        shown = sorted({*known, len(found[0]["means"]) - 1})
        lines = [
            [
                f"{x['what']} (sd to {_shown(x['deviation'])})",
                *(_shown(x["means"][i]) for i in shown),
            ]
            for x in found
        ]
        (right,) = (x["accuracy"] for x in mine if "accuracy" in x)
        accurate = markdown.spread(right, ".2f", scale=100)
        head = f"{preset}, {rate}, accuracy {accurate} %; epoch"
        epochs = [f"{found[0]['epochs'][i]:.3g}" for i in shown]
        tables.append(markdown.table([head, *epochs], lines))
        for x in mine:
            if "layer" in x:
                both = zip(x["basis"], x["null"], strict=True)
                cell = " / ".join(f"{_shown(a)} ({_shown(b)})" for a, b in both)
                by_layer.setdefault(f"{preset}: {x['layer']}", []).append(cell)
    thirds = ["first / middle / last third", *RATES]
    lines = [[name, *cells] for name, cells in by_layer.items()]
    return "\n\n".join([*tables, markdown.table(thirds, lines)])


def measured(settings: Settings) -> list[Row]:
    """Host side: train what is missing, draw, and give the rows of the tables.

    Raises:   ValueError: an unknown preset.
    """
    for preset in settings.presets:
        names.find("preset", preset, images.PRESETS)
    rows: list[Row] = []
    for preset in settings.presets:
        found = {
            rate: [run(settings, preset, rate, i) for i in range(settings.seeds)]
            for rate in RATES
        }
        path = settings.out / f"stability-{preset}.png"
        FigureCanvasAgg(draw(found, preset)).print_figure(path, dpi=90)
        rows += [*curves(found, preset), *layers(found, preset)]
        rows += accuracy(settings, preset)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    command("train.studies.stability", Settings, measured, table, arguments)


if __name__ == "__main__":
    process.use_huge_pages()
    main()
