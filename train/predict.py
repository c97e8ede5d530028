"""Run what was exported on inputs from a file: python -m train.predict EXPORT INPUT.

Command:   python -m train.predict runs/digits-oialr-seed0/export images.npy

INPUT is a .npy file with the one input, or a .npz with all of them under the names that
the manifest has ("0", "1", ...). The outputs go to OUT.npz under theirs; the one output
of a function is called "output".
"""

import dataclasses
import os
import pathlib
import sys
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tyro

import oialr_jax as oialr
from oialr_jax.lowrank import path_name
from train import files


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run on what."""

    export: tyro.conf.Positional[pathlib.Path]
    """A folder that `oialr_jax.export` or `python -m train.export` wrote."""
    input: tyro.conf.Positional[pathlib.Path]
    """A .npy or .npz file."""
    out: pathlib.Path = pathlib.Path("outputs.npz")
    """Where the outputs go."""


def read(path: pathlib.Path, names: Sequence[str]) -> list[np.ndarray]:
    """Host side: the arrays of a file, in the order of the inputs.

    Raises:   FileNotFoundError: there is no file. ValueError: it is none of NumPy's, or
              has other arrays.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: name a .npy or .npz file")
    try:
        with path.open("rb") as file:  # np.load leaves a damaged one open
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                found = {names[0]: found} if len(names) == 1 else {"array": found}
            arrays: Mapping[str, np.ndarray] = {name: found[name] for name in found}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no .npy or .npz file: {error}") from error
    if set(arrays) != set(names):
        raise ValueError(
            f"{path}: expected the arrays {', '.join(names)}, found {', '.join(arrays)}"
        )
    return [arrays[name] for name in names]


def run(settings: Settings) -> dict[str, np.ndarray]:
    """Host side: the outputs by name, which are in the file now.

    Raises:   ValueError: OUT has another ending, or cannot be written. As
              `oialr_jax.load`, its result, and `read`.
    """
    if settings.out.suffix != ".npz":
        raise ValueError(f"`out` must end in .npz, got {settings.out}")
    settings = files.with_paths_expanded(settings)
    files.writable_file(settings.out)
    program = oialr.load(settings.export)
    names = [x["path"] for x in program.manifest["inputs"]]
    arrays = read(settings.input, names)
    outputs = jax.device_get(program(*program.arranged(arrays)))
    flat = jax.tree_util.tree_leaves_with_path(outputs)
    named = {path_name(path) or "output": np.asarray(x) for path, x in flat}
    part = settings.out.with_name(f".{settings.out.stem}.part.npz")
    try:
        np.savez(part, **_storable(named))
        os.replace(part, settings.out)
    finally:
        part.unlink(missing_ok=True)
    return named


def _storable(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays in dtypes that NumPy's files have; those of JAX alone as float32."""
    return {
        name: x if x.dtype.kind in "biufc" else x.astype(np.float32)
        for name, x in arrays.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    settings = tyro.cli(Settings, args=arguments, prog="python -m train.predict")
    start = time.perf_counter()
    try:
        outputs = run(settings)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    said = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in outputs.items())
    print(f"{settings.out}: {said}, in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
