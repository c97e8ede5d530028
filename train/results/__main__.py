"""The tables of the results, from the JSON beside them: python -m train.results.

In the Markdown files a table stands below a comment with the name of its JSON. All are
printed; `--write` puts them into the files, in the place of those there.
"""

import json
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any

from train import finetune, serve
from train.markdown import table
from train.studies import controls, stability
from train.studies import orthogonal as orthogonal_training

FOLDER = pathlib.Path(__file__).parent
Rows = Sequence[Mapping[str, Any]]


def _rank(row: Mapping[str, Any]) -> str:
    return str(Fraction(row["rank_fraction"]).limit_denominator(100))


def _grouped(
    rows: Rows, *keys: Callable[[Mapping[str, Any]], str]
) -> dict[tuple[str, ...], dict[str, Mapping[str, Any]]]:
    """Rows by what the keys give, and within by their order or method."""
    found: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for x in rows:
        key = tuple(of(x) for of in keys)
        found.setdefault(key, {})[x["order" if "order" in x else "method"]] = x
    return found


def steps(rows: Rows) -> str:
    """Steps over the dense one of the model, a column for each way to train."""
    orders = list(dict.fromkeys(x["order"] for x in rows if x["order"] != "dense"))
    dense = {x["model"]: x for x in rows if x["order"] == "dense"}
    lines = []
    for (model, rank), by in _grouped(rows, lambda x: x["model"], _rank).items():
        cells = [f"{by[x]['ratio_to_dense']:.2f}" if x in by else "" for x in orders]
        auto, base = by["auto"], dense[model]
        cells.append(f"{auto['flops_ratio']:.2g}")
        cells += [f"{auto[x] / base[x]:.2g}" for x in ("temp_bytes", "state_bytes")]
        ms = float(f"{base['step_ms']:.3g}")
        lines.append([f"{model}, {ms:g} ms", rank, *cells])
    ours = ["FLOPs", "temporary memory", "optimizer state"]
    return table(["model, dense step", "rank", *orders, *ours], lines)


def layers(rows: Rows) -> str:
    """The order that `auto` picks, its time over dense and, in brackets, estimated."""
    ranks = list(dict.fromkeys(_rank(x) for x in rows))
    found: dict[str, list[str]] = {}
    for (layer, _), by in _grouped(rows, lambda x: x["model"], _rank).items():
        auto = by["auto"]
        times = f"{auto['ratio_to_dense']:.2f} ({auto['estimated_ratio']:.2f})"
        found.setdefault(layer, []).append(f"{auto['picked']} {times}")
    return table(["layer", *ranks], [[x, *cells] for x, cells in found.items()])


def events(rows: Rows) -> str:
    """What every event of a ladder of ranks cost."""
    head = ["lag", "event at step", "step before", "step after", "host part", "stall"]
    lines = [
        [
            *(f"{x['lag']}", f"{x['step']}"),
            *(f"{x[name]:.0f} ms" for name in ("step_ms", "step_after_ms")),
            f"{x['event_ms'] / 1e3:.2f} s",
            f"{x['stall_ms'] / 1e3:.1f} s",
            f"{x['stall_steps']:.1f}",
        ]
        for x in rows
    ]
    return table([*head, "stall in steps before"], lines)


def decompositions(rows: Rows) -> str:
    """Every route over the SVD, which has its time, and the worst error of each."""
    routes = list(dict.fromkeys(x["method"] for x in rows))
    lines = []
    for (what,), by in _grouped(rows, lambda x: x["what"]).items():
        cells = [f"{by[x]['ratio']:.2f}" for x in routes[1:]]
        lines.append([what, f"{by[routes[0]]['ms']:.0f} ms", *cells])
    for name in ("values_error", "excess"):
        worst = []
        for route in routes:
            found = [x[name] for x in rows if x["method"] == route and name in x]
            worst.append(f"{max(found):.0e}" if found else "")
        lines.append([f"largest {name.replace('_', ' ')}", *worst])
    return table(["matrices", *routes], lines)


def compression(runs: Rows) -> str:
    """Cosine / neighbours of every way, by the part that is kept."""
    head = ["keep", "plain SVD", "activations", "curvature, ranks by loss"]
    ways = ("plain", "activations", "curvature", "tuned")
    found: dict[float, dict[str, Any]] = {}
    for x in runs:
        told = found.setdefault(x["keep"], {"first": x})
        told |= {way: x[way] for way in ways if way in x}
    lines = []
    for keep, told in found.items():
        both = [told.get(way) for way in ways]
        cells = [
            f"{x['cosine']:.3f} / {x['neighbours']:.2f}" if x else "" for x in both
        ]
        first = told["first"]
        cells += [f"{first['predicted']:.3f}", f"{first['stored_weights'] / 1e6:.1f} M"]
        lines.append([f"{keep:.2f}", *cells, f"{first['seconds']:.0f} s"])
    tail = ["tuned", "predicted", "stored", "time without tuning"]
    return table([*head, *tail], lines)


def orthogonal(rows: Rows) -> str:
    """Milliseconds of every method, and how many times faster than the SVD two are."""
    methods = list(dict.fromkeys(x["method"] for x in rows))
    found: dict[str, dict[str, float]] = {}
    for x in rows:
        found.setdefault(x["what"], {})[x["method"]] = x["ms"]
    lines = []
    for what, ms in found.items():
        fast = ("polar_express, 3 steps", "newton_schulz, 5 steps")
        faster = ", ".join(f"{ms['svd'] / ms[x]:.1f}" for x in fast)
        cells = [f"{ms[x]:.3g}" if x in ms else "" for x in methods]
        lines.append([what, *cells, "" if "sgd" in ms else faster])
    return table(["", *methods, "times faster"], lines)


