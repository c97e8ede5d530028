"""Original files of the datasets: where they are, their checksums, what is in them.

ETT (Zhou et al. 2021, CC BY-ND 4.0) is kept as published: splits and scaling are code.
"""

import dataclasses
import gzip
import lzma
import math
import pathlib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8
from PIL import Image

SERIES = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")


@dataclasses.dataclass(frozen=True)
class Content:
    """What the files of a dataset hold, as tensorflow-datasets takes it."""

    features: Mapping[str, Any]
    splits: Mapping[str, Callable[[], Iterator[Mapping[str, Any]]]]


@dataclasses.dataclass(frozen=True)
class Original:
    """Files as published: where they are, and what tensorflow-datasets calls them.

    `sha256` is that of each file, or of what is in FILE.gz or FILE.xz where there is no
    FILE; None where only the checksum of the archive is known.
    """

    version: str
    read: Callable[["Original", pathlib.Path], Content]
    address: str
    sha256: Mapping[str, str | None]
    classes: tuple[str, ...] = ()
    archive: str | None = None
    archive_sha256: str = ""


def contents(path: pathlib.Path) -> bytes:
    """Bytes of a file, or of the packed one beside which it is missing.

    Raises:   FileNotFoundError: neither the file nor FILE.gz nor FILE.xz is there.
    """
    if path.exists():
        return path.read_bytes()
    for suffix, unpack in ((".gz", gzip.decompress), (".xz", lzma.decompress)):
        packed = path.with_name(path.name + suffix)
        if packed.exists():
            return unpack(packed.read_bytes())
    raise FileNotFoundError(f"{path} is missing")


def _idx(original: Original, folder: pathlib.Path) -> Content:
    """MNIST and its like. As PIL images: tfds encodes arrays with TensorFlow."""

    def examples(prefix: str) -> Iterator[Mapping[str, Any]]:
        images = read_images(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_labels(folder / f"{prefix}-labels-idx1-ubyte.gz")
        for image, label in zip(images, labels, strict=True):
            yield {"image": Image.fromarray(image), "label": int(label)}

    features = {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(names=original.classes),
    }
    return Content(
        features, {"train": lambda: examples("train"), "test": lambda: examples("t10k")}
    )


def _cifar10(original: Original, folder: pathlib.Path) -> Content:
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)]
    files = {"train": batches, "test": ["test_batch.bin"]}
    return _cifar(folder, files, {"label": original.classes})


def _cifar100(original: Original, folder: pathlib.Path) -> Content:
    del original
    labels = {
        "coarse_label": _lines(folder / "coarse_label_names.txt"),
        "label": _lines(folder / "fine_label_names.txt"),
    }
    return _cifar(folder, {"train": ["train.bin"], "test": ["test.bin"]}, labels)


def _lines(path: pathlib.Path) -> tuple[str, ...]:
    return tuple(contents(path).decode().split())


def _cifar(
    folder: pathlib.Path,
    files: Mapping[str, list[str]],
    labels: Mapping[str, tuple[str, ...]],
) -> Content:
    """Images of 32x32 pixels, and class names by label in the order of its bytes."""

    def examples(split: str) -> Iterator[Mapping[str, Any]]:
        count = 0
        for file in files[split]:
            images, numbers = read_cifar(folder / file, len(labels))
            for image, row in zip(images, numbers, strict=True):
                values = dict(zip(labels, row.tolist(), strict=True))
                identity = f"{split}_{count:05d}"
                yield {"id": identity, "image": Image.fromarray(image), **values}
                count += 1

    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3)),
        **{key: tfds.features.ClassLabel(names=x) for key, x in labels.items()},
    }
    return Content(
        features, {"train": lambda: examples("train"), "test": lambda: examples("test")}
    )


