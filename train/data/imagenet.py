"""ImageNet, read from disk image by image: prepared once with TensorFlow, which only
that needs.

1. Register at https://image-net.org/download-images and download, into a folder TARS,
   ILSVRC2012_img_train.tar (147,897,477,120 bytes) and ILSVRC2012_img_val.tar
   (6,744,924,160 bytes), both as they are.
2. In an environment of its own, with this checkout: python -m pip install
   -e ".[train]" tensorflow-cpu
3. python -m train.data.prepare imagenet2012 --from TARS --data-dir data
   (some hours; 150 GB in data/imagenet2012/5.1.0 beside the archives)
4. Training reads data/imagenet2012 from any environment, without TensorFlow.
"""

import dataclasses
import functools
import importlib.util
import io
import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8
from PIL import Image

from train.data.arrays import Batch, ordered, read_ahead

NAME = "imagenet2012"
ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
TRIES = 10
"""Rectangles drawn until one is inside the image; then its middle is taken."""

Transform = Callable[[Image.Image, np.random.Generator], UInt8[np.ndarray, "h w 3"]]


def prepare(data_dir: pathlib.Path, source: pathlib.Path | None) -> pathlib.Path:
    """The folder of the prepared dataset, made from the archives in `source`.

    Raises:   FileNotFoundError: an archive is missing. ImportError: no TensorFlow.
    """
    found = _prepared(data_dir)
    if found is not None:
        return found
    missing = [x for x in ARCHIVES if source is None or not (source / x).exists()]
    if missing:
        raise FileNotFoundError(
            f"{' and '.join(missing)} missing in {source}. Register at "
            "https://image-net.org/download-images, put both archives as they are "
            f"into a folder DIR and run: python -m train.data.prepare {NAME} --from DIR"
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f"{NAME} is prepared with TensorFlow, reading it back needs none: python "
            "-m pip install tensorflow-cpu, in an environment of its own"
        )
    builder = tfds.builder(NAME, data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=source, try_download_gcs=False)
    builder.download_and_prepare(
        download_dir=data_dir / "downloads", download_config=config
    )
    return pathlib.Path(builder.data_dir)


def source(data_dir: pathlib.Path, split: str) -> Any:
    """Records of `train` or `validation` by number: an encoded image, its label.

    Raises:   FileNotFoundError: `data_dir` holds no prepared copy; says what to run.
    """
    folder = _prepared(data_dir)
    if folder is None:
        raise FileNotFoundError(
            f"{NAME} is not prepared in {data_dir}. Prepare it once, with TensorFlow "
            f"and the archives in DIR: python -m train.data.prepare {NAME} --from DIR "
            f"--data-dir {data_dir} (all steps: train/data/imagenet.py)"
        )
    logging.getLogger("absl").setLevel(logging.WARNING)
    encoded = {"image": tfds.decode.SkipDecoding()}
    return tfds.builder_from_directory(folder).as_data_source(split, decoders=encoded)


@dataclasses.dataclass(frozen=True)
class ImageNet:
    """The prepared dataset, whose images are decoded when they are asked for.

    It is a `Dataset`; the publisher's validation images are the test set. Mean and
    deviation are those that everybody uses, of the colours red, green and blue.

    Raises:   FileNotFoundError: `data_dir` holds no prepared copy; says what to run.
    """

    data_dir: pathlib.Path
    size: int = 224
    part: float = 0.9
    """Of a test image, cut from its middle."""
    mean: ClassVar[Any] = 255 * np.array([0.485, 0.456, 0.406], np.float32)
    deviation: ClassVar[Any] = 255 * np.array([0.229, 0.224, 0.225], np.float32)

    def __post_init__(self) -> None:
        """Fail now and not when the first batch is read."""
        _ = self.counts

    @property
    def classes(self) -> Sequence[str]:
        """The 1000 synsets."""
        folder = _prepared(self.data_dir)
        return tfds.builder_from_directory(folder).info.features["label"].names

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.size, self.size, 3

    @functools.cached_property
    def _records(self) -> Mapping[str, Any]:
        splits = {"train": "train", "test": "validation"}
        return {name: source(self.data_dir, split) for name, split in splits.items()}

    @property
    def counts(self) -> Mapping[str, int]:
        """Images by split."""
        return {name: len(records) for name, records in self._records.items()}

    def batches(self, *, batch: int, seed: int, part: slice) -> Callable[[int], Batch]:
        """Random crops of the training images, read ahead."""
        cut = functools.partial(crop, size=self.size)
        stream = batches(self._records["train"], cut, batch=batch, seed=seed, part=part)
        return read_ahead(stream)

    def rows(self, split: str, rows: Int[np.ndarray, " b"]) -> Batch:
        """Images of a split by number, their middles."""
        none = np.random.default_rng(0)
        cut = functools.partial(centre, size=self.size, part=self.part)
        records = self._records[split]
        return _stacked([_pixels(records, int(i), cut, none) for i in rows])


