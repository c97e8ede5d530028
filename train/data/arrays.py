"""Labelled images in memory, and batches as a pure function of seed and step."""

import dataclasses
from collections.abc import Callable
from typing import TypedDict, TypeVar

import grain
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

T = TypeVar("T")


class Batch(TypedDict):
    """One batch, on the host: raw pixels and class numbers."""

    image: UInt8[np.ndarray, "b h w c"]
    label: Int[np.ndarray, " b"]


@dataclasses.dataclass(frozen=True)
class Images:
    """A dataset of small images, whole, as the publisher split it."""

    train_image: UInt8[np.ndarray, "n h w c"]
    train_label: Int[np.ndarray, " n"]
    test_image: UInt8[np.ndarray, "k h w c"]
    test_label: Int[np.ndarray, " k"]
    classes: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Mean of all training pixels."""
        return float(np.mean(self.train_image, dtype=np.float64))

    @property
    def deviation(self) -> float:
        """Standard deviation of all training pixels."""
        return float(np.std(self.train_image, dtype=np.float64))


def standardize(image: Array, mean: float, deviation: float) -> Float[Array, "b h w c"]:
    """Raw pixels as numbers of mean 0 and deviation 1 over the training images."""
    return (image.astype(np.float32) - mean) / deviation


def batches(
    image: UInt8[np.ndarray, "n h w c"],
    label: Int[np.ndarray, " n"],
    *,
    batch: int,
    seed: int,
    part: slice = slice(None),
) -> grain.MapDataset[Batch]:
    """A sequence without end whose item t is the batch of step t, or `part` of it.

    Every epoch is a new permutation of all images, and a batch may span two epochs.
    Item t depends on `seed` and t alone: a run that resumes at step t needs only t, and
    processes that take parts of it make up the batch that one process has.

    Raises:   ValueError: `batch` below 1, or no images.
    """
    if len(image) == 0 or len(image) != len(label):
        raise ValueError(f"got {len(image)} images for {len(label)} labels")

    def rows(index: Int[np.ndarray, " b"]) -> Batch:
        index = index[part]
        return {"image": image[index], "label": label[index]}

    return ordered(len(image), batch=batch, seed=seed).map(rows)


def read_ahead(
    stream: grain.MapDataset[T], *, batches: int = 4, threads: int = 2
) -> Callable[[int], T]:
    """Item t of a stream, while the next ones are read behind.

    Any t may be asked for: where it is not the one after the last, reading begins anew.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=batches)
    iterator = iter(stream.to_iter_dataset(options))

    def item(t: int) -> T:
        if iterator.get_state() != {"next_index": t}:
            iterator.set_state({"next_index": t})
        return next(iterator)

    return item


def ordered(
    count: int, *, batch: int, seed: int
) -> grain.MapDataset[Int[np.ndarray, " b"]]:
    """Batches of row numbers without end: every epoch a new permutation of them all."""
    if batch < 1:
        raise ValueError(f"`batch` must be at least 1, got {batch}")
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat().batch(batch)
