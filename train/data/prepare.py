"""Prepare a dataset once, without TensorFlow: python -m train.data.prepare NAME.

Command:   python -m train.data.prepare fashion_mnist --data-dir data
           (--from DIR reads the publisher's files from DIR instead of downloading them)
Result:    data/fashion_mnist/3.0.1, ArrayRecord with PNG images, which
           tfds.data_source("fashion_mnist", data_dir="data") reads back

NAME is fashion_mnist, mnist, cifar10, cifar100, etth1, etth2, ettm1, ettm2,
tiny_shakespeare or imagenet2012, which needs TensorFlow: see train/data/imagenet.py.
"""

import dataclasses
import hashlib
import pathlib
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import tensorflow_datasets as tfds
import tyro

from train import files, names
from train.data import imagenet
from train.data.originals import ORIGINALS, Original, contents


def prepare(
    name: str,
    *,
    data_dir: pathlib.Path,
    source: pathlib.Path | None = None,
    originals: Mapping[str, Original] = ORIGINALS,
) -> pathlib.Path:
    """The folder of the prepared dataset, with every original file checked first.

    A dataset that is there already is left as it is. Nothing is written under its name
    before all checksums are right, and a preparation that is killed leaves a
    folder that no reader takes for the dataset.

    Args:     source: folder of the publisher's files; None downloads them.
    Raises:   ValueError: unknown name, or a file whose checksum is wrong.
              FileNotFoundError: a file is missing.
              ConnectionError: no download; says what to fetch and where to put it.
    """
    names.find("dataset", name, {**originals, imagenet.NAME: None})
    if name == imagenet.NAME:
        return imagenet.prepare(data_dir, source)
    original = originals[name]
    folder = data_dir / name / original.version
    if (folder / "dataset_info.json").exists():  # written last, then renamed as a whole
        return folder
    files = _collect(name, original, source, data_dir / "downloads")
    builder = _builder(name, original, files, data_dir)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(
        download_dir=data_dir / "downloads", download_config=config
    )
    return folder


def _collect(
    name: str, original: Original, source: pathlib.Path | None, downloads: pathlib.Path
) -> pathlib.Path:
    """The folder with all files, each of them right; an archive is unpacked for it."""
    files = source or downloads / name
    archive = original.archive
    if archive is not None and not _has_all(files, original.sha256):
        if source is None and not (files / archive).exists():
            _download(name, original, archive, files)
        _check(files / archive, original.archive_sha256)
        files = _unpack(files / archive, original, downloads / name / "unpacked")
    for file, expected in original.sha256.items():
        if source is None and archive is None and not (files / file).exists():
            _download(name, original, file, files)
        if expected is not None:
            _check(files / file, expected)
    return files


def _has_all(files: pathlib.Path, sha256: Mapping[str, str | None]) -> bool:
    """Whether the files of an archive are here, and can be known to be right."""
    found = {x.name.removesuffix(".gz").removesuffix(".xz") for x in files.glob("*")}
    return sha256.keys() <= found and None not in sha256.values()


def _unpack(
    archive: pathlib.Path, original: Original, folder: pathlib.Path
) -> pathlib.Path:
    """The files that the dataset consists of, without the folders of the archive."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as stream:
        for member in stream:
            file = pathlib.PurePosixPath(member.name).name
            content = stream.extractfile(member)  # None where it is no file
            if file in original.sha256 and content is not None:
                (folder / file).write_bytes(content.read())
    return folder


def _builder(
    name: str, original: Original, files: pathlib.Path, data_dir: pathlib.Path
) -> Any:
    """A builder with the name, version and features of the one tfds has."""
    content = original.read(original, files)

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # untyped base
        VERSION = tfds.core.Version(original.version)

        def _info(self) -> Any:
            keys = ("image", "label")
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(content.features),
                supervised_keys=keys if "image" in content.features else None,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # the files are here, and checked
            return {x: self._generate_examples(x) for x in content.splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, Any]]:
            yield from enumerate(content.splits[split]())

    Prepared.name = name
    return Prepared(data_dir=data_dir, file_format="array_record")


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
        every = [original.archive] if original.archive else original.sha256
        wanted = "\n".join(f"  {original.address}{each}" for each in every)
        raise ConnectionError(
            f"cannot download {original.address}{file}: {error}\n"
            f"Fetch these files where there is a network:\n{wanted}\n"
            f"and put them, as they are, into {folder}, or into a folder DIR of their "
            f"own and run: python -m train.data.prepare {name} --from DIR"
        ) from error
    whole = file == original.archive
    _check(part, original.archive_sha256 if whole else original.sha256[file] or "")
    part.rename(folder / file)


def _check(path: pathlib.Path, expected: str) -> None:
    try:
        found = hashlib.sha256(contents(path)).hexdigest()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; expected SHA-256 {expected}") from error
    if found != expected:
        raise ValueError(
            f"{path} is not the publisher's file: expected SHA-256 {expected}, "
            f"found {found}"
        )


@dataclasses.dataclass(frozen=True)
class Settings:
    """Prepare a dataset for training, once."""

    name: tyro.conf.Positional[str]
    """Which dataset; an unknown name gets the list."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where prepared datasets live; give the same folder to the training program."""
    source: Annotated[pathlib.Path | None, tyro.conf.arg(name="from")] = None
    """Folder that has the publisher's files; without it they are downloaded."""


def main(settings: Settings) -> None:
    """Prepare, and say where the dataset is."""
    try:
        settings = files.with_paths_expanded(settings)
        data_dir = files.writable(settings.data_dir)
        folder = prepare(settings.name, data_dir=data_dir, source=settings.source)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{settings.name} is prepared in {folder}")


if __name__ == "__main__":
    main(tyro.cli(Settings, prog="python -m train.data.prepare"))
