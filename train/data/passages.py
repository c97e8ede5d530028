"""Passages of a text as tokens: some to measure on, disjoint ones to compress with."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

SHORTEST = 48
"""Characters: a shorter passage says little."""
LONGEST = 128
"""Tokens of a passage; what is longer is cut off."""
STEP = 16
"""Lengths of batches are multiples of it: few shapes are compiled."""


class Batch(NamedTuple):
    """Some passages of about one length, padded, and which they are."""

    tokens: Int[np.ndarray, "b t"]
    mask: Bool[np.ndarray, "b t"]
    passage: Int[np.ndarray, " b"]


def text(data_dir: pathlib.Path) -> str:
    """Tiny Shakespeare, as its publisher has it or as `train.data.prepare` left it.

    Raises:   FileNotFoundError: `data_dir` has neither; says what to run.
    """
    for folder in (".", "tinyshakespeare", "tiny_shakespeare"):
        path = data_dir / folder / "input.txt"
        if path.is_file():
            return path.read_text()
    from train.data import prepared  # needs tensorflow-datasets, the file does not

    parts = prepared.text(data_dir)
    return "".join(parts[name] for name in ("train", "validation", "test"))


def split(
    whole: str, *, held_out: int, calibration: int, seed: int
) -> tuple[list[str], list[str], list[str]]:
    """Passages to measure on, to calibrate with, and all but the first to train on.

    Paragraphs of at least `SHORTEST` characters, each once, in an order that `seed`
    draws.

    Raises:   ValueError: the text has fewer passages.
    """
    found = [x.strip() for x in whole.split("\n\n")]
    found = [x for x in dict.fromkeys(found) if len(x) >= SHORTEST]
    if len(found) < held_out + calibration:
        raise ValueError(
            f"the text has {len(found)} passages: fewer than --held-out {held_out} and "
            f"--calibration {calibration} together"
        )
    order = np.random.default_rng(seed).permutation(len(found)).tolist()
    last, train = order[:held_out], order[held_out:]
    parts = (last, train[:calibration], train)
    measured, drawn, trained = ([found[i] for i in part] for part in parts)
    return measured, drawn, trained


def batches(
    tokens: Sequence[Sequence[int]], size: int, order: Int[np.ndarray, " n"]
) -> Iterator[Batch]:
    """All passages in batches of `size`, the last of each length filled by repetition.

    Passages of about one length come together, in the given order. A passage that fills
    up has number -1.
    """
    groups: dict[int, list[int]] = {}
    for i in order.tolist():
        length = -(-len(tokens[i]) // STEP) * STEP
        group = groups.setdefault(length, [])
        group.append(i)
        if len(group) == size:
            yield _padded(tokens, groups.pop(length), length, size)
    for length, group in sorted(groups.items()):
        yield _padded(tokens, group, length, size)


def _padded(
    tokens: Sequence[Sequence[int]], group: list[int], length: int, size: int
) -> Batch:
    rows = np.zeros((size, length), np.int32)
    mask = np.zeros((size, length), bool)
    for row, i in enumerate(np.resize(group, size).tolist()):
        rows[row, : len(tokens[i])] = tokens[i]
        mask[row, : len(tokens[i])] = True
    number = np.full(size, -1)
    number[: len(group)] = group
    return Batch(rows, mask, number)
