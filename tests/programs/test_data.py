"""Data: splits, order as a function of seed and step, preparation and its errors."""

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import io
import lzma
import os
import pathlib
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from train.data import (
    arrays,
    digits,
    imagenet,
    originals,
    prepare,
    prepared,
    series,
    text,
)

ROOT = pathlib.Path(__file__).parents[2]
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


def test_validation_images_are_taken_from_every_class_and_from_training_alone():
    data = digits.load()
    parts = data.validate(300)
    assert parts.counts == {"train": 1137, "test": 360, "validation": 300}
    split = [parts.train_image, parts.validation_image]
    pixels = sorted(x.tobytes() for x in np.concatenate(split))
    assert pixels == sorted(x.tobytes() for x in data.train_image)
    assert set(np.bincount(parts.validation_label)) <= {29, 30, 31}
    rows = parts.rows("validation", np.array([5, 2]))
    np.testing.assert_array_equal(rows["image"], parts.validation_image[[5, 2]])
    np.testing.assert_array_equal(rows["label"], parts.validation_label[[5, 2]])
    again = data.validate(300)
    np.testing.assert_array_equal(again.train_image, parts.train_image)


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
    data = prepared.images(data_dir, name)
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
        prepared.images(tmp_path / "data", "mnist")


def test_a_file_as_the_folder_of_datasets_is_refused(tmp_path):
    (tmp_path / "file").touch()
    settings = prepare.Settings("mnist", data_dir=tmp_path / "file")
    with pytest.raises(SystemExit, match="file is a file: name another folder"):
        prepare.main(settings)


