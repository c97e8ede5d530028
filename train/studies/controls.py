"""Low rank against its controls: python -m train.studies.controls PRESET.

Command:   python -m train.studies.controls mnist-lenet5 --budgets 0.0317 0.0692 0.1845
           (--data-dir as for the preset; --seeds, --out)

For each budget, a part of all weights, the preset is trained by the plain rule and
weighed by curvature, and beside them the controls that such a number needs: the dense
network, the dense network with Muon, and a small dense network, of all widths scaled,
that stores no more weights. Each of the controls has the best of several rates, chosen
on a seed that is not reported (one rate alone is taken untried); so has each of
--optimizers, which train runs of the plain rule, and at that rate weighed ones; Muon
and SWAN train small dense networks too. A second command of other --options with a
--label adds to the table. Every run is a folder in OUT; the same command goes on after
a kill. OUT/PRESET/controls.json has what was measured, and the table is printed.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tyro

import oialr_jax as oialr
from train import files, forecast, images, markdown, names, process, text

PROGRAMS = {"train.images": images, "train.text": text, "train.forecast": forecast}
WHOLE = frozenset({"muon", "swan"})
"""Optimizers that small dense networks have too."""
CHOOSING = 100
"""The seed on which rates are chosen."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which runs are compared."""

    preset: tyro.conf.Positional[str]
    """Of train.images, train.text or train.forecast."""
    budgets: tuple[float, ...]
    """Parts of all weights that are stored."""
    options: tuple[str, ...] = ()
    """More settings of the low-rank runs, NAME=VALUE each."""
    label: str = ""
    """Begins the names of these runs in the table."""
    optimizers: tuple[str, ...] = ()
    """Of train.optimizers: each trains plain and weighed runs too, at its best rate."""
    rates: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Tried for each control, times the preset's."""
    batches: int = 8
    """Of which curvature is measured before each cut."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Reported."""
    steps: int | None = None
    """Length of a run, if not the preset's."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where `python -m train.data.prepare` put the dataset."""
    out: pathlib.Path = pathlib.Path("runs/controls")
    """Runs go to a folder in here."""


def measured(settings: Settings) -> dict[str, Any]:
    """Host side: every arm with its runs, as written to OUT/PRESET/controls.json.

    Raises:   ValueError: an unknown preset, no rate, or a controls.json to which these
              runs cannot be added. RuntimeError: a run failed.
    """
    if not settings.rates:
        raise ValueError("`rates` must have one at least")
    table = {name: x for x, y in PROGRAMS.items() for name in y.PRESETS}
    program = names.find("preset", settings.preset, table)
    usual = PROGRAMS[program].PRESETS[settings.preset][1]
    path = settings.out / settings.preset / "controls.json"
    before = _earlier(settings, path)
    run = functools.partial(_run, settings, program)
    rates = [x * usual.learning_rate for x in settings.rates]
    low = ["--" + x.replace("=", " ") for x in settings.options]
    small_too = [x for x in settings.optimizers if x in WHOLE]

    def best(*options: str) -> dict[str, Any]:
        return _best(settings, run, options, rates)

    def each(*options: str) -> dict[str, Any]:
        runs = [run(options, seed) for seed in settings.seeds]
        return {"options": list(options), "runs": runs}

    arms = {
        "dense": best("--method dense"),
        "dense, Muon": best("--method dense", "--optimizer muon"),
    }
    for budget in settings.budgets:
        scale = _scale(settings, PROGRAMS[program], usual, budget)
        small = ["--method dense", f"--scale {scale}"]
        given = [*low, f"--budget {budget}"]
        weigh = f"--weigh {settings.batches}"
        mine = {"small dense": best(*small)}
        for name in small_too:
            mine[f"small dense, {name}"] = best(*small, f"--optimizer {name}")
        mine[f"{settings.label}plain"] = each(*given, "--weigh 0")
        mine[f"{settings.label}weighed"] = each(*given, weigh)
        for name in settings.optimizers:
            plain = best(*given, f"--optimizer {name}")
            mine[f"{settings.label}{name}"] = plain
            mine[f"{settings.label}{name} and weighed"] = each(*plain["options"], weigh)
        arms |= {f"{name}, {budget:.4g}": arm for name, arm in mine.items()}
    result = {
        **_shared(settings),
        "labels": {**before.get("labels", {}), settings.label: list(settings.options)},
        "arms": {**before.get("arms", {}), **arms},
    }
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return result


def _shared(settings: Settings) -> dict[str, Any]:
    """What all runs of one table have in common."""
    return {
        "preset": settings.preset,
        "seeds": list(settings.seeds),
        "steps": settings.steps,
        "rates": list(settings.rates),
        "batches": settings.batches,
        "jax": jax.__version__,
    }


def _earlier(settings: Settings, path: pathlib.Path) -> dict[str, Any]:
    """Host side: the table to which these runs are added; empty without one.

    Raises:   ValueError: it cannot be read, or has other runs under these names.
    """
    if not path.exists():
        return {}
    try:
        before: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is broken ({error}): delete it, the runs beside it are kept"
        ) from None
    for name, value in _shared(settings).items():
        if before.get(name) != value:
            raise ValueError(
                f"{path} has {name} {before.get(name)}, not {value}: name another --out"
            )
    known = before["labels"].get(settings.label, list(settings.options))
    if known != list(settings.options):
        raise ValueError(
            f"{path} has runs labelled {settings.label!r} with --options "
            f"{' '.join(known)}: give these another --label"
        )
    return before


