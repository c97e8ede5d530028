"""Search for a recipe of low rank: python -m train.studies.sweep PRESET.

Tries cutoffs, delays, intervals, steps over the layers and learning rates of a preset
of train.images, train.forecast or train.text, for the best metric at the fewest stored
weights, and prints the trials that no other beats in both. It keeps what it knows in
OUT/PRESET/sweep.db, beside the folders of its runs: the same command goes on after a
kill, and with more --trials adds to those that are done. Trials of another length or
seed, or of small forms, are no trials of the same search.

Choose by validation images where a preset has them, or by other seeds than you report.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import optuna
import tyro

from train import files, forecast, images, names, process, text
from train import settings as common
from train.markdown import table

PROGRAMS: Sequence[tuple[Any, Literal["maximize", "minimize"]]] = (
    (images, "maximize"),
    (forecast, "minimize"),
    (text, "minimize"),
)
"""Programs, and which end of their metric is good."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is tried, and where."""

    preset: tyro.conf.Positional[str]
    """Of train.images, train.forecast or train.text."""
    trials: int = 20
    """Runs altogether, those of earlier calls included."""
    steps: int | None = None
    """Length of a run, if not the preset's."""
    seed: int = 0
    """Of the runs and of the search."""
    smoke: bool = False
    """Small forms on random data: only shows that the program works."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where `python -m train.data.prepare` put the dataset."""
    out: pathlib.Path = pathlib.Path("runs/sweeps")
    """The search goes to a folder in here."""


def search(settings: Settings) -> optuna.Study:
    """Host side: the study, once it has as many trials as were asked for.

    Raises:   ValueError: an unknown preset, no trials, or a file that has no study.
    """
    if settings.trials < 1:
        raise ValueError(f"`trials` must be at least 1, got {settings.trials}")
    settings = files.with_paths_expanded(settings)
    programs = {
        name: (program, usual, direction)
        for program, direction in PROGRAMS
        for name, (_, usual) in program.PRESETS.items()
    }
    program, usual, direction = names.find("preset", settings.preset, programs)
    base = dataclasses.replace(
        usual,
        method="oialr",
        steps=settings.steps or usual.steps,
        seed=settings.seed,
        smoke=settings.smoke,
        data_dir=settings.data_dir,
    )
    name = comparable(settings.preset, base)
    folder = files.writable(settings.out / settings.preset)
    base = dataclasses.replace(base, out=folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'sweep.db'}",
            study_name=name,
            directions=[direction, "minimize"],
            load_if_exists=True,
        )
    except Exception as error:  # whatever a damaged file makes of its readers
        raise ValueError(
            f"{folder / 'sweep.db'} cannot be read: delete it or choose another --out "
            f"({str(error).splitlines()[0]})"
        ) from None
    done = sum(x.state.is_finished() for x in study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=settings.seed + done)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        try:
            given = drawn(trial, base)
            summary = program.run(given, name=f"trial{trial.number}")
        except ValueError as error:  # a schedule that does not fit into the run
            raise optuna.TrialPruned(str(error)) from error
        if not summary["best"]:
            raise optuna.TrialPruned("no evaluation was finite")
        return summary["best"][summary["metric"]], summary["stored_fraction"]

    study.optimize(
        objective, n_trials=max(0, settings.trials - done), catch=FloatingPointError
    )
    return study


def comparable(preset: str, base: common.Settings) -> str:
    """The name of the study of all trials that compare with these settings."""
    form = "-smoke" if base.smoke else f"-steps{base.steps}"
    return f"{preset}{form}-seed{base.seed}"


def drawn(trial: optuna.Trial, base: common.Settings) -> Any:
    """Settings of one trial; learning rates up to four times away from the usual."""
    rate = base.learning_rate
    return dataclasses.replace(
        base,
        cutoff=trial.suggest_float("cutoff", 0.02, 0.8, log=True),
        delay=trial.suggest_float("delay", 0.1, 0.6),
        every=trial.suggest_float("every", 0.03, 0.3, log=True),
        layer_step=trial.suggest_float("layer_step", 0.1, 1.0),
        learning_rate=trial.suggest_float(
            "learning_rate", rate / 4, rate * 4, log=True
        ),
    )


def markdown(study: optuna.Study) -> str:
    """The trials that none beats in both, from most to fewest stored weights."""
    best = sorted(study.best_trials, key=lambda x: x.values[1], reverse=True)
    tried = list(best[0].params) if best else []
    head = ["trial", "metric", "stored", *(x.replace("_", " ") for x in tried)]
    rows = []
    for x in best:
        numbers = [str(x.number), f"{x.values[0]:.4g}", f"{x.values[1]:.1%}"]
        rows.append([*numbers, *(f"{x.params[name]:.3g}" for name in tried)])
    return table(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: search, and print what was found."""
    settings = tyro.cli(Settings, args=arguments, prog="python -m train.studies.sweep")
    try:
        print(markdown(search(settings)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    process.use_huge_pages()
    main()