def test_originals_in_the_home_folder_are_looked_for_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    source = pathlib.Path("~/files")
    settings = prepare.Settings("mnist", data_dir=tmp_path / "data", source=source)
    with pytest.raises(SystemExit, match=f"{tmp_path}/files"):
        prepare.main(settings)


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

    monkeypatch.setattr(originals, "read_labels", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(
            "mnist", data_dir=tmp_path / "data", source=folder, originals=table
        )
    with pytest.raises(FileNotFoundError, match="mnist is not prepared"):
        prepared.images(tmp_path / "data", "mnist")


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
        originals.read_images(path)


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
        image = originals.read_images(folder / f"{prefix}-images-idx3-ubyte.gz")
        label = originals.read_labels(folder / f"{prefix}-labels-idx1-ubyte.gz")
        assert [(int(image[i].sum()), int(label[i])) for i in (0, -1)] == expected


real = pytest.mark.skipif(not ORIGINALS.exists(), reason=f"no data in {ORIGINALS}")
# Sum of the pixels and label of the first and the last image.
MNIST_RECORDS = {"train": [(27525, 5), (20920, 8)], "t10k": [(18454, 7), (41833, 6)]}
CIFAR_RECORDS = {
    "data_batch_1.bin": [(317790, 6), (380993, 5)],
    "data_batch_5.bin": [(501355, 1), (405136, 1)],
    "test_batch.bin": [(332962, 3), (331662, 7)],
}


@real
def test_first_and_last_images_of_mnist_are_those_of_the_original_files():
    folder = ORIGINALS / "mnist"
    for prefix, expected in MNIST_RECORDS.items():
        image = originals.read_images(folder / f"{prefix}-images-idx3-ubyte.gz")
        label = originals.read_labels(folder / f"{prefix}-labels-idx1-ubyte.gz")
        assert [(int(image[i].sum()), int(label[i])) for i in (0, -1)] == expected


@pytest.mark.long
@real
def test_first_and_last_images_of_cifar10_are_those_of_the_original_files():
    table = prepare.ORIGINALS["cifar10"]
    for file, expected in CIFAR_RECORDS.items():
        path = ORIGINALS / "cifar10" / file
        found = hashlib.sha256(originals.contents(path)).hexdigest()
        assert found == table.sha256[file]
        image, label = originals.read_cifar(path, 1)
        assert image.shape == (10_000, 32, 32, 3)
        assert np.bincount(label[:, 0]).shape == (10,)
        assert [(int(image[i].sum()), int(label[i, 0])) for i in (0, -1)] == expected


def write_cifar(folder, files, labels):
    """Files in the publisher's layout, and what is in them in order."""
    rng = np.random.default_rng(1)
    made = {}
    for file in files:
        rows = rng.integers(0, 256, (3, labels + 3072), dtype=np.uint8)
        rows[:, :labels] %= 10
        (folder / file).write_bytes(rows.tobytes())
        pixels = rows[:, labels:].reshape(-1, 3, 32, 32)
        made[file] = (pixels.transpose(0, 2, 3, 1), rows[:, labels - 1])
    return made


def checksums(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
    }


def records(images, labels):
    return {x.tobytes(): int(y) for x, y in zip(images, labels, strict=True)}


@pytest.mark.parametrize("packed", ["plain", "xz", "archive"])
def test_cifar10_is_prepared_from_its_files_packed_or_not(tmp_path, packed):
    folder = tmp_path / "originals"
    folder.mkdir()
    table = prepare.ORIGINALS["cifar10"]
    made = write_cifar(folder, table.sha256, 1)
    table = dataclasses.replace(table, sha256=checksums(folder))
    if packed == "xz":
        for path in list(folder.iterdir()):
            target = path.with_name(path.name + ".xz")
            target.write_bytes(lzma.compress(path.read_bytes()))
            path.unlink()
    if packed == "archive":
        table = archived(folder, table)
    prepare.prepare(
        "cifar10", data_dir=tmp_path, source=folder, originals={"cifar10": table}
    )
    data = prepared.images(tmp_path, "cifar10")
    parts = [made[f"data_batch_{i}.bin"] for i in range(1, 6)]
    expected = records(*(np.concatenate(x) for x in zip(*parts, strict=True)))
    assert records(data.train_image, data.train_label) == expected
    assert records(data.test_image, data.test_label) == records(*made["test_batch.bin"])
    assert data.classes[3] == "cat"
    rows = tfds.data_source("cifar10", data_dir=tmp_path, download=False)["train"]
    assert {x["id"].decode() for x in rows} == {f"train_{i:05d}" for i in range(15)}
    assert "tensorflow" not in sys.modules


def archived(folder, table):
    """The table for the files of a folder after they were moved into an archive."""
    with tarfile.open(folder / table.archive, "w:gz") as stream:
        for file in table.sha256:
            stream.add(folder / file, f"cifar-binary/{file}")
            (folder / file).unlink()
    found = hashlib.sha256((folder / table.archive).read_bytes()).hexdigest()
    return dataclasses.replace(table, archive_sha256=found)


def test_cifar100_comes_out_of_its_archive_with_both_labels(tmp_path):
    folder = tmp_path / "originals"
    folder.mkdir()
    table = prepare.ORIGINALS["cifar100"]
    made = write_cifar(folder, ("train.bin", "test.bin"), 2)
    for kind, count in (("fine", 100), ("coarse", 20)):
        lines = "".join(f"{kind}{i}\n" for i in range(count))
        (folder / f"{kind}_label_names.txt").write_text(lines)
    table = archived(folder, table)
    prepare.prepare(
        "cifar100", data_dir=tmp_path, source=folder, originals={"cifar100": table}
    )
    data = prepared.images(tmp_path, "cifar100")
    assert data.classes[99] == "fine99"
    assert records(data.test_image, data.test_label) == records(*made["test.bin"])
    content = bytearray((folder / table.archive).read_bytes())
    content[-1] ^= 1
    (folder / table.archive).write_bytes(content)
    with pytest.raises(ValueError, match=r"100-binary.* is not the publ"):
        prepare.prepare(
            "cifar100",
            data_dir=tmp_path / "again",
            source=folder,
            originals={"cifar100": table},
        )


def test_a_missing_archive_says_what_to_fetch(tmp_path):
    table = prepare.ORIGINALS["cifar100"]
    gone = (tmp_path / "nowhere").as_uri() + "/"
    table = {"cifar100": dataclasses.replace(table, address=gone)}
    with pytest.raises(ConnectionError, match=f"{gone}cifar-100-binary.tar.gz"):
        prepare.prepare("cifar100", data_dir=tmp_path, originals=table)


def test_a_damaged_record_is_named_by_its_index(tmp_path, tiny, monkeypatch):
    folder, _, table = tiny
    prepare.prepare("mnist", data_dir=tmp_path, source=folder, originals=table)

    class Damaged:
        def __len__(self):
            return 12

        def __getitems__(self, index):
            return [self[i] for i in index]

        def __getitem__(self, i):
            if i == 7:
                raise OSError("cannot identify image file")
            return {"image": np.zeros((28, 28, 1), np.uint8), "label": 0}

    monkeypatch.setattr(
        prepared,
        "_builder",
        lambda *_: SimpleNamespace(as_data_source=lambda _: Damaged()),
    )
    with pytest.raises(ValueError, match="record 7 of mnist train is damaged: cannot"):
        prepared.images(tmp_path, "mnist")


@pytest.mark.parametrize("name", ["etth2", "tiny_shakespeare"])
def test_series_and_text_are_prepared_and_read_back(tmp_path, name):
    """The publisher's file where there is a copy; else one made for the purpose."""
    source = ORIGINALS / {"etth2": "ett", "tiny_shakespeare": "tinyshakespeare"}[name]
    table = prepare.ORIGINALS
    if not source.exists():
        source, table = tmp_path, made_up(tmp_path, name)
    prepare.prepare(name, data_dir=tmp_path, source=source, originals=table)
    (file,) = table[name].sha256
    if name == "etth2":
        found = prepared.series(tmp_path, name)
        seconds, value = originals.read_series(source / file)
        np.testing.assert_array_equal(found.time.astype(np.int64), seconds)
        np.testing.assert_array_equal(found.value, value)
        assert found.time[:2].astype(str).tolist() == [
            "2016-07-01T00:00:00",
            "2016-07-01T01:00:00",
        ]
    else:
        parts = prepared.text(tmp_path)
        whole = parts["train"] + parts["validation"] + parts["test"]
        assert whole == originals.contents(source / file).decode()
        assert len(parts["train"]) == int(0.9 * len(whole))
    assert "tensorflow" not in sys.modules


def made_up(folder, name):
    original = prepare.ORIGINALS[name]
    (file,) = original.sha256
    hours = np.datetime64("2016-07-01T00", "s") + np.arange(50) * np.timedelta64(1, "h")
    lines = [f"{str(x).replace('T', ' ')},1,2,3,4,5,6,{i}" for i, x in enumerate(hours)]
    head = ",".join(("date", *originals.SERIES))
    (folder / file).write_text("\n".join([head, *lines]) + "\n")
    return {name: dataclasses.replace(original, sha256=checksums(folder))}


def test_a_row_that_is_no_row_is_named(tmp_path):
    head = ",".join(("date", *originals.SERIES))
    path = tmp_path / "ETTh1.csv"
    good = "2016-07-01 00:00:00,1,2,3,4,5,6,7"
    path.write_text(f"{head}\n{good}\n2016-07-01 01:00:00,1,2,x,4,5,6,7\n")
    with pytest.raises(ValueError, match=r"row 1 of .*ETTh1.csv is .*'x'"):
        originals.read_series(path)
    path.write_text(f"date,OT\n{good}\n")
    with pytest.raises(ValueError, match="must have the columns date,HUFL"):
        originals.read_series(path)


def test_time_marks_are_places_from_minus_to_plus_a_half():
    time = np.array(["2016-07-01T00:00", "2017-12-31T23:59"], "datetime64[s]")
    friday = [-0.5, -0.5, 4 / 6 - 0.5, -0.5, 182 / 365 - 0.5]
    sunday = [0.5, 0.5, 0.5, 0.5, 364 / 365 - 0.5]
    np.testing.assert_allclose(
        series.marks(time, minutes=True), [friday, sunday], atol=1e-6
    )
    found = series.marks(time, minutes=False)
    np.testing.assert_allclose(found, [friday[1:], sunday[1:]], atol=1e-6)


def hourly(rows):
    time = np.datetime64("2016-07-01T00", "s") + np.arange(rows) * np.timedelta64(
        3600, "s"
    )
    return series.Series(time, np.arange(2.0 * rows, dtype=np.float32).reshape(-1, 2))


def test_windows_are_rows_given_then_rows_to_come_of_the_scaled_series():
    data = hourly(14_400)
    split = series.splits(data, history=96, horizon=24)
    assert [len(split[x]) for x in split] == [8640 - 119, 2880 - 23, 2880 - 23]
    train = data.value[:8640].astype(np.float64)
    scaled = (data.value - train.mean(axis=0)) / train.std(axis=0)
    found = split["validation"].take(np.array([0, 2856]))
    for i, start in enumerate((8640 - 96, 8640 - 96 + 2856)):
        stop = start + 96
        np.testing.assert_allclose(found["value"][i], scaled[start:stop], atol=1e-5)
        target = scaled[stop : stop + 24]
        np.testing.assert_allclose(found["target"][i], target, atol=1e-5)
        mark = series.marks(data.time[start : stop + 24], minutes=False)
        np.testing.assert_array_equal(found["mark"][i], mark)
    with pytest.raises(IndexError, match="windows go from 0 to 2856, got"):
        split["validation"].take(np.array([2857]))


def test_batches_of_windows_are_all_windows_in_a_new_order_every_epoch():
    windows = series.splits(hourly(14_400), history=96, horizon=2800)["test"]
    stream = series.batches(windows, batch=9, seed=0)
    epochs = [
        np.concatenate([stream[9 * e + t]["value"][:, 0, 0] for t in range(9)])
        for e in range(2)
    ]
    assert np.array_equal(np.sort(epochs[0]), windows.value[: len(windows), 0])
    assert np.array_equal(np.sort(epochs[0]), np.sort(epochs[1]))
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 14_399}, "20 months are 14400 rows, got 14399"),
        ({"horizon": 2_900}, "validation has 2976 rows, too few for windows of 96"),
        ({"gap": 70}, "rows 69 and 70 are not 3600 seconds apart"),
    ],
    ids=["short", "horizon", "gap"],
)
def test_a_series_that_does_not_fit_is_an_error(change, message):
    data = hourly(change.get("rows", 14_400))
    if "gap" in change:
        data.time[change["gap"] :] += np.timedelta64(60, "s")
    with pytest.raises(ValueError, match=message):
        series.splits(data, history=96, horizon=change.get("horizon", 24))


