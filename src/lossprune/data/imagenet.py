"""ImageNet, and photographs that are laid out as it is: files of any size by split and class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from lossprune.data import Source
from lossprune.data.dataset import Dataset
from lossprune.data.image_file import entries
from lossprune.data.image_map import Listing, mapped

SIDE = 224
# What networks trained on ImageNet were trained with, wherever their weights are published.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# One image in so many: of training, for validation; of what is left, to score the training by.
HELD_OUT = 25
# Part of the cache's key: to be changed with anything that changes what is decoded.
VERSION = "1"


def read_imagenet(source: Source) -> Dataset:
    """Return the images of ``<path>/{train,val}/<class>/*.{JPEG,jpg,jpeg,png}``, all in colour.

    The middle square of each is stored at 8/7 of ``source.image_size`` (256 for 224), decoded once
    and mapped into memory (see ``image_map``).  The network gets the middle ``image_size`` pixels
    of that, or in training a random window (see ``crops``).

    ``val`` (or ``valid``) is the test split, and every 25th image of ``train``, counted class by
    class in an order that is always the same, is for validation.  Where there is a folder ``test``,
    that is the test split, and ``val`` is for validation.  Loss and error on training images are
    those of every 25th.

    Whether there are files to add, to remove or to rename is seen by the times of the folders; an
    image replaced in place is not noticed.

    Raises:
        FileNotFoundError: ``<path>``, or the images of a split, are not there.
        ValueError: images that cannot be read; a class that has no training images; both ``val``
            and ``valid``; too little room for the cache.
    """
    path, side = source.folder(), source.image_size or SIDE
    if not path.is_dir():
        raise FileNotFoundError(f"path (--data_path) {path} is not a folder")
    folders = _split_folders(path)
    decoded = mapped(
        _key(folders), path, stored_side(side), lambda: _listing(folders), source.progress
    )
    return Dataset(
        name="imagenet",
        train=decoded.splits["train"],
        valid=decoded.splits["valid"],
        test=decoded.splits["test"],
        classes=decoded.classes,
        mean=MEAN,
        std=STD,
        augmented=True,
        crop=side,
        score_every=HELD_OUT,
    )


def stored_side(side: int) -> int:
    """Return how high and wide the images are stored that a network gets at ``side`` pixels.

    >>> stored_side(224)
    256
    """
    return round(side * 8 / 7)


def _split_folders(path: Path) -> dict[str, Path]:
    """Return the folders of train and test, and of valid where it has one of its own."""
    val = [path / name for name in ("val", "valid") if (path / name).is_dir()]
    if len(val) > 1:
        raise ValueError(f"{path} holds both valid and val: one split for validation is wanted")
    folders = {"train": path / "train"}
    if (path / "test").is_dir():
        folders |= {"valid": val[0] if val else path / "val", "test": path / "test"}
    else:
        folders["test"] = val[0] if val else path / "val"
    for name, folder in folders.items():
        if not entries(folder, folders=True):
            raise FileNotFoundError(
                f"{path} holds no images for {name} in {folder.name}/<class>/"
                + (": unpack each class into a folder of its own" if folder.is_dir() else "")
            )
    return folders


def _key(folders: dict[str, Path]) -> str:
    """Return a digest that changes when an image is added, removed or renamed."""
    digest = hashlib.sha256(VERSION.encode())
    for name, folder in folders.items():
        for label in entries(folder, folders=True):
            changed = (folder / label).stat().st_mtime_ns
            digest.update(f"{name}/{folder.name}/{label}\0{changed}\0".encode())
    return digest.hexdigest()


def _listing(folders: dict[str, Path]) -> Listing:
    found = {
        name: {
            label: [folder / label / file for file in entries(folder / label, folders=False)]
            for label in entries(folder, folders=True)
        }
        for name, folder in folders.items()
    }
    classes = tuple(label for label, files in found["train"].items() if files)
    for name, by_class in found.items():
        for label, files in by_class.items():
            if files and label not in classes:
                raise ValueError(f"{folders[name] / label}: class {label!r} has no images in train")
        if not any(by_class.values()):
            raise FileNotFoundError(f"{folders[name]} holds no images in <class>/")
    by_split = {name: [by_class.get(c, []) for c in classes] for name, by_class in found.items()}
    if "valid" not in by_split:
        by_split["train"], by_split["valid"] = _held_out(by_split["train"])
    return Listing(
        classes,
        {
            name: [file for files in of_split for file in files]
            for name, of_split in by_split.items()
        },
        {name: [len(files) for files in of_split] for name, of_split in by_split.items()},
    )


def _held_out(by_class: Sequence[Sequence[Path]]) -> tuple[list[list[Path]], list[list[Path]]]:
    """Part the training images; of fewer than 25 the last one is for validation."""
    generator = torch.Generator().manual_seed(0)
    total = sum(map(len, by_class))
    if total < 2:
        raise ValueError("path (--data_path) must hold at least 2 training images, got 1")
    every = min(HELD_OUT, total)
    train, valid, seen = [], [], 0
    for files in by_class:
        order = torch.randperm(len(files), generator=generator).tolist()
        out = {files[place] for turn, place in enumerate(order, seen + 1) if turn % every == 0}
        train.append([file for file in files if file not in out])
        valid.append([file for file in files if file in out])
        seen += len(files)
    return train, valid
