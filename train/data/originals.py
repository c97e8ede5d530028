"""Original files of the datasets: where they are, their checksums, what is in them.

ETT (Zhou et al. 2021, CC BY-ND 4.0) is kept as published: splits and scaling are code.
"""

import dataclasses
import gzip
import lzma
import math
import pathlib
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


def _ett(file: str, sha256: str) -> Original:
    """One of the four series of transformer temperatures, which tfds does not have."""
    return Original(
        version="1.0.0",
        read=_series,
        address=(
            "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/1d16c8f4f943/"
            "ETT-small/"
        ),
        sha256={file: sha256},
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


ORIGINALS: Mapping[str, Original] = {
    "fashion_mnist": Original(
        version="3.0.1",
        read=_idx,
        address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        sha256={
            "train-images-idx3-ubyte.gz": (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
            ),
            "train-labels-idx1-ubyte.gz": (
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
            ),
            "t10k-images-idx3-ubyte.gz": (
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
            ),
        },
    ),
    "mnist": Original(
        version="3.0.1",
        read=_idx,
        address="https://storage.googleapis.com/cvdf-datasets/mnist/",
        classes=tuple("0123456789"),
        sha256={
            "train-images-idx3-ubyte.gz": (
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
            ),
            "train-labels-idx1-ubyte.gz": (
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
            ),
            "t10k-images-idx3-ubyte.gz": (
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
            ),
        },
    ),
    "cifar10": Original(
        version="3.0.2",
        read=_cifar10,
        address="https://www.cs.toronto.edu/~kriz/",
        archive="cifar-10-binary.tar.gz",
        archive_sha256=(
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
        ),
        classes=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        sha256={
            "data_batch_1.bin": (
                "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"
            ),
            "data_batch_2.bin": (
                "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"
            ),
            "data_batch_3.bin": (
                "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"
            ),
            "data_batch_4.bin": (
                "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"
            ),
            "data_batch_5.bin": (
                "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"
            ),
            "test_batch.bin": (
                "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"
            ),
        },
    ),
    "cifar100": Original(
        version="3.0.2",
        read=_cifar100,
        address="https://www.cs.toronto.edu/~kriz/",
        archive="cifar-100-binary.tar.gz",
        archive_sha256=(
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
        ),
        sha256=dict.fromkeys(
            ("train.bin", "test.bin", "fine_label_names.txt", "coarse_label_names.txt")
        ),
    ),
    "etth1": _ett(
        "ETTh1.csv", "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"
    ),
    "etth2": _ett(
        "ETTh2.csv", "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b"
    ),
    "ettm1": _ett(
        "ETTm1.csv", "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e"
    ),
    "ettm2": _ett(
        "ETTm2.csv", "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd"
    ),
    "tiny_shakespeare": Original(
        version="1.0.0",
        read=_text,
        address=(
            "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b/"
            "data/tinyshakespeare/"
        ),
        sha256={
            "input.txt": (
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
            ),
        },
    ),
}