def _best(
    settings: Settings, run: Any, options: Sequence[str], rates: Sequence[float]
) -> dict[str, Any]:
    """The runs of a control at the rate that was best on the choosing seed."""
    tried: dict[str, float] = {}
    chosen = f"{rates[0]:g}"
    if len(rates) > 1:
        for rate in rates:
            found = run([*options, f"--learning-rate {rate:g}"], CHOOSING)
            if found["best"]:  # else no evaluation was finite
                tried[f"{rate:g}"] = found["best"][found["metric"]]
        if not tried:
            raise RuntimeError(f"{' '.join(options)}: not finite at any rate")
        largest = "loss" not in found["metric"] and "mse" not in found["metric"]
        chosen = (max if largest else min)(tried, key=lambda x: tried[x])
    options = [*options, f"--learning-rate {chosen}"]
    return {
        "options": options,
        "tried": tried,
        "runs": [run(options, seed) for seed in settings.seeds],
    }


def _run(
    settings: Settings, program: str, options: Sequence[str], seed: int
) -> dict[str, Any]:
    """The summary of one run, in a process of its own, or of one that has ended."""
    folder = settings.out / settings.preset
    name = "_".join(x.lstrip("-").replace(" ", "-") for x in options) + f"-seed{seed}"
    if settings.steps is not None:
        name = f"steps-{settings.steps}_{name}"
    summary = folder / name / files.SUMMARY
    if not summary.exists():
        words = [word for x in options for word in x.split()]
        if settings.steps is not None:
            words += ["--steps", str(settings.steps)]
        words += ["--seed", str(seed), "--name", name, "--out", str(folder)]
        words += ["--data-dir", str(settings.data_dir), "--mesh", "data=1", "--resume"]
        command = [sys.executable, "-m", program, settings.preset, *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if not summary.exists():
            last = done.stderr.strip().rpartition("\n")[2]
            raise RuntimeError(f"{' '.join(command)} failed: {last}")
    keys = ("metric", "best", "stored_weights", "dense_weights", "wall_seconds")
    found = files.summary(folder / name)
    tests = {k: x for k, x in found.items() if k.startswith("test_")}
    return {"seed": seed, **{k: found[k] for k in keys}, **tests}


def _scale(settings: Settings, program: Any, usual: Any, budget: float) -> float:
    """The largest scale, in steps of a hundredth, at which a network is in budget."""

    @functools.cache
    def weights(percent: int) -> int:
        changed = dataclasses.replace(
            usual, scale=percent / 100, data_dir=settings.data_dir, mesh="data=1"
        )
        init = program.task(changed).init
        return oialr.counts(jax.eval_shape(init, jax.random.key(0))["params"]).stored

    low, high = 1, 100
    while high - low > 1:
        middle = (low + high) // 2
        if weights(middle) <= budget * weights(100):
            low = middle
        else:
            high = middle
    return low / 100


def _tested(arm: Mapping[str, Any]) -> tuple[str, list[float], str]:
    """What was measured, in per cent if it is accuracy, by seed; digits to show."""
    metric = arm["runs"][0]["metric"].removeprefix("validation_")
    tested = [x[f"test_{metric}"] for x in arm["runs"]]
    values = [math.nan if x is None else x for x in tested]  # not finite
    if metric == "accuracy":
        return "accuracy, %", [100 * x for x in values], ".2f"
    return metric, values, ".4f"


def table(arms: Mapping[str, Any]) -> str:
    """Markdown: mean ± sample deviation over seeds of the metric, and weights."""
    lines = []
    for name, arm in arms.items():
        metric, values, form = _tested(arm)
        each = " ".join(format(x, form) for x in values)
        weights = statistics.mean(x["stored_weights"] for x in arm["runs"])
        # The wall time of a run may be unknown; its weights and metric never are.
        timed = [x["wall_seconds"] for x in arm["runs"] if "wall_seconds" in x]
        seconds = f"{statistics.median(timed):.0f}" if timed else "-"
        named = [x.split() for x in arm["options"]]
        rate = next((x[1] for x in named if x[0] == "--learning-rate"), "preset's")
        lines.append(
            [
                *(name, f"{weights:,.0f}", markdown.spread(values, form), each),
                *(rate, seconds),
            ]
        )
    head = ["run", "weights", f"test {metric}", "seeds", "rate", "s"]
    return markdown.table(head, lines)


KINDS = ("small dense", "plain", "weighed")
"""Of the runs of a budget, what the overview has."""


def overview(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each preset, budget and label, a column for each kind."""
    lines = []
    for result in results:
        arms = result["arms"]
        budgets = dict.fromkeys(x.rpartition(", ")[2] for x in arms)
        for budget, label in itertools.product(budgets, result["labels"]):
            kinds = (KINDS[0], *(f"{label}{x}" for x in KINDS[1:]))
            names = ["dense", "dense, Muon", *(f"{x}, {budget}" for x in kinds)]
            if names[-1] not in arms:
                continue
            found = [_tested(arms[name]) for name in names]
            named = ", ".join(filter(None, (result["preset"], label.strip())))
            task = named, found[0][0], f"{float(budget):.1%}"
            lines.append([*task, *(markdown.spread(x, form) for _, x, form in found)])
    head = ["preset", "test", "weights", "dense", "dense, Muon", *KINDS]
    return markdown.table(head, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    settings = tyro.cli(Settings, args=arguments, prog="train.studies.controls")
    try:
        settings = files.with_paths_expanded(settings)
        files.writable(settings.out)
        result = measured(settings)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(table(result["arms"]))


if __name__ == "__main__":
    process.use_huge_pages()
    main()
