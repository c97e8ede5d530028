"""Text as numbers of characters: vocabulary, parts, windows; and some to test with."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Int

from train.data.arrays import ordered

SONNETS = (pathlib.Path(__file__).parent / "sonnets.txt").read_text()
"""Six of Shakespeare's sonnets: 18, 29, 55, 60, 73 and 116."""


class Passages(TypedDict):
    """Some passages, on the host: characters, and those that follow each."""

    token: Int[np.ndarray, "b t"]
    target: Int[np.ndarray, "b t"]


@dataclasses.dataclass(frozen=True)
class Text:
    """Parts of a text as places of its characters in the sorted `characters`."""

    parts: Mapping[str, Int[np.ndarray, " n"]]
    characters: str

    def decode(self, token: Int[np.ndarray, " n"]) -> str:
        """The characters at these places."""
        return "".join(self.characters[i] for i in token)


def encode(parts: Mapping[str, str]) -> Text:
    """Numbered characters of all parts.

    >>> encode({"train": "abba", "test": "c"}).parts["train"].tolist()
    [0, 1, 1, 0]
    """
    characters = sorted(set("".join(parts.values())))
    number = {x: i for i, x in enumerate(characters)}
    found = {
        name: np.array([number[x] for x in text], np.int32)
        for name, text in parts.items()
    }
    return Text(found, "".join(characters))


def embedded() -> Text:
    """The sonnets: four fifths to train on, a tenth to validate on and to test on."""
    first, second = int(0.8 * len(SONNETS)), int(0.9 * len(SONNETS))
    return encode(
        {
            "train": SONNETS[:first],
            "validation": SONNETS[first:second],
            "test": SONNETS[second:],
        }
    )


def batches(
    token: Int[np.ndarray, " n"],
    *,
    context: int,
    batch: int,
    seed: int,
    part: slice = slice(None),
) -> grain.MapDataset[Passages]:
    """A sequence without end whose item t is the batch of step t, or `part` of it.

    Passages begin at every place of the text, in a new order every epoch.

    Raises:   ValueError: the text is not longer than `context`.
    """
    _check(token, context)
    order = ordered(len(token) - context, batch=batch, seed=seed)
    return order.map(lambda index: _take(token, index[part], context))


def passages(token: Int[np.ndarray, " n"], *, context: int) -> Passages:
    """All of the text once, end to end, to evaluate on; less than `context` is lost.

    Raises:   ValueError: the text is not longer than `context`.
    """
    _check(token, context)
    return _take(token, np.arange(0, len(token) - context, context), context)


def _check(token: Int[np.ndarray, " n"], context: int) -> None:
    if not 0 < context < len(token):
        raise ValueError(f"`context` must be in [1, {len(token) - 1}], got {context}")


def _take(
    token: Int[np.ndarray, " n"], start: Int[np.ndarray, " b"], context: int
) -> Passages:
    row = token[start[:, None] + np.arange(context + 1)]
    return {"token": row[:, :-1], "target": row[:, 1:]}
