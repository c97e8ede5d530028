"""Names that a user types, of datasets, models and presets: found, or the nearest."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def find(kind: str, name: str, table: Mapping[str, T]) -> T:
    """The entry of `table` called `name`.

    Raises:   ValueError: there is none; the message has the nearest name and all names.

    >>> find("dataset", "digit", {"digits": 1, "mnist": 2})
    Traceback (most recent call last):
    ValueError: unknown dataset 'digit', did you mean 'digits'? There are: digits, mnist
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    hint = f", did you mean '{near[0]}'?" if near else "."
    raise ValueError(f"unknown {kind} '{name}'{hint} There are: {', '.join(table)}")
