"""The files of a run: who may write them, what is never deleted, how they are read.

OUT/NAME has `metrics.jsonl`, the record, one JSON object a line; `summary.json`, the
result of a run that has ended; `checkpoints`; and `lock`, held by whoever writes there.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
LOCK = "lock"

Record = Mapping[str, Any]
S = TypeVar("S")


def say(text: str) -> None:
    """Host side: a line on stderr, about what went wrong and was put right."""
    print(text, file=sys.stderr)


def expanded(path: pathlib.Path) -> pathlib.Path:
    """Host side: the path with the home folder in the place of its `~`.

    Raises:   ValueError: a URL, whose files are not on this machine, or no such home.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(f"{path} is a URL: name a folder, as of a mounted bucket")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


def writable(path: pathlib.Path) -> pathlib.Path:
    """Host side: the expanded path of a folder that exists or can be made.

    Raises:   ValueError: a URL, or the path or one above it is a file or read-only.
    """
    path = expanded(path)
    above = next(x for x in (path, *path.absolute().parents) if x.exists())
    if not above.is_dir():
        raise ValueError(f"{above} is a file: name another folder than {path}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{above} is not writable: name another folder than {path}")
    return path


def writable_file(path: pathlib.Path) -> pathlib.Path:
    """Host side: the expanded path of a file that can be written, its folder made.

    Raises:   ValueError: as `writable`, or a file cannot be opened there.
    """
    path = expanded(path)
    writable(path.parent)
    there = os.path.lexists(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): name another file"
        ) from None
    if not there:
        path.unlink()
    return path


def with_paths_expanded(settings: S) -> S:
    """Host side: settings with every path in them expanded.

    Raises:   ValueError: one of them is a URL.
    """
    values = vars(settings).items()
    paths = {k: expanded(x) for k, x in values if isinstance(x, pathlib.Path)}
    return dataclasses.replace(settings, **paths)  # type: ignore[type-var]


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Host side: the folder, made and locked for process 0 of this run.

    The kernel's lock: it is gone when the process is, however that ended. The file
    stays, with the number of the last process.

    Raises:   FileExistsError: another process holds it.
    """
    if jax.process_index() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise FileExistsError(
                f"process {stream.read().strip() or 'another'} writes in {folder} now: "
                "wait for it, or name another folder"
            ) from None
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield


def begin(folder: pathlib.Path, *, overwrite: bool = False) -> None:
    """Host side: an empty record in `folder`; what is deleted was to be overwritten.

    Raises:   FileExistsError: a run in there has ended, or has checkpoints.
    """
    saved = folder / CHECKPOINTS
    ended = (folder / SUMMARY).exists()
    names = [x.name for x in saved.iterdir()] if saved.exists() else []
    whole = any(x.removesuffix(".damaged").isdigit() for x in names)
    if ended and not overwrite:
        raise FileExistsError(
            f"{folder} has a run that has ended: choose another --name, or delete it "
            "by --overwrite"
        )
    if whole and not overwrite:
        raise FileExistsError(
            f"{folder} has checkpoints of a run that did not end: go on with it by "
            "--resume, choose another --name, or delete it by --overwrite"
        )
    agree(f"begin {folder}")
    if jax.process_index() == 0:
        shutil.rmtree(saved, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS).write_text("")
        (folder / SUMMARY).unlink(missing_ok=True)
    agree(f"begun {folder}")


def resume(folder: pathlib.Path, size: int) -> None:
    """Host side: the record as it was at a checkpoint; what was written later goes.

    Args:     size: of the record at the checkpoint, in bytes.
    """
    if jax.process_index() == 0:
        path = folder / METRICS
        found = length(path)
        if found < size:
            say(
                f"{path} has {found} bytes and had {size} at the checkpoint: lines of "
                "the record are lost"
            )
        with path.open("ab") as stream:
            stream.truncate(min(found, size))
        mend(path)
        (folder / SUMMARY).unlink(missing_ok=True)
    agree(f"resume {folder}")


def mend(path: pathlib.Path) -> None:
    """Host side: drop, and name, a last line whose writing was cut short."""
    whole, end, cut = path.read_bytes().rpartition(b"\n")
    if cut:
        os.truncate(path, len(whole) + len(end))
        say(f"{path}: the last line was cut short and is dropped: {_shown(cut)}")


def append(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Host side: one JSON line at the end of `path`; process 0 alone writes.

    What is not finite is null: JSON has no such numbers.
    """
    if jax.process_index() == 0:
        with path.open("a") as stream:
            stream.write(json.dumps(nulled(values), allow_nan=False) + "\n")


def finish(folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Host side: the result of the run, as `summary.json`, written whole or not."""
    if jax.process_index() == 0:
        text = json.dumps(nulled(summary), indent=2, allow_nan=False)
        part = folder / f"{SUMMARY}.part"
        part.write_text(text + "\n")
        part.replace(folder / SUMMARY)


def read(folder: pathlib.Path) -> list[Record]:
    """Host side: the record of a run.

    Raises:   FileNotFoundError: `folder` holds none.
    """
    path = folder / METRICS
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {folder} is no folder of a run")
    return lines(path, {"kind", "step"})


def lines(path: pathlib.Path, needed: set[str]) -> list[Record]:
    """Host side: the lines of a record; those that are none are named and skipped."""
    found: list[Record] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and needed <= record.keys():
            found.append(record)
        else:
            say(f"{path}, line {number} is no record and is skipped: {_shown(line)}")
    return found


def summary(folder: pathlib.Path) -> dict[str, Any]:
    """Host side: the result of a run.

    Raises:   FileNotFoundError: there is none yet. ValueError: it cannot be read.
    """
    path = folder / SUMMARY
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: the run in there did not end")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is broken ({error}): write it again by --resume"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is broken: write it again by --resume")
    return found


def without_places(settings: Any) -> dict[str, str]:
    """Settings as text, for a record; a path says nothing of what was computed."""
    found = ((x.name, getattr(settings, x.name)) for x in dataclasses.fields(settings))
    return {name: str(x) for name, x in found if not isinstance(x, pathlib.Path)}


def nulled(x: Any) -> Any:
    """x with None in the place of every number that is not finite."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        x = dataclasses.asdict(x)
    if isinstance(x, Mapping):
        return {key: nulled(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [nulled(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def length(path: pathlib.Path) -> int:
    """Host side: the bytes of a file, flushed to disk; 0 if it does not exist."""
    if not path.exists():
        return 0
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        return stream.seek(0, os.SEEK_END)


def agree(where: str) -> None:
    """Host side: wait for the other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")