COLUMN_MEANS = {
    "ETTm2": (41.5635, 12.2964, 46.6353, 10.5454, 1.1864, -2.3658, 26.8724),
    "ETTh2": (41.5368, 12.2735, 46.6098, 10.5262, 1.1870, -2.3732, 26.8720),
}
WINDOW_COUNTS = {
    ("ETTm", 96): (34_369, 11_425, 11_425),
    ("ETTm", 192): (34_273, 11_329, 11_329),
    ("ETTm", 336): (34_129, 11_185, 11_185),
    ("ETTm", 720): (33_745, 10_801, 10_801),
    ("ETTh", 96): (8449, 2785, 2785),
    ("ETTh", 192): (8353, 2689, 2689),
    ("ETTh", 336): (8209, 2545, 2545),
    ("ETTh", 720): (7825, 2161, 2161),
}
# Mean squared and absolute error of repeating the last row, over all test windows.
REPEATED = {
    ("ETTm2", 96): (0.2665, 0.3278),
    ("ETTm2", 192): (0.3400, 0.3707),
    ("ETTm2", 336): (0.4121, 0.4099),
    ("ETTm2", 720): (0.5216, 0.4656),
    ("ETTm1", 96): (1.2139, 0.6648),
    ("ETTm1", 192): (1.2612, 0.6904),
    ("ETTm1", 336): (1.2866, 0.7072),
    ("ETTm1", 720): (1.3223, 0.7295),
    ("ETTh2", 96): (0.4317, 0.4216),
    ("ETTh2", 192): (0.5337, 0.4725),
    ("ETTh2", 336): (0.5973, 0.5109),
    ("ETTh2", 720): (0.5945, 0.5190),
    ("ETTh1", 96): (1.2944, 0.7132),
    ("ETTh1", 192): (1.3249, 0.7331),
    ("ETTh1", 336): (1.3299, 0.7460),
    ("ETTh1", 720): (1.3351, 0.7550),
}


