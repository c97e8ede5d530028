"""Prepared datasets, read back from ArrayRecord without TensorFlow."""

import logging
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from train.data.arrays import Images
from train.data.series import Series

CHUNK = 1000


def images(data_dir: pathlib.Path, name: str) -> Images:
    """All training and test images, with pixels from 0 to 255.

    Raises:   FileNotFoundError: `data_dir` holds no prepared copy; says what to run.
              ValueError: a record is damaged; says which.
    """
    builder = _builder(data_dir, name)
    train = _decoded(builder.as_data_source("train"), f"{name} train")
    test = _decoded(builder.as_data_source("test"), f"{name} test")
    return Images(*train, *test, classes=tuple(builder.info.features["label"].names))


def series(data_dir: pathlib.Path, name: str) -> Series:
    """One of the ETT series, whole, unscaled.

    Raises:   FileNotFoundError: `data_dir` holds no prepared copy; says what to run.
    """
    (row,) = _builder(data_dir, name).as_data_source("train")
    return Series(row["time"].astype("datetime64[s]"), row["value"])


def text(data_dir: pathlib.Path, name: str = "tiny_shakespeare") -> dict[str, str]:
    """The text by part: train, validation and test.

    Raises:   FileNotFoundError: `data_dir` holds no prepared copy; says what to run.
    """
    source = _builder(data_dir, name).as_data_source()
    return {split: rows[0]["text"].decode() for split, rows in source.items()}


def _builder(data_dir: pathlib.Path, name: str) -> Any:
    found = sorted(pathlib.Path(data_dir, name).glob("*/dataset_info.json"))
    if not found:
        raise FileNotFoundError(
            f"{name} is not prepared in {data_dir}. Prepare it once: python -m "
            f"train.data.prepare {name} --data-dir {data_dir} (with --from DIR if DIR "
            "has the publisher's files already)"
        )
    logging.getLogger("absl").addFilter(_is_no_advice)
    return tfds.builder_from_directory(found[-1].parent)


def _is_no_advice(record: logging.LogRecord) -> bool:
    """False for the hint that OpenCV decodes faster: these images decode in seconds."""
    return "OpenCV" not in record.getMessage()


def _decoded(source: Any, title: str) -> tuple[np.ndarray, np.ndarray]:
    image, label = [], []
    starts = range(0, len(source), CHUNK)
    bar = tqdm(  # on a screen alone
        starts,
        f"reading {title}",
        leave=False,
        unit_scale=CHUNK,
        unit=" images",
        disable=None,
    )
    for start in bar:
        stop = min(start + CHUNK, len(source))
        for row in _rows(source, range(start, stop), title):
            image.append(row["image"])
            label.append(row["label"])
    return np.stack(image), np.array(label, np.int32)


def _rows(source: Any, index: range, title: str) -> Any:
    """Records together; when that fails one by one, to name the one that is damaged."""
    try:
        return source.__getitems__(list(index))
    except Exception as error:
        for i in index:
            try:
                source[i]
            except Exception as one:
                raise ValueError(f"record {i} of {title} is damaged: {one}") from one
        raise ValueError(f"cannot read {title}: {error}") from error
