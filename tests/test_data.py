"""Data: splits, order as a function of seed and step, preparation and its errors."""

import dataclasses
import gzip
import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from train.data import arrays, digits, fashion_mnist, prepare

ROOT = pathlib.Path(__file__).parent.parent
ORIGINALS = pathlib.Path(os.environ.get("OIALR_DATA", ROOT / ".." / "shared" / "data"))
# Sum of the pixels and label of the first and the last image.
FASHION_RECORDS = {
    "train": [(76247, 9), (16684, 5)],
    "t10k": [(33456, 9), (24390, 5)],
}
FIRST_TEST_LABELS = [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]
TEST_DIGEST = "3cc232bd25364446c8646cd9434a26e35ea92e20045d395b2fdd2232a75c9b8f"
FILES = tuple(prepare.ORIGINALS["fashion_mnist"].sha256)


def test_digits_are_split_by_class_and_never_overlap():
    data = digits.load()
    assert data.train_image.shape == (1437, 8, 8, 1)
    assert data.test_image.shape == (360, 8, 8, 1)
    assert data.train_image.dtype == np.uint8
    assert set(np.bincount(data.train_label)) <= set(range(138, 148))
    assert set(np.bincount(data.test_label)) <= set(range(34, 38))
    assert int(data.train_image.max()) == 16
    # A pixel pattern that is in both parts would be a leak; scikit-learn has none.
    both = {x.tobytes() for x in data.train_image} & {
        x.tobytes() for x in data.test_image
    }
    assert not both


def test_the_split_of_digits_never_changes():
    data = digits.load()
    assert data.test_label[:10].tolist() == FIRST_TEST_LABELS
    assert digest(data.test_image) == TEST_DIGEST


def test_training_pixels_have_mean_0_and_deviation_1_once_standardized():
    data = digits.load()
    pixels = arrays.standardize(data.train_image, data.mean, data.deviation)
    assert abs(float(pixels.mean())) < 1e-4
    assert abs(float(pixels.std()) - 1) < 1e-4


def numbered(n):
    image = np.arange(n, dtype=np.uint8)[:, None, None, None]
    return image, np.arange(n, dtype=np.int32)


def test_batch_of_a_step_depends_on_seed_and_step_alone():
    image, label = numbered(50)
    first, again = (arrays.batches(image, label, batch=8, seed=3) for _ in range(2))
    in_order = [first[t]["label"] for t in range(20)]
    backwards = [again[t]["label"] for t in reversed(range(20))][::-1]
    np.testing.assert_array_equal(in_order, backwards)
    other = arrays.batches(image, label, batch=8, seed=4)
    assert not np.array_equal(in_order, [other[t]["label"] for t in range(20)])


def test_images_and_labels_stay_together():
    image, label = numbered(50)
    batch = arrays.batches(image, label, batch=64, seed=0)[7]
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


def test_every_epoch_is_all_images_in_a_new_order():
    image, label = numbered(48)
    stream = arrays.batches(image, label, batch=8, seed=0)
    epochs = [
        np.concatenate([stream[6 * e + t]["label"] for t in range(6)]) for e in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(48))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


@pytest.mark.parametrize(
    ("count", "batch", "message"),
    [
        (4, 0, "`batch` must be at least 1, got 0"),
        (0, 2, "got 0 images for 0 labels"),
    ],
    ids=["batch", "empty"],
)
def test_batches_of_nothing_are_an_error(count, batch, message):
    image, label = numbered(count)
    with pytest.raises(ValueError, match=message):
        arrays.batches(image, label, batch=batch, seed=0)


def write_idx(path, values):
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + values.tobytes(), mtime=0))