@functools.cache
def original_series(name):
    time, value = originals.read_series(ORIGINALS / "ett" / f"{name}.csv")
    return series.Series(time.astype("datetime64[s]"), value)


@real
@pytest.mark.parametrize("name", COLUMN_MEANS)
def test_means_of_the_training_rows_are_those_of_the_paper(name):
    data = original_series(name)
    rows = 365 // 30 * 30 * 24 * (4 if "m" in name else 1)
    found = data.value[:rows].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(found, COLUMN_MEANS[name], atol=1e-4)
    train = series.splits(data, history=96, horizon=96)["train"]
    np.testing.assert_allclose(train.value.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(train.value.std(axis=0), 1, atol=1e-4)
    assert train.mark.shape[1] == (5 if "m" in name else 4)


@real
@pytest.mark.parametrize(("name", "horizon"), REPEATED)
def test_repeating_the_last_row_has_the_known_error(name, horizon):
    split = series.splits(original_series(name), history=96, horizon=horizon)
    assert tuple(len(x) for x in split.values()) == WINDOW_COUNTS[name[:4], horizon]
    squared = absolute = 0.0
    test = split["test"]
    for numbers in np.array_split(np.arange(len(test)), 20):
        window = test.take(numbers)
        error = window["target"] - window["value"][:, -1:]
        squared += float(np.sum(error**2, dtype=np.float64))
        absolute += float(np.sum(np.abs(error), dtype=np.float64))
    count = len(test) * horizon * 7
    np.testing.assert_allclose(
        (squared / count, absolute / count), REPEATED[name, horizon], atol=1e-3
    )


def test_an_unknown_dataset_gets_the_nearest_name():
    command = [sys.executable, "-m", "train.data.prepare", "fashion_mnst"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "error: unknown dataset 'fashion_mnst', did you mean 'fashion_mnist'? "
        "There are: fashion_mnist, mnist, cifar10, cifar100, etth1, etth2, ettm1, "
        "ettm2, tiny_shakespeare, imagenet2012"
    )


def test_reading_ahead_gives_the_items_of_the_stream_wherever_it_begins():
    image, label = numbered(50)
    stream = arrays.batches(image, label, batch=8, seed=3)
    item = arrays.read_ahead(stream, batches=3)
    for t in (0, 1, 2, 7, 8, 3, 3):
        np.testing.assert_array_equal(item(t)["label"], stream[t]["label"])


PHOTOS = 5


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """ImageNet in small, as tensorflow-datasets lays it out, and its pixels."""
    made = []
    rng = np.random.default_rng(0)
    for i in range(PHOTOS):
        size = (20 + 10 * i, 50 - 5 * i)
        rough = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        made.append(Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC))
    made[1] = made[1].convert("L")  # some are grey

    class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(encoding_format="jpeg"),
                        "label": tfds.features.ClassLabel(num_classes=PHOTOS),
                        "file_name": tfds.features.Text(),
                    }
                ),
            )

        def _split_generators(self, _):
            names = ("train", "validation")
            return {name: self._generate_examples() for name in names}

        def _generate_examples(self):
            for i, image in enumerate(made):
                data = io.BytesIO()
                image.save(data, "JPEG", quality=100, subsampling=0)
                data.seek(0)
                yield i, {"image": data, "label": i, "file_name": f"{i}.JPEG"}

    Photos.name = imagenet.NAME
    folder = tmp_path_factory.mktemp("imagenet")
    Photos(data_dir=folder, file_format="array_record").download_and_prepare()
    assert imagenet.prepare(folder, None) == folder / "imagenet2012" / "5.1.0"
    return folder, made