def tracking(rows: Rows) -> str:
    """What a record of the bases costs beside an epoch."""
    head = ["run", "an epoch", "a record", "with null and spectra"]
    found: dict[str, dict[str, Any]] = {}
    for x in rows:
        found.setdefault(x["what"], {})[x["record"]] = x
    lines = []
    for what, x in found.items():
        usual, detailed = x["usual"], x["detailed"]
        cells = [what, f"{usual['epoch_ms']:.0f} ms"]
        cells += [f"{usual['record_ms']:.1f} ms ({usual['share']:.1%})"]
        cells += [f"{detailed['record_ms']:.2g} ms", f"{x['all']['share']:.1%}"]
        lines.append(cells)
    return table([*head, "share of training, all"], lines)


def looking(rows: Rows) -> str:
    """A batch that is looked at over a step, and the sums over the weights."""
    head = ["model", "rank", "step, ms", "look, ms", "ratio", "sums over weights"]
    lines = []
    for x in rows:
        rank = x["rank_fraction"]
        cells = [x["model"], "dense" if rank is None else f"{rank:.3g}"]
        cells += [f"{x[name]:.1f}" for name in ("step_ms", "look_ms")]
        share = x["sums_bytes"] / x["weights_bytes"]
        lines.append([*cells, f"{x['ratio']:.2f}", f"{share:.2f}"])
    return table(head, lines)


def front_door(rows: Rows) -> str:
    """A step of each front door beside the same by hand."""
    head = ["front door", "ms a step", "by hand", "ratio", "middle half"]
    lines = []
    for x in rows:
        times = [f"{x[name]:.3f}" for name in ("ms", "by_hand_ms")]
        middle = f"{x['low']:.3f} to {x['high']:.3f}"
        lines.append([x["what"], *times, f"{x['ratio']:.4f}", middle])
    return table(head, lines)


def storage(rows: Rows) -> str:
    """Of runs that differ in their seed: the points lost, on average and at most."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for x in rows:
        run = re.sub(r"-seed\d+$", "", x["run"])
        found.setdefault((run, x["form"], x["dtype"]), []).append(x)
    lines = []
    for (run, form, dtype), mine in found.items():
        before, lost = ([100 * x[k] for x in mine] for k in ("of_run", "lost"))
        cells = [f"{len(mine)} {run}", f"{form}, {dtype}"]
        cells += [f"{x:.2f}" for x in (fmean(before), fmean(lost), max(lost))]
        lines.append([*cells, f"{fmean(x['bytes'] for x in mine):,.0f}"])
    head = ["runs", "form", "of the runs", "lost, mean", "lost, most", "bytes, mean"]
    return table(head, lines)


def evaluations(rows: Rows) -> str:
    """What a forecaster's record has of each evaluation, and of the weights by then."""
    head = ["run", "epoch", "test MSE", "MAE", "validation MSE", "trained", "stored"]
    lines = []
    for x in rows:
        cells = [x["run"], f"{x['epoch']:g}"]
        cells += [f"{x[name]:.4f}" for name in ("mse", "mae", "validation_mse")]
        cells += [f"{x[f'{name}_fraction']:.1%}" for name in ("trainable", "stored")]
        lines.append([*cells, f"{x['seconds'] / 60:.0f}"])
    return table([*head, "minutes"], lines)


TABLES: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "steps-cpu": ("rows", steps),
    "events-cpu": ("rows", events),
    "decompositions-cpu": ("rows", decompositions),
    "layers-cpu": ("rows", layers),
    "compress-minilm-cpu": ("runs", compression),
    "looking-cpu": ("rows", looking),
    "front_door-cpu": ("rows", front_door),
    "serve-cpu": ("rows", serve.table),
    "storage-cpu": ("rows", storage),
    "finetune-mnist-cpu": ("ways", finetune.table),
    "orthogonal-cpu": ("rows", orthogonal),
    "tracking-cpu": ("rows", tracking),
    "forecast-ettm2-192-cpu": ("rows", evaluations),
    "stability-cpu": ("rows", stability.table),
    "orthogonal-training-cpu": ("rows", orthogonal_training.table),
    **{x.stem: ("arms", controls.table) for x in sorted(FOLDER.glob("controls-*"))},
}
"""By the name of a JSON file: what of it is printed, and how."""


OVERVIEW = "controls-*"
"""Of all of these there is one table, in the README."""


def printed(name: str) -> str:
    """Host side: the table of a JSON file."""
    if name == OVERVIEW:
        return controls.overview(
            [_read(x.stem) for x in sorted(FOLDER.glob(f"{OVERVIEW}.json"))]
        )
    part, form = TABLES[name]
    return form(_read(name)[part])


def _read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


def marked(text: str) -> str:
    """Host side: a Markdown text with its tables printed anew.

    To a comment belong all tables below it with nothing but empty lines between them.
    """
    return re.sub(
        r"(<!-- (\S+)\.json -->\n)(?:\|.*\n(?:\n(?=\|))?)*",
        lambda found: f"{found[1]}{printed(found[2])}\n",
        text,
    )


def main(arguments: Sequence[str]) -> None:
    """Host side: print every table, or write them."""
    if list(arguments) not in ([], ["--write"]):
        sys.exit("usage: python -m train.results [--write]")
    if arguments:
        for path in (*FOLDER.glob("*.md"), FOLDER.parents[1] / "README.md"):
            path.write_text(marked(path.read_text()))
        return
    for name in TABLES:
        print(f"{name}.json\n\n{printed(name)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
