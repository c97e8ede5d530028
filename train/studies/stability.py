"""When bases settle, with controls: python -m train.studies.stability --data-dir data.

Trains the dense presets with the learning rate falling and constant, follows every
matrix over twentieths of a run (the paper's interval: 5 epochs of 100), and draws
RUNS/stability-PRESET.png: the mean curves of both, over seeds, beside a random change
as large. Prints a table, and the mean stability of each layer in thirds of the run.
Runs that are in the folder already are not repeated.

Command:   python -m train.studies.stability --seeds 3 --data-dir data
Results:   train/results/stability.md
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train import files, images, markdown, names, process, report

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


def table(found: Found) -> str:
    """Means over layers and seeds at every other interval; a table for each rate."""
    tables = []
    for rate, runs in found.items():
        rows = []
        for name, title, *_ in report.SERIES:
            values = np.array([[report.run_mean(r, name) for r in run] for run in runs])
            spread = np.nanmax(np.nanstd(values, axis=0, ddof=1))
            cells = [f"{x:.3f}" for x in values.mean(0)[::2]]
            rows.append([f"{title} (sd to {spread:.3f})", *cells])
        head = [str(rate), *(f"{r['epoch']:.3g}" for r in runs[0][::2])]
        tables.append(markdown.table(head, rows) + "\n")
    return "\n".join(tables)


def layers(found: Found) -> str:
    """Stability of each layer and, in brackets, of its null in thirds of the runs."""
    rows = []
    for path in next(iter(found.values()))[0][0]["layers"]:
        cells = []
        for runs in found.values():
            cell = []
            for part in np.array_split(np.arange(len(runs[0])), 3):
                both = (
                    np.nanmean(
                        [
                            report.layer_mean(run[i], path, x)
                            for i in part
                            for run in runs
                        ]
                    )
                    for x in ("basis", "null")
                )
                cell.append("{:.3f} ({:.3f})".format(*both))
            cells.append(" / ".join(cell))
        rows.append([path, *cells])
    head = ["layer, first / middle / last third", *map(str, found)]
    return markdown.table(head, rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: train what is missing, draw, print the tables."""
    settings = tyro.cli(
        Settings, args=arguments, prog="python -m train.studies.stability"
    )
    try:
        settings = files.with_paths_expanded(settings)
        files.writable(settings.out)
        for preset in settings.presets:
            names.find("preset", preset, images.PRESETS)
        for preset in settings.presets:
            found = {
                rate: [run(settings, preset, rate, i) for i in range(settings.seeds)]
                for rate in RATES
            }
            path = settings.out / f"stability-{preset}.png"
            FigureCanvasAgg(draw(found, preset)).print_figure(path, dpi=90)
            print(f"\n{path}\n\n{table(found)}\n{layers(found)}")
            for rate in RATES:
                folders = [
                    settings.out / f"stability-{preset}-{rate}-seed{i}"
                    for i in range(settings.seeds)
                ]
                right = [100 * files.summary(x)["test_accuracy"] for x in folders]
                spread = np.std(right, ddof=1)
                print(f"{rate}: {np.mean(right):.2f} ± {spread:.2f} % right")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    process.use_huge_pages()
    main()
