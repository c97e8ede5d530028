"""Several runs side by side: a Markdown table over seeds, and plots of the cost.

Command:  python -m train.table train/results/steps-cpu.json
draws the steps of a benchmark into a PNG file beside it.
"""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from train import files
from train.markdown import spread, table

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
Summary = Mapping[str, Any]


NEEDED = frozenset(
    {"seed", "stored_fraction", "trainable_fraction", "train_flops", "dense_flops"}
    | {"ranks", "wall_seconds"}
)
"""Of the summary of a training run."""


def read(folders: Sequence[pathlib.Path]) -> dict[str, list[Summary]]:
    """Summaries of runs by the names of their folders without `-seedN`.

    A run without a summary that can be read is named and left out.

    Raises:   ValueError: there is no other.
    """
    groups: dict[str, list[Summary]] = {}
    for folder in folders:
        try:
            summary = files.summary(folder)
            lacking = NEEDED - summary.keys()
            if lacking:
                raise ValueError(
                    f"{folder} is no training run: no {sorted(lacking)[0]}"
                )
        except (ValueError, FileNotFoundError) as error:
            files.say(f"{error}; left out of the table")
            continue
        title = folder.absolute().name.replace(f"-seed{summary['seed']}", "")
        groups.setdefault(title, []).append(summary)
    if not groups:
        raise ValueError("none of these runs has a summary to compare")
    return groups


def metrics(groups: Mapping[str, Sequence[Summary]]) -> list[str]:
    """What was measured on the test set, and finite, in every run."""
    runs = [x for group in groups.values() for x in group]
    names = [k for k in runs[0] if k.startswith("test_")]
    return [k for k in names if all(x.get(k) is not None for x in runs)]


def markdown(groups: Mapping[str, Sequence[Summary]]) -> str:
    """A row for each kind of run: mean ± sample deviation over its seeds.

    Weights are parts of those of the dense model, FLOPs, of the matrices over the whole
    training, of a dense run as long; ranks are the least and the largest.
    """
    names = metrics(groups)
    head = ["run", "seeds", *(name[5:] for name in names)]
    head += ["stored", "trained", "FLOPs", "ranks", "wall time, s"]
    rows = []
    for title, runs in groups.items():
        ranks = [rank for x in runs for _, _, rank in x["ranks"].values()]
        cells = [title, ", ".join(str(x["seed"]) for x in runs)]
        cells += [spread([x[name] for x in runs], ".4g") for name in names]
        for part in ("stored_fraction", "trainable_fraction"):
            cells.append(spread([x[part] for x in runs], ".1f", scale=100) + " %")
        work = [100 * x["train_flops"] / (x["dense_flops"] or np.nan) for x in runs]
        cells.append(spread(work, ".1f") + " %")
        cells.append(f"{min(ranks)} to {max(ranks)}" if ranks else "dense")
        cells.append(spread([x["wall_seconds"] for x in runs], ".0f"))
        rows.append(cells)
    return table(head, rows)


def draw(groups: Mapping[str, Sequence[Summary]]) -> Figure:
    """The first metric of every run against stored and against trained weights."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    name = metrics(groups)[0]
    for i, (title, runs) in enumerate(groups.items()):
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        for axes, part in zip(panels, ("stored", "trainable"), strict=True):
            x = [100 * run[f"{part}_fraction"] for run in runs]
            label = title if axes is panels[0] else None
            axes.plot(
                x,
                [run[name] for run in runs],
                ls="",
                ms=5,
                alpha=0.8,
                label=label,
                **style,
            )
    for axes, part in zip(panels, ("stored", "trained"), strict=True):
        axes.set(xlabel=f"weights {part}, % of the dense model's", xlim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"{name[5:]} on the test set")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


LARGE = ("mini-vit", "resnet18")
ORDERS = {"auto": "oialr", "rebuilt": "W rebuilt", "galore": "GaLore", "lora": "LoRA"}


def steps(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The step over that of the dense model against rank, as `train.bench` timed them.

    A panel for each of the two larger models, a line for each way to train.

    Raises:   ValueError: neither of them was timed.
    """
    models = [x for x in LARGE if any(row["model"] == x for row in rows)]
    if not models:
        raise ValueError(f"has no steps of {' or '.join(LARGE)}")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        for i, (order, title) in enumerate(ORDERS.items()):
            found = [x for x in rows if (x["model"], x["order"]) == (model, order)]
            axes.plot(
                [x["rank_fraction"] for x in found],
                [x["ratio_to_dense"] for x in found],
                color=COLORS[i],
                marker=MARKERS[i],
                ms=4,
                label=title if axes is panels[0] else None,
            )
        axes.axhline(1, color="black", lw=0.8, ls="--")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="rank over small side", title=model, ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("step over dense")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def main(path: tyro.conf.Positional[pathlib.Path]) -> None:
    """Draw the steps of a benchmark into a PNG file beside its JSON."""
    try:
        path = files.expanded(path)
        picture = files.writable_file(path.with_suffix(".png"))
        steps(json.loads(path.read_text())["rows"]).savefig(picture, dpi=110)
    except (KeyError, TypeError):
        sys.exit(f"error: {path} has no rows of `python -m train.bench --suite steps`")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {path}: {error}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m train.table")
