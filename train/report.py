"""Plots of a run, from its record alone: python -m train.report RUN_DIR.

Draws into RUN_DIR/plots: what was evaluated, as accuracy.png or mse.png, and loss.png
over the steps, ranks.png per layer over the steps, spectra.png of singular values at
every event, and fractions.png of stored and trained weights. Runs without rank events
get the first ones and the last.
Runs whose bases were tracked also get stability.png, a map of how alike the basis of
each layer is at the ends of each interval, over the means of all layers; and
basis_spectra.png and basis_ranks.png with the singular values of all matrices.

Of several runs it also prints a table, mean ± deviation over seeds, and draws
comparison.png beside the first of them: the metric against stored and trained weights.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train import files, table
from train.files import Record

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's palette
LAYERS = mpl.colormaps["viridis"]  # ordered, and even in lightness


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """Host side: the plots that were written, by process 0 alone.

    Raises:   FileNotFoundError: `folder` holds no record.
    """
    if jax.process_index() != 0:
        return []
    records = files.read(folder)
    events = [record for record in records if record["kind"] == "event"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    evaluated = {name for x in evaluations for name in x} - {"kind", "step", "seconds"}
    figures = {
        f"{name}.png": _over_steps(records, name, name.replace("_", " "))
        for name in sorted({*evaluated, "loss"})
    }
    figures["fractions.png"] = _fractions(records)
    if events:
        figures["ranks.png"] = _ranks(records, events)
        figures["spectra.png"] = _spectra(
            list(_full_ranks(events)),
            [
                (layer["path"], event["step"], sigma, layer["after"])
                for event in events
                for layer in event["event"]["layers"]
                if layer["finite"]
                for sigma in layer["sigma"]
            ],
            "step of the event",
            "index of the singular value (dot: the last one that a cut kept)",
        )
    tracked = [record for record in records if record["kind"] == "stability"]
    if tracked:
        figures["stability.png"] = _stability(tracked)
    known = [r for r in tracked if "sigma" in next(iter(r["layers"].values()))]
    if known:
        figures["basis_spectra.png"] = _spectra(
            list(known[-1]["layers"]),
            [
                (path, record["epoch"], sigma, None)
                for record in known
                for path, layer in record["layers"].items()
                for sigma in np.atleast_2d(layer["sigma"])
            ],
            "epoch",
        )
        figures["basis_ranks.png"] = _basis_ranks(known)
    (folder / "plots").mkdir(exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / "plots" / name)
        FigureCanvasAgg(figure).print_figure(paths[-1], dpi=120)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: redraw the plots of these runs, and compare them."""
    folders = sys.argv[1:] if arguments is None else list(arguments)
    if not folders or folders[0].startswith("-"):
        sys.exit("usage: python -m train.report RUN_DIR [RUN_DIR ...]")
    try:
        paths = [files.expanded(pathlib.Path(folder)) for folder in folders]
        for folder in paths:
            for path in draw(folder):
                print(path)
        if len(paths) > 1:
            groups = table.read(paths)
            if table.metrics(groups):
                path = paths[0].absolute().parent / "comparison.png"
                FigureCanvasAgg(table.draw(groups)).print_figure(path, dpi=120)
                print(path)
            else:
                files.say("these runs have no metric in common: no comparison is drawn")
            print(f"\n{table.markdown(groups)}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _over_steps(records: Sequence[Record], name: str, label: str) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    series = [("train", "training batches", BLUE, "-"), ("eval", "test", ORANGE, "o-")]
    for kind, title, color, style in series:
        known = [r for r in records if r["kind"] == kind and r.get(name) is not None]
        points = [(r["step"], r[name]) for r in known]
        if points:
            x, y = zip(*points, strict=True)
            if kind == "eval":
                title = f"{title}, {y[-1]:.4f} at the end"
            axes.plot(x, y, style, color=color, label=title, markersize=4)
    _mark_events(axes, records)
    axes.set(xlabel="step", ylabel=label, xlim=(0, None))
    if axes.get_legend_handles_labels()[0]:
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


def _spectra(
    paths: Sequence[str],
    found: Sequence[tuple[str, float, Sequence[float], int | None]],
    time: str,
    below: str = "index of the singular value",
) -> Figure:
    """One panel per layer, a line for each (path, time, values, how many are kept)."""
    figure, panels = _panels(len(paths))
    times = [x for _, x, *_ in found] or [0]
    first, last = min(times), max(times)
    norm = mpl.colors.Normalize(first, last if last > first else first + 1)
    for path, x, sigma, kept in found:
        panel, color = panels[paths.index(path)], LAYERS(0.9 * norm(x))
        panel.plot(range(1, len(sigma) + 1), sigma, color=color, linewidth=1)
        if kept is not None and kept < len(sigma):
            panel.plot(kept, sigma[kept - 1], "o", color=color, ms=4)
    for panel, path in zip(panels, paths, strict=True):
        panel.set_title(path, fontsize=8)
        panel.set_ylim(0, None)
    figure.supxlabel(below)
    figure.supylabel("singular value")
    _scale(figure, panels, norm, time)
    return figure


def _stability(tracked: Sequence[Record]) -> Figure:
    """The paper's figure: a row per layer, a column per interval, means below."""
    layers = list(tracked[-1]["layers"])
    figure = Figure(figsize=(7.5, 4.2 + 0.2 * len(layers)), layout="constrained")
    heights = [0.6 + 0.2 * len(layers), 3]
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    table = np.array([[layer_mean(r, x, "basis") for r in tracked] for x in layers])
    edges = [_epoch(tracked[0], "since"), *(r["epoch"] for r in tracked)]
    mesh = above.pcolormesh(
        edges,
        np.arange(len(layers) + 1),
        np.ma.masked_invalid(table),
        cmap=LAYERS,
        vmin=min(0.9, np.floor(10 * np.nanmin(table, initial=1)) / 10),
        vmax=1,
    )
    above.set_facecolor("0.88")
    above.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=8)
    above.invert_yaxis()
    above.set_title("stability of each layer's basis, in execution order", fontsize=10)
    figure.colorbar(mesh, ax=above, label="tr(P₁ᵀP₂) / n", pad=0.01)
    draw_means(below, [tracked])
    below.set_xlabel("epoch at the end of the interval")
    if below.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=4)
    return figure