def _series(original: Original, folder: pathlib.Path) -> Content:
    """All rows as one record, in order: seconds since 1970 and the seven values."""
    (file,) = original.sha256

    def examples() -> Iterator[Mapping[str, Any]]:
        time, value = read_series(folder / file)
        yield {"time": time, "value": value}

    features = {
        "time": tfds.features.Tensor(shape=(None,), dtype=np.int64),
        "value": tfds.features.Tensor(shape=(None, len(SERIES)), dtype=np.float32),
    }
    return Content(features, {"train": examples})


def _text(original: Original, folder: pathlib.Path) -> Content:
    """One record for each part: nine tenths, half of the rest, the other half."""
    (file,) = original.sha256
    text = contents(folder / file).decode()
    first = int(len(text) * 0.9)
    second = first + int((len(text) - first) * 0.5)
    parts = {
        "train": text[:first],
        "validation": text[first:second],
        "test": text[second:],
    }
    return Content(
        {"text": tfds.features.Text()},
        {key: (lambda x=x: iter([{"text": x}])) for key, x in parts.items()},
    )


def read_images(path: pathlib.Path) -> UInt8[np.ndarray, "n h w"]:
    """Images of a gzipped idx3 file."""
    return _read(path, dimensions=3)


def read_labels(path: pathlib.Path) -> UInt8[np.ndarray, " n"]:
    """Labels of a gzipped idx1 file."""
    return _read(path, dimensions=1)


def _read(path: pathlib.Path, *, dimensions: int) -> Int[np.ndarray, "..."]:
    with gzip.open(path) as stream:
        data = stream.read()
    # Two zero bytes, 8 for unsigned bytes, the number of sizes; then the sizes.
    if data[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{path} is no idx{dimensions} file: begins {data[:4].hex()}")
    sizes = np.frombuffer(data, ">u4", count=dimensions, offset=4)
    shape = tuple(sizes.tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    if values.size != math.prod(shape):
        raise ValueError(f"{path} says shape {shape}, has {values.size} values")
    return values.reshape(shape)


def read_cifar(
    path: pathlib.Path, labels: int
) -> tuple[UInt8[np.ndarray, "n 32 32 3"], UInt8[np.ndarray, "n labels"]]:
    """Images, and as many label bytes as stand before each."""
    data = np.frombuffer(contents(path), np.uint8)
    size = labels + 3 * 32 * 32
    if len(data) == 0 or len(data) % size:
        raise ValueError(f"{path} has {len(data)} bytes, no multiple of {size}")
    rows = data.reshape(-1, size)
    image = rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(image), rows[:, :labels]


def read_series(
    path: pathlib.Path,
) -> tuple[Int[np.ndarray, " n"], np.ndarray]:
    """Seconds since 1970, and the values of each row.

    Raises:   ValueError: other columns, or a row that is no row; names it.
    """
    lines = contents(path).decode().splitlines()
    expected = ",".join(("date", *SERIES))
    if lines[0] != expected:
        raise ValueError(f"{path} must have the columns {expected}, got {lines[0]}")
    time, value = [], []
    for i, line in enumerate(lines[1:]):
        date, *cells = line.split(",")
        try:
            time.append(np.datetime64(date, "s").astype(np.int64))
            value.append([float(cell) for cell in cells])
        except ValueError as error:
            raise ValueError(f"row {i} of {path} is {line!r}: {error}") from error
    return np.array(time, np.int64), np.array(value, np.float32)


READERS: Mapping[str, Callable[[Original, pathlib.Path], Content]] = {
    "idx": _idx,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "series": _series,
    "text": _text,
}


def _originals() -> dict[str, Original]:
    path = pathlib.Path(__file__).with_suffix(".toml")
    table = tomllib.loads(path.read_text())
    for known in table.values():
        known["read"] = READERS[known["read"]]
        known["sha256"] = {file: x or None for file, x in known["sha256"].items()}
        known["classes"] = tuple(known.get("classes", ()))
    return {name: Original(**known) for name, known in table.items()}


ORIGINALS: Mapping[str, Original] = _originals()
