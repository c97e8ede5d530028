"""Fashion-MNIST, and MNIST, read back from ArrayRecord without TensorFlow."""

import logging
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from train.data.arrays import Images

CHUNK = 1000


def load(data_dir: pathlib.Path, name: str = "fashion_mnist") -> Images:
    """60,000 training and 10,000 test images of 28x28 pixels from 0 to 255.

    Raises:   FileNotFoundError: `data_dir` holds no prepared copy; says what to run.
    """
    if not list(pathlib.Path(data_dir, name).glob("*/dataset_info.json")):
        raise FileNotFoundError(
            f"{name} is not prepared in {data_dir}. Prepare it once: python -m "
            f"train.data.prepare {name} --data-dir {data_dir} (with --from DIR if DIR "
            "has the publisher's files already)"
        )
    logging.getLogger("absl").addFilter(_is_no_advice)
    builder = tfds.builder(name, data_dir=data_dir)
    train = _decoded(builder.as_data_source("train"), f"reading {name} train")
    test = _decoded(builder.as_data_source("test"), f"reading {name} test")
    return Images(*train, *test, classes=tuple(builder.info.features["label"].names))


def _is_no_advice(record: logging.LogRecord) -> bool:
    """False for the hint that OpenCV decodes faster: these images decode in seconds."""
    return "OpenCV" not in record.getMessage()


def _decoded(source: Any, title: str) -> tuple[np.ndarray, np.ndarray]:
    image, label = [], []
    starts = range(0, len(source), CHUNK)
    for start in tqdm(starts, title, leave=False, unit_scale=CHUNK, unit=" images"):
        stop = min(start + CHUNK, len(source))
        for row in source.__getitems__(list(range(start, stop))):
            image.append(row["image"])
            label.append(row["label"])
    return np.stack(image), np.array(label, np.int32)
