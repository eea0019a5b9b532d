"""CIFAR-10: 32×32 colour images in ten classes, by A. Krizhevsky, V. Nair and G. Hinton.

Read from ``<path>/cifar-10-batches-py`` or ``<path>/cifar-10-python.tar.gz``, which is downloaded
if both are missing. The six batches are pickles; they are read without running anything in them
(see ``batch_pickle``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import torch

from lossprune.data import Source
from lossprune.data.archive import read_archive
from lossprune.data.batch_pickle import read_batch
from lossprune.data.dataset import Dataset, Split
from lossprune.data.download import fetch
from lossprune.data.transfer import RemoteFile

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
MIRRORS = ("https://www.cs.toronto.edu/~kriz",)
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.247, 0.243, 0.261)


def read_cifar10(source: Source) -> Dataset:
    """Return CIFAR-10: the first nine tenths (45,000) train, the rest (5,000) valid, 10,000 test.

    Batches of other images in the same format are taken too. A folder in which only some of the
    batches are CIFAR-10's is not: the others must have been damaged.

    Raises:
        ValueError: a batch or the archive is corrupt, or not made as CIFAR-10's are.
        FileNotFoundError: a batch is missing from the folder or the archive.
        OSError: the archive was missing and could not be downloaded.
    """
    path = source.folder()
    place = path / FOLDER
    if place.is_dir():
        contents = _from_folder(place)
    else:
        place = path / ARCHIVE
        if not place.exists():
            remote = RemoteFile(ARCHIVE, MIRRORS, _verify_archive)
            fetch(remote, path, mirror=source.mirror, progress=source.progress)
        contents = _from_archive(place)
    _check_complete(place, contents)
    splits = {name: _split(place / name, raw) for name, raw in contents.items()}
    test = splits.pop("test_batch")
    images = torch.cat([split.images for split in splits.values()])
    labels = torch.cat([split.labels for split in splits.values()])
    first = len(labels) * 9 // 10
    return Dataset(
        name="cifar10",
        train=Split(images[:first], labels[:first]),
        valid=Split(images[first:], labels[first:]),
        test=test,
        classes=CLASSES,
        mean=MEAN,
        std=STD,
        augmented=True,
    )


def _verify_archive(path: Path) -> None:
    """Raise ValueError unless the file is the published archive."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != ARCHIVE_MD5:
        raise ValueError(f"its MD5 is {digest}, not {ARCHIVE_MD5}")


def _from_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for name in MD5 if (path := folder / name).exists()}


def _from_archive(path: Path) -> dict[str, bytes]:
    """Read the batches without unpacking the archive, so that it writes no file anywhere."""
    wanted = {PurePosixPath(FOLDER, name) for name in MD5}
    contents = {name.name: content for name, content in read_archive(path, wanted.__contains__)}
    return {name: contents[name] for name in MD5 if name in contents}


def _check_complete(place: Path, contents: Mapping[str, bytes]) -> None:
    missing = [name for name in MD5 if name not in contents]
    if missing:
        raise FileNotFoundError(f"{place} lacks {', '.join(missing)}, which CIFAR-10 consists of")
    wrong = [name for name, raw in contents.items() if _md5(raw) != MD5[name]]
    if 0 < len(wrong) < len(MD5):
        raise ValueError(
            f"{place / wrong[0]} is corrupt: its MD5 is {_md5(contents[wrong[0]])}, not "
            f"{MD5[wrong[0]]}, though other batches beside it are CIFAR-10's"
        )


def _md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()


def _split(path: Path, raw: bytes) -> Split:
    """Return the images of one batch: each row holds the red, then green, then blue plane."""
    try:
        data, labels = read_batch(raw)
        return Split(torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), torch.from_numpy(labels))
    except ValueError as error:
        raise ValueError(f"{path} is not a batch of CIFAR-10: {error}") from None