def test_photos_are_decoded_and_keep_their_labels(photos):
    folder, made = photos
    data = imagenet.ImageNet(folder, size=16, part=0.8)
    assert data.shape == (16, 16, 3)
    assert data.counts == {"train": PHOTOS, "test": PHOTOS}
    assert len(data.classes) == PHOTOS
    found = data.rows("test", np.arange(PHOTOS))
    assert sorted(found["label"].tolist()) == list(range(PHOTOS))
    for pixels, i in zip(found["image"], found["label"], strict=True):
        image = made[i].convert("RGB")
        short = min(image.size)
        size = [max(20, round(x * 20 / short)) for x in image.size]
        whole = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)
        top, left = ((x - 16) // 2 for x in whole.shape[:2])
        expected = whole[top : top + 16, left : left + 16]
        assert np.mean(np.abs(pixels - expected)) < 2  # of 255, lost in the JPEG
    assert "tensorflow" not in sys.modules


def test_random_crops_depend_on_seed_step_and_place_alone(photos):
    folder, _ = photos
    records = imagenet.source(folder, "train")
    crop = functools.partial(imagenet.crop, size=8)
    stream = imagenet.batches(records, crop, batch=4, seed=1)
    data = imagenet.ImageNet(folder, size=8)
    item = data.batches(batch=4, seed=1, part=slice(None))
    halves = [
        imagenet.batches(records, crop, batch=4, seed=1, part=slice(a, a + 2))
        for a in (0, 2)
    ]
    for t in (0, 1, 5):
        parts = [x[t]["image"] for x in halves]
        np.testing.assert_array_equal(stream[t]["image"], np.concatenate(parts))
        np.testing.assert_array_equal(stream[t]["image"], item(t)["image"])
    first, later = {}, {}
    for found, steps in ((first, (0, 1)), (later, (5, 6))):
        for t in steps:
            found |= dict(zip(stream[t]["label"], stream[t]["image"], strict=True))
    both = first.keys() & later.keys()
    assert both
    assert all(np.any(first[i] != later[i]) for i in both)


def test_random_crops_are_rectangles_of_the_asked_areas_and_aspects(monkeypatch):
    boxes = []
    image = Image.new("RGB", (80, 60))

    def resize(self, size, kind, box):
        boxes.append((kind, *box))
        return Image.new("RGB", size)

    monkeypatch.setattr(Image.Image, "resize", resize)
    rng = np.random.default_rng(0)
    for _ in range(300):
        imagenet.crop(image, rng, size=8, area=(0.3, 0.6))
    kind, left, top, right, bottom = np.array(boxes).T
    area, aspect = (right - left) * (bottom - top), (right - left) / (bottom - top)
    assert np.all((left >= 0) & (top >= 0) & (right <= 80) & (bottom <= 60))
    assert 0.29 < area.min() / 4800 < 0.33
    assert 0.57 < area.max() / 4800 < 0.61
    assert 0.72 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.39
    assert set(kind) == {Image.Resampling.BILINEAR, Image.Resampling.BICUBIC}
    boxes.clear()
    narrow = Image.new("RGB", (100, 10))
    imagenet.crop(narrow, rng, size=8, area=(1.0, 1.0))  # nothing fits: the middle
    assert boxes[0][1:] == (43, 0, 56, 10)


def test_a_damaged_photo_is_named_by_its_index(photos):
    records = [dict(x) for x in imagenet.source(photos[0], "train")]
    records[3]["image"] = records[3]["image"][:30]
    stream = imagenet.batches(records, imagenet.crop, batch=PHOTOS, seed=0)
    with pytest.raises(ValueError, match="record 3 of imagenet2012 is damaged"):
        stream[0]


def test_imagenet_that_is_not_there_says_how_to_prepare_it(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="prepare imagenet2012 --from DIR --da"):
        imagenet.source(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"train.tar and .*_val.tar missing in"):
        prepare.prepare("imagenet2012", data_dir=tmp_path, source=tmp_path)
    for file in imagenet.ARCHIVES:
        (tmp_path / file).touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install tensorflow-cpu"):
        prepare.prepare("imagenet2012", data_dir=tmp_path, source=tmp_path)


def test_passages_are_the_text_and_what_follows():
    data = text.embedded()
    assert data.decode(np.concatenate(list(data.parts.values()))) == text.SONNETS
    token = data.parts["train"]
    found = text.passages(token, context=16)
    whole = data.decode(found["token"].ravel())
    assert whole == text.SONNETS[: len(whole)]
    assert len(token) - len(whole) <= 16
    assert data.decode(found["target"].ravel()) == text.SONNETS[1 : len(whole) + 1]
    batch = text.batches(token, context=16, batch=5, seed=0)[3]
    assert batch["token"].shape == (5, 16)
    for row, after in zip(*batch.values(), strict=True):
        assert data.decode(row) + data.decode(after[-1:]) in text.SONNETS
    with pytest.raises(ValueError, match=r"`context` must be in \[1, 4\], got 5"):
        text.passages(token[:5], context=5)


@real
def test_the_command_prepares_a_series(tmp_path):
    command = [sys.executable, "-m", "train.data.prepare", "etth1"]
    command += ["--from", str(ORIGINALS / "ett"), "--data-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(
        f"etth1 is prepared in {tmp_path / 'etth1' / '1.0.0'}\n"
    )
    assert prepared.series(tmp_path, "etth1").value.shape == (17_420, 7)
