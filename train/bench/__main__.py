"""What low rank costs and saves: python -m train.bench --suite SUITE [--json FILE].

steps    time of a training step: dense, low rank in every order, GaLore and LoRA
events   what conversion and truncations cost, and for how long training stalls
layers   one matrix at a time against the cost model; --calibrate measures its rates

No data is needed. Everything runs in one process; whatever is compared is timed in
turn, once per round, after one untimed step, and the medians are reported.

Results:   train/results/; a suite takes minutes on two CPU cores
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence

import tyro

from train import files, process
from train.bench.events import events
from train.bench.layers import calibrate, layers
from train.bench.settings import Row, Settings
from train.bench.steps import steps
from train.bench.timing import table, write

SUITES: Mapping[str, Callable[[Settings], list[Row]]] = {
    "steps": steps,
    "events": events,
    "layers": layers,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: read the command line, measure, print a table, write the rows."""
    try:
        settings = tyro.cli(Settings, args=arguments, prog="python -m train.bench")
        settings = files.with_paths_expanded(settings)
        if settings.json is not None:
            files.writable_file(settings.json)
        if settings.calibrate:
            rates = dataclasses.asdict(calibrate(settings))
            text = json.dumps(rates, indent=2)
            print(text)
            if settings.json is not None:
                settings.json.write_text(text + "\n")
            return
        rows = SUITES[settings.suite](settings)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(table(rows))
    if settings.json is not None:
        write("train.bench", arguments, rows, settings.json)


if __name__ == "__main__":
    process.use_huge_pages()
    main()