def _prepared(data_dir: pathlib.Path) -> pathlib.Path | None:
    found = sorted(pathlib.Path(data_dir, NAME).glob("*/dataset_info.json"))
    return found[-1].parent if found else None


def batches(
    records: Any,
    transform: Transform,
    *,
    batch: int,
    seed: int,
    part: slice = slice(None),
) -> grain.MapDataset[Batch]:
    """A sequence without end whose item t is the batch of step t, or `part` of it.

    Every image has a random generator of its own, from seed, step and place in the
    batch: processes that take parts make up the batch that one process has.

    Args:     records: see `source`. transform: image and generator to pixels, all
              of one size; `crop`, or one of timm's, seeded by the generator.
    Raises:   ValueError: a record is damaged; says which.
    """

    def rows(index: np.ndarray, rng: np.random.Generator) -> Batch:
        seeds = rng.integers(2**63, size=len(index))[part]
        pairs = [
            _pixels(records, int(i), transform, np.random.default_rng(one))
            for i, one in zip(index[part], seeds, strict=True)
        ]
        return _stacked(pairs)

    return ordered(len(records), batch=batch, seed=seed).random_map(rows)


def _pixels(
    records: Any, i: int, transform: Transform, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "h w 3"], int]:
    try:
        row = records[i]
        image = Image.open(io.BytesIO(row["image"])).convert("RGB")
    except Exception as error:
        raise ValueError(f"record {i} of {NAME} is damaged: {error}") from error
    return transform(image, rng), int(row["label"])


def _stacked(pairs: list[tuple[np.ndarray, int]]) -> Batch:
    image, label = zip(*pairs, strict=True)
    return {"image": np.stack(image), "label": np.array(label, np.int32)}


def crop(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    size: int = 224,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[np.ndarray, "size size 3"]:
    """A random rectangle of the image as a square, flipped half of the time.

    Its area is uniform in `area` of the image's, the logarithm of its aspect in that of
    `aspect`; the interpolation is bilinear or bicubic.

    Source:   Szegedy et al. 2015, "Inception crops"; interpolation as timm's default.
    """
    width, height = image.size
    for _ in range(TRIES):
        pixels = rng.uniform(*area) * width * height
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            break
    else:
        w = min(width, round(height * aspect[1]))
        h = min(height, round(width / aspect[0]))
        left, top = (width - w) // 2, (height - h) // 2
    kinds = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    kind = kinds[rng.integers(2)]
    result = image.resize((size, size), kind, box=(left, top, left + w, top + h))
    if rng.random() < 0.5:
        result = result.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(result)


def centre(
    image: Image.Image,
    rng: np.random.Generator | None = None,
    *,
    size: int = 224,
    part: float = 0.9,
) -> UInt8[np.ndarray, "size size 3"]:
    """The middle square after the short side was made floor(size / part), bicubic."""
    del rng
    short = math.floor(size / part)
    scale = short / min(image.size)
    wide = tuple(max(short, round(x * scale)) for x in image.size)
    image = image.resize((wide[0], wide[1]), Image.Resampling.BICUBIC)
    left, top = (wide[0] - size) // 2, (wide[1] - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
