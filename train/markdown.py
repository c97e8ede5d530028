"""Tables as every program prints them and as the results have them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Any, form: str, *, scale: float = 1, ddof: int = 1) -> str:
    """Mean ± deviation; the mean alone of one value, of which a sample has none.

    >>> spread([0.9, 0.94], ".1f", scale=100)
    '92.0 ± 2.8'
    """
    mean = format(scale * np.mean(values), form)
    if len(values) <= ddof:
        return mean
    deviation = scale * np.std(values, ddof=ddof)
    return f"{mean} ± {deviation:.{len(mean.partition('.')[2])}f}"
