"""Plots of a run, from its record alone: python -m train.report RUN_DIR.

Draws into RUN_DIR/plots: accuracy.png and loss.png over the steps, ranks.png per layer
over the steps, spectra.png of singular values at every event, and fractions.png of
stored and trained weights. Runs without rank events get the first two and the last.
"""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train import loop

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's palette
LAYERS = mpl.colormaps["viridis"]  # ordered, and even in lightness

Record = Mapping[str, Any]


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """Host side: the plots that were written, by process 0 alone.

    Raises:   FileNotFoundError: `folder` holds no record.
    """
    if jax.process_index() != 0:
        return []
    records = read(folder)
    events = [record for record in records if record["kind"] == "event"]
    figures = {
        "accuracy.png": _over_steps(records, "accuracy", "accuracy"),
        "loss.png": _over_steps(records, "loss", "loss"),
        "fractions.png": _fractions(records),
    }
    if events:
        figures["ranks.png"] = _ranks(records, events)
        figures["spectra.png"] = _spectra(events)
    (folder / "plots").mkdir(exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / "plots" / name)
        FigureCanvasAgg(figure).print_figure(paths[-1], dpi=120)
    return paths


def read(folder: pathlib.Path) -> list[Record]:
    """The record of a run, one mapping per line of its `metrics.jsonl`."""
    path = folder / loop.METRICS
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {folder} is no folder of a run")
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: redraw the plots of the run folders named on the command line."""
    folders = sys.argv[1:] if arguments is None else list(arguments)
    if not folders or folders[0].startswith("-"):
        sys.exit("usage: python -m train.report RUN_DIR [RUN_DIR ...]")
    for folder in folders:
        try:
            for path in draw(pathlib.Path(folder)):
                print(path)
        except FileNotFoundError as error:
            sys.exit(f"error: {error}")


def _over_steps(records: Sequence[Record], name: str, label: str) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    series = [("train", "training batches", BLUE, "-"), ("eval", "test", ORANGE, "o-")]
    for kind, title, color, style in series:
        points = [(r["step"], r[name]) for r in records if r["kind"] == kind]
        if points:
            x, y = zip(*points, strict=True)
            if kind == "eval":
                title = f"{title}, {y[-1]:.4f} at the end"
            axes.plot(x, y, style, color=color, label=title, markersize=4)
    _mark_events(axes, records)
    axes.set(xlabel="step", ylabel=label, xlim=(0, None))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    axes.grid(alpha=0.3)
    return figure


def _fractions(records: Sequence[Record]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    known = [r for r in records if "stored_fraction" in r]
    named = [
        ("stored_fraction", "stored: bases, cores, the rest", BLUE),
        ("trainable_fraction", "trained: cores, the rest", ORANGE),
    ]
    for key, title, color in named:
        x = [0, *(r["step"] for r in known)]  # what holds at the first record held at 0
        y = [100 * r[key] for r in [*known[:1], *known]]
        if known:
            title = f"{title}; {y[-1]:.1f} % at the end"
            axes.plot(x, y, color=color, label=title, drawstyle="steps-post")
    axes.axhline(100, color="0.5", linewidth=1, linestyle=":", label="dense model")
    _mark_events(axes, records)
    axes.set(xlabel="step", ylabel="% of the dense model's weights", xlim=(0, None))
    axes.set_ylim(0, None)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    axes.grid(alpha=0.3)
    return figure


def _ranks(records: Sequence[Record], events: Sequence[Record]) -> Figure:
    """One row per layer, one column per time between events, the rank in the cell."""
    full = _full_ranks(events)
    last = max(record["step"] for record in records)
    steps = sorted({event["step"] for event in events})
    edges = [0, *(step for step in steps if step > 0), max(last, steps[-1] + 1)]
    table = np.full((len(full), len(edges) - 1), np.nan)
    for row, path in enumerate(full):
        for event in events:
            for layer in event["event"]["layers"]:
                if layer["path"] == path and layer["after"] is not None:
                    table[row, edges.index(event["step"]) :] = layer["after"]
    share = table / np.array(list(full.values()))[:, None]
    figure = Figure(figsize=(9, 1.4 + 0.26 * len(full)), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(full) + 1),
        np.ma.masked_invalid(share),
        cmap=LAYERS,
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=0.5,
    )
    axes.set_facecolor("0.88")
    for row, column in np.ndindex(table.shape):
        rank = table[row, column]
        dense = np.isnan(rank)
        axes.text(
            (edges[column] + edges[column + 1]) / 2,
            row + 0.5,
            "dense" if dense else f"{rank:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if dense or share[row, column] > 0.6 else "white",
        )
    axes.set_yticks(np.arange(len(full)) + 0.5, list(full), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="step", title="rank of each layer, in execution order")
    figure.colorbar(mesh, label="share of full rank", pad=0.01)
    return figure


def _spectra(events: Sequence[Record]) -> Figure:
    """One panel per layer, one line per event; a dot is the last value that is kept."""
    paths = list(_full_ranks(events))
    columns = min(4, len(paths))
    rows = -(-len(paths) // columns)
    figure = Figure(figsize=(2.9 * columns, 1 + 1.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    steps = [event["step"] for event in events]
    norm = mpl.colors.Normalize(min(steps), max(max(steps), min(steps) + 1))
    for panel in panels.flat[len(paths) :]:
        panel.set_visible(False)
    for panel, path in zip(panels.flat, paths, strict=False):
        for event in events:
            color = LAYERS(0.9 * norm(event["step"]))
            for layer in event["event"]["layers"]:
                if layer["path"] != path or not layer["finite"]:
                    continue
                for sigma in layer["sigma"]:
                    panel.plot(range(1, len(sigma) + 1), sigma, color=color)
                    kept = layer["after"]
                    if kept < len(sigma):
                        panel.plot(kept, sigma[kept - 1], "o", color=color, ms=4)
        panel.set_title(path, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.set_ylim(0, None)
        panel.grid(alpha=0.3)
    figure.supxlabel("index of the singular value (dot: the last one that a cut kept)")
    figure.supylabel("singular value")
    scale = mpl.cm.ScalarMappable(
        norm,
        mpl.colors.LinearSegmentedColormap.from_list(
            "events", LAYERS(np.linspace(0, 0.9, 256))
        ),
    )
    figure.colorbar(scale, ax=panels, label="step of the event", aspect=40, pad=0.01)
    return figure


def _full_ranks(events: Sequence[Record]) -> dict[str, int]:
    """Full rank by path, in execution order, which the conversion lists."""
    layers = [layer for event in events for layer in event["event"]["layers"]]
    return {layer["path"]: min(layer["m"], layer["n"]) for layer in layers}


def _mark_events(axes: Any, records: Sequence[Record]) -> None:
    steps = sorted({record["step"] for record in records if record["kind"] == "event"})
    for i, step in enumerate(steps):
        title = "rank event" if i == 0 else None
        axes.axvline(step, color=GREEN, linewidth=1, alpha=0.6, label=title)


if __name__ == "__main__":
    main()