SERIES: Sequence[tuple[str, str, str, str]] = (
    ("basis", "basis P", BLUE, "-"),
    ("null", "basis after a random change as large", BLUE, ":"),
    ("cosine", "weights W", ORANGE, "--"),
    ("mixing", "mixing R", GREEN, "-."),
)
"""Name in the record, in words, colour and dashes of each mean curve."""


def draw_means(axes: Any, runs: Sequence[Sequence[Record]]) -> None:
    """Means over the layers of some runs, seeds of one, with the range they span."""
    for name, title, color, dashes in SERIES:
        means = np.array([[run_mean(r, name) for r in run] for run in runs])
        known = ~np.isnan(means).any(axis=0)
        x = np.array([r["epoch"] for r in runs[0]])[known]
        y = means[:, known]
        if not known.any():
            continue
        axes.plot(x, y.mean(0), dashes, color=color, label=title)
        if len(runs) > 1:
            axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.2, lw=0)
    axes.set(ylabel="mean over the layers", xlim=(0, None), ylim=(None, 1))
    axes.grid(alpha=0.3)


def run_mean(record: Record, name: str) -> float:
    """Mean over the layers of one number; NaN where the record does not have it."""
    return float(np.mean([layer_mean(record, path, name) for path in record["layers"]]))


def layer_mean(record: Record, path: str, name: str) -> float:
    """One number of a layer, the mean over its stack; `null` is the null's basis."""
    values = record["layers"][path]
    value = values.get("null", {}).get("basis") if name == "null" else values.get(name)
    if value is None:
        return float("nan")
    return float(np.mean(np.array(value, float)))


def _epoch(record: Record, name: str) -> float:
    return record["epoch"] * record[name] / record["step"]


def _basis_ranks(known: Sequence[Record]) -> Figure:
    """Effective and stable rank of each layer over the epochs, as a share of the full.

    A full rank is that of the first spectrum, before any cut.
    """
    paths = list(known[-1]["layers"])
    full = {x: np.shape(known[0]["layers"][x]["sigma"])[-1] for x in paths}
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    norm = mpl.colors.Normalize(1, max(2, len(paths)))
    names = (("effective_rank", "effective rank"), ("stable_rank", "stable rank"))
    for panel, (name, title) in zip(panels, names, strict=True):
        for row, path in enumerate(paths, start=1):
            share = [layer_mean(r, path, name) / full[path] for r in known]
            epochs = [r["epoch"] for r in known]
            panel.plot(epochs, share, ".-", color=LAYERS(0.9 * norm(row)), linewidth=1)
        panel.set(title=title, xlabel="epoch", xlim=(0, None), ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of full rank")
    _scale(figure, panels, norm, "layer, in execution order")
    return figure


def _panels(count: int) -> tuple[Figure, list[Any]]:
    """A grid of small panels, at most four in a row."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.9 * columns, 1 + 1.9 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    for panel in panels[:count]:
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    return figure, panels[:count]


def _scale(figure: Figure, panels: Any, norm: Any, label: str) -> None:
    """The bar that explains line colours, without the map's lightest part."""
    colors = mpl.colors.LinearSegmentedColormap.from_list(
        "lines", LAYERS(np.linspace(0, 0.9, 256))
    )
    scale = mpl.cm.ScalarMappable(norm, colors)
    figure.colorbar(scale, ax=panels, label=label, aspect=40, pad=0.01)


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
