"""How times are taken and told: in turn, medians over rounds, with where and when."""

import contextlib
import json
import os
import pathlib
import platform
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import tyro

from oialr_jax import surgery
from train import files, markdown, process
from train.bench.settings import Row


class Told(Protocol):
    """Settings that say where the rows go."""

    @property
    def json(self) -> pathlib.Path | None:
        """A file, if there is to be one."""
        ...


S = TypeVar("S", bound=Told)

SAMPLE = 0.1
"""Seconds that one sample takes at least: short runs are repeated to fill it."""


def interleaved(
    runs: Sequence[Callable[[], Any]], repeats: int
) -> list[tuple[float, float, float]]:
    """Host side: (median, least, most) seconds of each run, all in turn every round.

    Before each sample the run goes once unmeasured, because the run before it has
    filled caches and allocator with its own.
    """
    counts = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        counts.append(max(1, round(SAMPLE / (time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, count, taken in zip(runs, counts, times, strict=True):
            run()
            start = time.perf_counter()
            for _ in range(count):
                run()
            taken.append((time.perf_counter() - start) / count)
    return [(statistics.median(taken), min(taken), max(taken)) for taken in times]


def compared(
    what: str, runs: Mapping[str, Callable[[], Any]], repeats: int
) -> list[Row]:
    """Host side: a row for each run, with the ratio to the first."""
    times = interleaved(list(runs.values()), repeats)
    base, *_ = times[0]
    return [
        {
            "what": what,
            "method": name,
            "ms": 1e3 * middle,
            "ms_min": 1e3 * least,
            "ms_max": 1e3 * most,
            "ratio": middle / base,
            "backend": jax.default_backend(),
        }
        for name, (middle, least, most) in zip(runs, times, strict=True)
    ]


class Span(NamedTuple):
    """When one tracing, lowering or compilation ran, and who waited for it.

    `main`: the main thread, outside of rank events, whose time is counted with them.
    """

    start: float
    end: float
    main: bool


@contextlib.contextmanager
def compile_times() -> Iterator[list[Span]]:
    """Host side: a list that grows by every tracing, lowering and compilation."""
    log: list[Span] = []
    main = threading.get_ident()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        in_main = threading.get_ident() == main
        for frame, _line in traceback.walk_stack(None):
            if in_main and frame.f_code.co_filename == surgery.__file__:
                return
        now = time.perf_counter()
        log.append(Span(now - duration_secs, now, in_main))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield log
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def covered(log: Sequence[Span], *, main: bool) -> float:
    """Seconds in which the main thread, or another one, was at it; nested ones once."""
    total, until = 0.0, 0.0
    for span in sorted(x for x in log if x.main == main):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def table(rows: Sequence[Row]) -> str:
    """Rows as a GitHub table, one column for every name in any of them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def text(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [[text(row.get(name)) for name in columns] for row in rows]
    return markdown.table(columns, lines)


def command(
    program: str,
    kind: type[S],
    measured: Callable[[S], list[Row]],
    shown: Callable[[list[Row]], str],
    arguments: Sequence[str] | None = None,
) -> None:
    """Host side: read the command line, measure, write the rows, print their table.

    Args:     program: as it is called, "train.serve". kind: settings with a `json`.
    """
    try:
        settings = tyro.cli(kind, args=arguments, prog=f"python -m {program}")
        settings = files.with_paths_expanded(settings)
        path = settings.json
        if path is not None:  # before what takes minutes
            files.writable_file(path)
        rows = measured(settings)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(shown(rows))
    if path is not None:
        write(program, arguments, rows, path)


def write(
    program: str, arguments: Sequence[str] | None, rows: list[Row], path: pathlib.Path
) -> None:
    """Host side: the rows, with the command, device, versions and date.

    A file that cannot be written any more ends the program with one line: print first.
    """
    record = {
        "command": ["python", "-m", program, *(arguments or sys.argv[1:])],
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "huge_pages": process.has_huge_pages(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    text = json.dumps(files.nulled(record), indent=1, allow_nan=False)
    try:
        path.write_text(text + "\n")
    except OSError as error:
        sys.exit(f"error: {path} is not written: {error}")
