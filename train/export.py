"""Write a trained run as a program that needs none of its code: python -m train.export.

Command:   python -m train.export runs/digits-oialr-seed0 --form factors
Result:    runs/digits-oialr-seed0/export, with weights.safetensors,
           program.stablehlo and manifest.json; see `oialr_jax.export`

It takes the latest checkpoint of a run of train.images, train.text, train.forecast or
train.selfsup, and of params with a running average that average. The program takes what
the dataset has (pixels from 0 to 255, characters, rows of a series) and gives logits,
forecasts or features. Arrays are called as Flax calls them, params/LAYER/kernel.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import tyro

import oialr_jax as oialr
from oialr_jax.export import Exported
from train import files, forecast, images, recipe, selfsup, text
from train.settings import PLACE_ONLY

PROGRAMS = (images, text, forecast, selfsup)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which run is written, where, and in which form."""

    run: tyro.conf.Positional[pathlib.Path]
    """Folder of the run."""
    out: pathlib.Path | None = None
    """A new folder; by default RUN/export."""
    form: Literal["auto", "factors", "identity", "core", "dense"] = "auto"
    """auto: two factors where they are smaller and faster, else dense."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    """Of the arrays in the file; int8 with form core alone, or auto."""
    batch: int = 64
    """By which it is decided what is faster; the program takes every batch size."""
    evaluate: bool = False
    """Say what the test set says of the run and of what was written."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where `python -m train.data.prepare` put the dataset, which has its mean."""


class Opened(NamedTuple):
    """A run as it was left: its settings, task, and the latest variables."""

    stored: Mapping[str, Any]
    task: recipe.Task
    begun: recipe.Begun
    variables: Mapping[str, Any]


def opened(folder: pathlib.Path, data_dir: pathlib.Path) -> Opened:
    """Host side: a run, and the variables of its latest checkpoint.

    Raises:   FileNotFoundError: there is no run. ValueError: no checkpoint is whole,
              or it is of none of our programs.
    """
    if not (folder / files.CHECKPOINTS).is_dir():
        raise FileNotFoundError(
            f"{folder} is no run: it has no {files.CHECKPOINTS}; name the folder that "
            "a program wrote, as runs/digits-oialr-seed0"
        )
    with oialr.Checkpoints(folder / files.CHECKPOINTS) as checkpoints:
        extra = checkpoints.extra()
        if extra is None or "settings" not in extra:
            raise ValueError(f"{folder} has no checkpoint that can be read")
        stored = extra["settings"]
        program, settings = _settings(stored, data_dir, folder)
        task = program.task(settings)
        begun = recipe.begun(settings, task)
        template = jax.eval_shape(begun.create, begun.key)
        found = checkpoints.restore(template, begun.tx)
    if found is None:
        raise ValueError(f"{folder} has no checkpoint that can be read")
    state = found.state
    variables = {"params": state.averaged, **state.extra}
    return Opened(stored, task, begun, variables)


def _settings(
    stored: Mapping[str, Any], data_dir: pathlib.Path, folder: pathlib.Path
) -> tuple[Any, Any]:
    """The program whose settings these are, and the settings."""
    for program in PROGRAMS:
        fields = {x.name for x in dataclasses.fields(program.Settings)}
        if fields - PLACE_ONLY == set(stored):
            return program, program.Settings(**stored, data_dir=data_dir, mesh="data=1")
    raise ValueError(
        f"{folder} was made by another version: its settings are {', '.join(stored)}"
    )


class Evaluated(NamedTuple):
    """What is evaluated in the place of a run's state."""

    averaged: Any
    extra: Mapping[str, Any]


def evaluated(task: recipe.Task, variables: Mapping[str, Any]) -> dict[str, float]:
    """Host side: numbers over the test set, of params in any form."""
    extra = {name: x for name, x in variables.items() if name != "params"}
    state: Any = Evaluated(variables["params"], extra)
    return dict(task.evaluate(state))


def run(settings: Settings) -> tuple[Exported, dict[str, dict[str, float]]]:
    """Host side: the export that was written, and evaluations, if they were asked for.

    Raises:   as `opened` and `oialr_jax.export`.
    """
    settings = files.with_paths_expanded(settings)
    out = files.writable(settings.out or settings.run / "export")
    found = opened(settings.run, settings.data_dir)
    program = written(found, out, settings.form, settings.dtype, settings.batch)
    if not settings.evaluate:
        return program, {}
    each = {"run": found.variables, "export": program.params}
    return program, {name: evaluated(found.task, x) for name, x in each.items()}


def written(
    run: Opened, folder: pathlib.Path, form: str, dtype: str | None, batch: int
) -> Exported:
    """Host side: a run as a program in a new folder.

    Raises:   ValueError: `batch` below 1. As `oialr_jax.export`.
    """
    if batch < 1:
        raise ValueError(f"`batch` must be at least 1, got {batch}")
    task = run.task

    def fn(variables: Mapping[str, Any], *inputs: Any) -> Any:
        extra = {name: x for name, x in variables.items() if name != "params"}
        return task.forward(variables["params"], extra, *inputs)

    example = [
        jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in task.inputs
    ]
    return oialr.export(folder, fn, run.variables, *example, form=form, dtype=dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    settings = tyro.cli(Settings, args=arguments, prog="python -m train.export")
    try:
        found, numbers = run(settings)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    files, count = found.manifest["files"], found.manifest["numbers"]
    size = sum(x["bytes"] for x in files.values())
    print(
        f"{found.folder}: {count['stored']} of {count['dense']} weights, "
        f"{size / 1e6:.2f} MB; python -m train.predict {found.folder} INPUT.npy"
    )
    for name, values in numbers.items():
        print(f"{name}: {', '.join(f'{k} {x:.6g}' for k, x in values.items())}")


if __name__ == "__main__":
    main()