def digest(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


@pytest.fixture
def tiny(tmp_path):
    """Four small files like the publisher's, their arrays, and a table that fits."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "originals"
    folder.mkdir()
    made = {}
    for prefix, count in (("train", 12), ("t10k", 5)):
        made[prefix] = (
            rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            rng.integers(0, 10, count, dtype=np.uint8),
        )
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", made[prefix][0])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", made[prefix][1])
    sums = {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in FILES}
    table = {
        name: dataclasses.replace(original, sha256=sums)
        for name, original in prepare.ORIGINALS.items()
    }
    return folder, made, table


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist"])
def test_what_is_prepared_is_read_back_by_tfds(tmp_path, tiny, name):
    folder, made, table = tiny
    data_dir = tmp_path / "data"
    where = prepare.prepare(name, data_dir=data_dir, source=folder, originals=table)
    assert where == data_dir / name / "3.0.1"
    source = tfds.data_source(name, data_dir=data_dir, download=False)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        rows = {row["image"].tobytes(): int(row["label"]) for row in source[split]}
        image, label = made[prefix]
        expected = {x.tobytes(): int(y) for x, y in zip(image, label, strict=True)}
        assert rows == expected  # tfds shuffles the records once, when it writes them
    data = fashion_mnist.load(data_dir, name)
    assert data.train_image.shape == (12, 28, 28, 1)
    assert data.test_label.dtype == np.int32
    assert data.classes == prepare.ORIGINALS[name].classes
    assert "tensorflow" not in sys.modules


def test_preparing_again_leaves_what_is_there(tmp_path, tiny):
    folder, _, table = tiny
    prepare.prepare("mnist", data_dir=tmp_path / "data", source=folder, originals=table)
    where = prepare.prepare("mnist", data_dir=tmp_path / "data", source=tmp_path / "no")
    assert (where / "dataset_info.json").exists()


def test_a_damaged_file_is_named_with_both_checksums(tmp_path, tiny):
    folder, _, table = tiny
    victim = folder / FILES[2]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    expected = table["mnist"].sha256[FILES[2]]
    message = f"{FILES[2]} is not the publisher's file: expected SHA-256 {expected}, "
    with pytest.raises(ValueError, match=f"{message}found {found}"):
        prepare.prepare(
            "mnist", data_dir=tmp_path / "data", source=folder, originals=table
        )
    assert not list(tmp_path.glob("data/mnist/*"))
    with pytest.raises(FileNotFoundError, match="mnist is not prepared"):
        fashion_mnist.load(tmp_path / "data", "mnist")


def test_a_missing_file_is_named_with_its_checksum(tmp_path, tiny):
    folder, _, table = tiny
    (folder / FILES[1]).unlink()
    message = (
        f"{FILES[1]} is missing; expected SHA-256 {table['mnist'].sha256[FILES[1]]}"
    )
    with pytest.raises(FileNotFoundError, match=message):
        prepare.prepare(
            "mnist", data_dir=tmp_path / "data", source=folder, originals=table
        )


def test_a_preparation_that_dies_leaves_nothing_that_counts_as_prepared(
    tmp_path, tiny, monkeypatch
):
    folder, _, table = tiny

    def dies(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "read_labels", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(
            "mnist", data_dir=tmp_path / "data", source=folder, originals=table
        )
    with pytest.raises(FileNotFoundError, match="mnist is not prepared"):
        fashion_mnist.load(tmp_path / "data", "mnist")


def test_a_download_is_checked_and_used(tmp_path, tiny):
    folder, _, table = tiny
    address = folder.as_uri() + "/"
    table = {"mnist": dataclasses.replace(table["mnist"], address=address)}
    where = prepare.prepare("mnist", data_dir=tmp_path / "data", originals=table)
    assert (where / "dataset_info.json").exists()
    kept = tmp_path / "data" / "downloads" / "mnist"
    assert sorted(path.name for path in kept.iterdir()) == sorted(FILES)


def test_a_wrong_download_never_gets_its_name(tmp_path, tiny):
    folder, _, table = tiny
    (folder / FILES[0]).write_bytes(b"a page that says no")
    address = folder.as_uri() + "/"
    table = {"mnist": dataclasses.replace(table["mnist"], address=address)}
    with pytest.raises(ValueError, match="is not the publisher's file"):
        prepare.prepare("mnist", data_dir=tmp_path / "data", originals=table)
    assert not (tmp_path / "data" / "downloads" / "mnist" / FILES[0]).exists()


def test_without_a_network_it_says_what_to_fetch_and_where_to_put_it(tmp_path, tiny):
    _, _, table = tiny
    gone = (tmp_path / "nowhere").as_uri() + "/"
    table = {"mnist": dataclasses.replace(table["mnist"], address=gone)}
    with pytest.raises(ConnectionError) as caught:
        prepare.prepare("mnist", data_dir=tmp_path / "data", originals=table)
    message = str(caught.value)
    for file in FILES:
        assert gone + file in message
    assert str(tmp_path / "data" / "downloads" / "mnist") in message
    assert "python -m train.data.prepare mnist --from DIR" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 6]), "is no idx3 file: begins 00000801"),
        (bytes([0, 0, 8, 3, *[0, 0, 0, 2] * 3, 1]), r"says shape \(2, 2, 2\), has 1"),
    ],
    ids=["labels", "short"],
)
def test_a_file_of_another_kind_is_an_error(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message):
        prepare.read_images(path)


def test_first_and_last_records_are_those_of_the_original_files(tiny):
    """The publisher's files where there is a copy; else files made for the purpose."""
    folder, made, table = tiny
    records = {
        prefix: [(int(x[i].sum()), int(y[i])) for i in (0, -1)]
        for prefix, (x, y) in made.items()
    }
    if (ORIGINALS / "fashion_mnist").exists():
        folder, table = ORIGINALS / "fashion_mnist", prepare.ORIGINALS
        records = FASHION_RECORDS
    for file, expected in table["fashion_mnist"].sha256.items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == expected
    for prefix, expected in records.items():
        image = prepare.read_images(folder / f"{prefix}-images-idx3-ubyte.gz")
        label = prepare.read_labels(folder / f"{prefix}-labels-idx1-ubyte.gz")
        assert [(int(image[i].sum()), int(label[i])) for i in (0, -1)] == expected


def test_an_unknown_dataset_gets_the_nearest_name():
    command = [sys.executable, "-m", "train.data.prepare", "fashion_mnst"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "error: unknown dataset 'fashion_mnst', did you mean 'fashion_mnist'? "
        "There are: fashion_mnist, mnist"
    )
