"""A data set of the user's own: image files in ``<split>/<class>/``, in a folder or an archive."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from lossprune.data import Source
from lossprune.data.archive import read_archive
from lossprune.data.dataset import Dataset, Split, moments
from lossprune.data.image_cache import Decoded, cached
from lossprune.data.image_file import GREY, SUFFIXES, decoding_bar, entries, is_image, opened

# The names that a split's folder may have.
SPLITS = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
# Part of the cache's key: to be changed with anything that changes what is decoded.
VERSION = "1"


def read_folder(source: Source) -> Dataset:
    """Return the images of ``<path>/{train,valid,test}/<class>/*.{jpg,jpeg,png}``.

    ``<path>`` is a folder, or a tar file (compressed or not) that holds these splits at its top or
    in one folder. All images have one size; they are read as grey if all are, else as colour
    (transparency is dropped). They are decoded once and cached (see ``image_cache``).

    Classes are the names in ``train``, sorted. The split ``valid``, or ``val``, may be missing: it
    is then the last tenth of ``train`` in an order that is always the same.

    Raises:
        FileNotFoundError: ``<path>``, or the split train or test in it, is not there.
        ValueError: an image that cannot be read or has another size than the rest, a class that
            has no training images, or an archive that is corrupt; the message names the file.
    """
    path = source.folder()
    if not path.exists():
        raise FileNotFoundError(f"path (--data_path) {path} does not exist")
    decoded = cached(_key(path), path, lambda: _decode(path, source.progress))
    train, valid = decoded.splits["train"], decoded.splits.get("valid")
    if valid is None:
        train, valid = _last_tenth(train)
    mean, std = moments(train.images)
    return Dataset(
        name="folder",
        train=train,
        valid=valid,
        test=decoded.splits["test"],
        classes=decoded.classes,
        mean=mean,
        std=std,
        augmented=True,
    )


def _last_tenth(every: Split) -> tuple[Split, Split]:
    if len(every) < 2:
        raise ValueError("path (--data_path) must hold at least 2 training images, got 1")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    first = len(every) - max(1, len(every) // 10)
    return every.take(order[:first]), every.take(order[first:])


def _key(path: Path) -> str:
    """Return a digest that changes when a file is added, removed, renamed or written."""
    digest = hashlib.sha256(VERSION.encode())
    for name, file in [("", path)] if path.is_file() else _files(path):
        status = file.stat()
        digest.update(
            f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0".encode()
        )
    return digest.hexdigest()


def _decode(path: Path, progress: bool | None) -> Decoded:
    """Read all images, and order them by split, class and name, wherever they come from."""
    contents = _archived(path) if path.is_file() else _contents(path)
    pixels: dict[tuple[str, str, str], np.ndarray] = {}
    first: tuple[str, tuple[int, ...]] | None = None
    with decoding_bar(progress) as bar:
        for name, raw in bar.track(contents):
            image = _pixels(f"{path}/{name}", raw)
            first = first or (name, image.shape)
            if image.shape[:2] != first[1][:2]:
                raise ValueError(
                    f"{path}/{name} is {image.shape[1]}×{image.shape[0]} pixels, but all images "
                    f"must have one size, and {first[0]} is {first[1][1]}×{first[1][0]}"
                )
            split, label, file = PurePosixPath(name).parts
            pixels[split, label, file] = image
    return _arranged(path, pixels)


def _arranged(path: Path, pixels: Mapping[tuple[str, str, str], np.ndarray]) -> Decoded:
    folders = {split for split, _, _ in pixels}
    if {"valid", "val"} <= folders:
        raise ValueError(f"{path} holds both valid and val: one split for validation is wanted")
    for split in ("train", "test"):
        if split not in folders:
            raise FileNotFoundError(
                f"{path} holds no images in {split}/<class>/ (*{', *'.join(SUFFIXES)})"
            )
    classes = sorted({label for split, label, _ in pixels if split == "train"})
    for split, label, _ in pixels:
        if label not in classes:
            raise ValueError(f"{path}/{split}/{label}: class {label!r} has no images in train")
    channels = max(image.shape[2] for image in pixels.values())
    splits = {}
    for folder in sorted(folders):
        names = sorted(name for name in pixels if name[0] == folder)
        stacked = np.empty((len(names), channels, *pixels[names[0]].shape[:2]), np.uint8)
        for place, name in zip(stacked, names, strict=True):
            place[:] = pixels[name].transpose(2, 0, 1)  # A grey image fills all three channels.
        labels = torch.tensor([classes.index(label) for _, label, _ in names])
        splits[SPLITS[folder]] = Split(torch.from_numpy(stacked), labels)
    return Decoded(tuple(classes), splits)


def _pixels(name: str, raw: bytes) -> np.ndarray:
    """Decode an image to uint8 (height, width, 1 or 3)."""
    with opened(name, raw) as image:
        pixels = np.asarray(image.convert("L" if image.mode in GREY else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name, file in _files(folder):
        yield name, file.read_bytes()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield ('split/class/file', path) of all images in a folder, sorted."""
    for split in SPLITS:
        for label in entries(folder / split, folders=True):
            for file in entries(folder / split / label, folders=False):
                yield f"{split}/{label}/{file}", folder / split / label / file


def _archived(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ('split/class/file', contents) of all images in a tar file, as stored there."""
    top = None
    for name, content in read_archive(path, _is_split_image):
        above = name.parents[2]
        top = above if top is None else top
        if above != top:
            raise ValueError(f"{path} holds splits in two places, {top}/ and {above}/")
        yield str(name.relative_to(top)), content


def _is_split_image(name: PurePosixPath) -> bool:
    """Whether ``name`` is <split>/<class>/<image>, at the top of an archive or in a folder."""
    return (
        3 <= len(name.parts) <= 4
        and name.parts[-3] in SPLITS
        and not name.parts[-2].startswith(".")
        and is_image(name.name)
    )
