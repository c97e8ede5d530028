"""Labelled images in memory, and batches as a pure function of seed and step."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict, TypeVar

import grain
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

T = TypeVar("T")


class Batch(TypedDict):
    """One batch, on the host: raw pixels and class numbers."""

    image: UInt8[np.ndarray, "b h w c"]
    label: Int[np.ndarray, " b"]


class Dataset(Protocol):
    """Labelled images, in memory or not; pixels from 0 to 255."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, by number."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""

    @property
    def mean(self) -> Any:
        """Mean of the training pixels, one number or one for each channel."""

    @property
    def deviation(self) -> Any:
        """Standard deviation of the training pixels, in the shape of `mean`."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Images by split: train, test, and validation where there is one."""

    def batches(self, *, batch: int, seed: int, part: slice) -> Callable[[int], Batch]:
        """Of the training images: see the function of this name."""

    def rows(self, split: str, rows: Int[np.ndarray, " b"]) -> Batch:
        """Images of another split by number."""


@dataclasses.dataclass(frozen=True)
class Images:
    """A dataset of small images, whole; without `validate`, as the publisher split it.

    It is a `Dataset`.
    """

    train_image: UInt8[np.ndarray, "n h w c"]
    train_label: Int[np.ndarray, " n"]
    test_image: UInt8[np.ndarray, "k h w c"]
    test_label: Int[np.ndarray, " k"]
    classes: tuple[str, ...]
    validation_image: UInt8[np.ndarray, "j h w c"] | None = None
    validation_label: Int[np.ndarray, " j"] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        _, h, w, c = self.train_image.shape
        return h, w, c

    @property
    def counts(self) -> Mapping[str, int]:
        """Images by split."""
        found = {"train": len(self.train_label), "test": len(self.test_label)}
        if self.validation_label is not None:
            found["validation"] = len(self.validation_label)
        return found

    def batches(self, *, batch: int, seed: int, part: slice) -> Callable[[int], Batch]:
        """Of the training images, read ahead: see the function of this name."""
        stream = batches(
            self.train_image, self.train_label, batch=batch, seed=seed, part=part
        )
        return read_ahead(stream)

    def rows(self, split: str, rows: Int[np.ndarray, " b"]) -> Batch:
        """Images of a split by number."""
        image, label = getattr(self, f"{split}_image"), getattr(self, f"{split}_label")
        return {"image": image[rows], "label": label[rows]}

    def validate(self, count: int) -> "Images":
        """The same with `count` training images, of every class alike, for validation.

        Raises:   ValueError: so many that none is left, or a class has none.
        """
        from sklearn.model_selection import train_test_split  # a second to import

        kept, taken = train_test_split(
            np.arange(len(self.train_label)),
            test_size=count,
            stratify=self.train_label,
            random_state=0,
        )
        return dataclasses.replace(
            self,
            train_image=self.train_image[kept],
            train_label=self.train_label[kept],
            validation_image=self.train_image[taken],
            validation_label=self.train_label[taken],
        )

    @property
    def mean(self) -> float:
        """Mean of all training pixels."""
        return float(np.mean(self.train_image, dtype=np.float64))

    @property
    def deviation(self) -> float:
        """Standard deviation of all training pixels."""
        return float(np.std(self.train_image, dtype=np.float64))


def drawn(shape: tuple[int, int, int], classes: int, *, count: int = 96) -> Images:
    """Random pixels and classes, to show that a program works and nothing else."""
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(2 * count, *shape), dtype=np.uint8)
    label = np.arange(2 * count, dtype=np.int32) % classes
    names = tuple(map(str, range(classes)))
    return Images(image[:count], label[:count], image[count:], label[count:], names)


def standardize(image: Array, mean: Any, deviation: Any) -> Float[Array, "b h w c"]:
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
    """Batches of row numbers without end: every epoch a new permutation of them all.

    Drawn an epoch at a time by numpy: grain's own shuffle makes a batch number by
    number, which took a tenth of a step of the digits.
    """
    if batch < 1:
        raise ValueError(f"`batch` must be at least 1, got {batch}")

    @functools.lru_cache(maxsize=4)  # threads that read ahead may be in two epochs
    def permutation(epoch: int) -> Int[np.ndarray, " n"]:
        return np.random.default_rng((seed, epoch)).permutation(count)

    def rows(t: int) -> Int[np.ndarray, " b"]:
        epoch, place = divmod(np.arange(t * batch, (t + 1) * batch), count)
        orders = [permutation(int(e))[place[epoch == e]] for e in np.unique(epoch)]
        return np.concatenate(orders)

    return grain.MapDataset.range(sys.maxsize).seed(seed).map(rows)
