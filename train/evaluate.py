"""Whole splits in pieces of one shape, for which a program is compiled once."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

import oialr_jax as oialr


def pieces(
    rows: Callable[[np.ndarray], Any],
    count: int,
    size: int,
    layout: oialr.sharding.Layout,
) -> Iterator[tuple[Any, Array]]:
    """Host side: every row once, on the devices; and which rows of a piece count.

    The last piece is filled up with rows that do not.

    Args:     rows: numbers of rows -> their arrays; this process asks for its part.
              size: of a piece, about.
    """
    size = -(-min(count, size) // layout.shards) * layout.shards
    part = layout.rows(size)
    for start in range(0, count, size):
        numbers = np.arange(start, start + size)[part]
        inside = numbers < count
        yield layout.put_batch((rows(np.where(inside, numbers, 0)), inside), size)


def total(
    sums: Callable[[Any, Array], tuple[Array, ...]],
    rows: Callable[[np.ndarray], Any],
    count: int,
    size: int,
    layout: oialr.sharding.Layout,
) -> Float[np.ndarray, " k"]:
    """Host side: (piece, which rows count) -> sums, added up in float64."""
    each = (jax.device_get(sums(*x)) for x in pieces(rows, count, size, layout))
    return np.sum([np.asarray(x, np.float64) for x in each], axis=0)
