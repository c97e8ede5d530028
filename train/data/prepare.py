"""Prepare a dataset once, without TensorFlow: python -m train.data.prepare NAME.

Command:   python -m train.data.prepare fashion_mnist --data-dir data
           (--from DIR reads the publisher's files from DIR instead of downloading them)
Hardware:  two CPU cores
Wall time: 7 s for 70,000 images
Result:    data/fashion_mnist/3.0.1, ArrayRecord with PNG images, which
           tfds.data_source("fashion_mnist", data_dir="data") reads back
"""

import dataclasses
import gzip
import hashlib
import math
import pathlib
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import tensorflow_datasets as tfds
import tyro
from jaxtyping import Int, UInt8
from PIL import Image

from train import names


@dataclasses.dataclass(frozen=True)
class Original:
    """Files as published: where they are, and what tensorflow-datasets calls them."""

    version: str
    address: str
    classes: tuple[str, ...]
    sha256: Mapping[str, str]


ORIGINALS: dict[str, Original] = {
    "fashion_mnist": Original(
        version="3.0.1",
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
}


def prepare(
    name: str,
    *,
    data_dir: pathlib.Path,
    source: pathlib.Path | None = None,
    originals: Mapping[str, Original] = ORIGINALS,
) -> pathlib.Path:
    """The folder of the prepared dataset, with every original file checked first.

    A dataset that is there already is left as it is. Nothing is written under its name
    before all four checksums are right, and a preparation that is killed leaves a
    folder that no reader takes for the dataset.

    Args:     source: folder of the publisher's files; None downloads them.
    Raises:   ValueError: unknown name, or a file whose checksum is wrong.
              FileNotFoundError: a file is missing.
              ConnectionError: no download; says what to fetch and where to put it.
    """
    original = names.find("dataset", name, originals)
    files = source or data_dir / "downloads" / name
    builder = _builder(name, original, files, data_dir)
    folder = pathlib.Path(builder.data_dir)
    if (folder / "dataset_info.json").exists():  # written last, then renamed as a whole
        return folder
    for file, expected in original.sha256.items():
        if source is None and not (files / file).exists():
            _download(name, original, file, files)
        _check(files / file, expected)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(
        download_dir=data_dir / "downloads", download_config=config
    )
    return folder


def _builder(
    name: str, original: Original, files: pathlib.Path, data_dir: pathlib.Path
) -> Any:
    """A builder with the name, version and features of the one tfds has.

    Images go in as PIL images: tfds encodes arrays with TensorFlow.
    """

    class Idx(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # untyped base
        VERSION = tfds.core.Version(original.version)

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(names=original.classes),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # the files are here, and checked
            return {
                "train": self._generate_examples("train"),
                "test": self._generate_examples("t10k"),
            }

        def _generate_examples(self, prefix: str) -> Iterator[tuple[int, Any]]:
            images = read_images(files / f"{prefix}-images-idx3-ubyte.gz")
            labels = read_labels(files / f"{prefix}-labels-idx1-ubyte.gz")
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": Image.fromarray(image), "label": int(label)}

    Idx.name = name
    return Idx(data_dir=data_dir, file_format="array_record")


def _download(name: str, original: Original, file: str, folder: pathlib.Path) -> None:
    """One file into `folder`, under its name only when it is whole and right."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file}.part"
    try:
        with (
            urllib.request.urlopen(original.address + file, timeout=60) as stream,
            part.open("wb") as target,
        ):
            shutil.copyfileobj(stream, target)
    except (urllib.error.URLError, OSError) as error:
        part.unlink(missing_ok=True)
        wanted = "\n".join(f"  {original.address}{each}" for each in original.sha256)
        raise ConnectionError(
            f"cannot download {original.address}{file}: {error}\n"
            f"Fetch these files where there is a network:\n{wanted}\n"
            f"and put them, as they are, into {folder}, or into a folder DIR of their "
            f"own and run: python -m train.data.prepare {name} --from DIR"
        ) from error
    _check(part, original.sha256[file])
    part.rename(folder / file)


def _check(path: pathlib.Path, expected: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; expected SHA-256 {expected}")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is not the publisher's file: expected SHA-256 {expected}, "
            f"found {found}"
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """Prepare a dataset for training, once."""

    name: tyro.conf.Positional[str]
    """Which dataset: fashion_mnist or mnist."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where prepared datasets live; give the same folder to the training program."""
    source: Annotated[pathlib.Path | None, tyro.conf.arg(name="from")] = None
    """Folder that has the publisher's four files; without it they are downloaded."""


def main(settings: Settings) -> None:
    """Prepare, and say where the dataset is."""
    try:
        folder = prepare(
            settings.name, data_dir=settings.data_dir, source=settings.source
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{settings.name} is prepared in {folder}")


if __name__ == "__main__":
    main(tyro.cli(Settings, prog="python -m train.data.prepare"))
