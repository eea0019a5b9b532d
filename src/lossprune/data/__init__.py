"""Data sets as tensors, with a split for training, validation and test.

``DATASETS`` lists what there is, and ``load`` reads one:

>>> digits = load("digits", seed=1111)
>>> len(digits.train), len(digits.valid), len(digits.test), digits.shape
(1297, 250, 250, (1, 8, 8))

To add a data set, write a function that takes a :class:`Source` and give it a line in ``DATASETS``;
a larger one is ``read_<name>`` in the module of this package that bears its name.  torch is
imported only when a data set is loaded, so that the table can be read for flags and help at no
cost.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossprune.pruning.names import did_you_mean

if TYPE_CHECKING:
    import torch

    from lossprune.data.dataset import Dataset as Dataset
    from lossprune.data.dataset import Split as Split

MOST_IMAGE_SIZE = 65_535  # of a JPEG
DATA_PATH = Path(os.environ.get("LOSSPRUNE_DATA") or "data")
"""The folder of the data sets where none is given."""
DATA_PATH_HELP = "folder of the data sets; if not given, $LOSSPRUNE_DATA or data"

__all__ = ["DATASETS", "Dataset", "DatasetEntry", "Source", "Split", "load"]


@dataclass(frozen=True)
class Source:
    """Where a data set is read from, and how its random split is drawn.

    Attributes:
        path: the folder (or, for an image folder, the archive) that the user gave.
        seed: draws the split of a data set that has no fixed one.
        mirror: base URL to download missing files from; None: the data set's own addresses.
        progress: show progress bars on standard error; None: only where it is a terminal.
        image_size: height and width of the network's inputs, where images are brought to a size;
            None: the data set's own.
    """

    path: Path | None
    seed: int
    mirror: str | None = None
    progress: bool | None = None
    image_size: int | None = None

    def folder(self) -> Path:
        """Return ``path``; raise ValueError if none was given."""
        if self.path is None:
            raise ValueError("path (--data_path) is missing: it names the folder of the data set")
        return self.path


@dataclass(frozen=True)
class DatasetEntry:
    """One line of ``DATASETS``: what the data set is, and the function that reads it.

    Attributes:
        summary: what it is and where it lies.
        read: reads it.
        needs_path: whether it must be told where.
        sized: whether its images are brought to the size that is asked for.
    """

    summary: str
    read: Callable[[Source], Dataset]
    needs_path: bool = True
    sized: bool = False


def _read(name: str, source: Source) -> Dataset:
    """Call ``read_<name>`` of the module of that name."""
    return getattr(import_module(f"lossprune.data.{name}"), f"read_{name}")(source)


DATASETS: dict[str, DatasetEntry] = {
    "mnist": DatasetEntry(
        "MNIST, in <path>/MNIST/raw; downloaded if missing", partial(_read, "mnist")
    ),
    "cifar10": DatasetEntry(
        "CIFAR-10, in <path>/cifar-10-batches-py or its tar.gz; downloaded if missing",
        partial(_read, "cifar10"),
    ),
    "folder": DatasetEntry(
        "images in <path>/<split>/<class>/, where <path> may be a tar or tar.gz",
        partial(_read, "folder"),
    ),
    "imagenet": DatasetEntry(
        "photographs of any size in <path>/{train,val}/<class>/, brought to 224×224 pixels or what "
        "--image_size says",
        partial(_read, "imagenet"),
        sized=True,
    ),
    "digits": DatasetEntry(
        "1,797 digits of 8×8 pixels, bundled", partial(_read, "digits"), needs_path=False
    ),
}


def load(
    name: str,
    path: Path | str | None = None,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    mirror: str | None = None,
    progress: bool | None = None,
    image_size: int | None = None,
) -> Dataset:
    """Read the data set called ``name`` from ``path`` and hold it on ``device``.

    Images that would take more than a quarter of a GPU's free memory stay where they are; their
    batches are moved as they are used.

    Args:
        name: a key of ``DATASETS``, or ``MODULE:FUNCTION`` that loads a data set of one's own (see
            :func:`lossprune.data.own.read_own`).
        path: the folder of the data; None is enough for the bundled digits.
        seed: draws the split where the data set has no fixed one.
        device: where the images and labels are held.
        mirror: base URL under which the missing files of MNIST and CIFAR-10 lie by name; None:
            the environment variable ``LOSSPRUNE_MIRROR`` if set, else the public addresses.
        progress: show progress bars on standard error; None: only where it is a terminal.
        image_size: height and width of the network's inputs, for ``imagenet``; None: 224.

    Raises:
        ValueError: ``name`` is not a data set, ``path`` is missing, or a file is corrupt or not
            what its data set needs (the message names it).
        FileNotFoundError: ``path`` or something that must be in it is not there.
        OSError: a file cannot be read or written, or no download succeeded.

    >>> load("digits", seed=0, image_size=32)
    Traceback (most recent call last):
    ValueError: image size (--image_size) is for imagenet, not for digits
    """
    entry = DATASETS.get(name) or (_own(name) if ":" in name else None)
    if entry is None:
        raise ValueError(
            f"data set (--dataset) must be one of {', '.join(DATASETS)}, or MODULE:FUNCTION of "
            f"your own, got {name!r}{did_you_mean(name, DATASETS)}"
        )
    if entry.needs_path and path is None:
        raise ValueError(f"data set {name!r} needs a path (--data_path): {entry.summary}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed (--seed) must be a whole number of 64 bits, got {seed!r}")
    if image_size is not None:
        _check_image_size(name, entry, image_size)
    source = Source(None if path is None else Path(path), seed, mirror, progress, image_size)
    return entry.read(source).to(device)


def _own(name: str) -> DatasetEntry:
    def read(source: Source) -> Dataset:
        from lossprune.data.own import read_own

        return read_own(name, source)

    return DatasetEntry("of one's own", read, needs_path=False, sized=True)


def _check_image_size(name: str, entry: DatasetEntry, image_size: int) -> None:
    if not entry.sized:
        sized = ", ".join(other for other, entry in DATASETS.items() if entry.sized)
        raise ValueError(f"image size (--image_size) is for {sized}, not for {name}")
    if not 1 <= image_size <= MOST_IMAGE_SIZE:
        raise ValueError(
            f"image size (--image_size) must be a whole number from 1 to {MOST_IMAGE_SIZE:,}, "
            f"got {image_size}"
        )


def __getattr__(name: str) -> Any:
    if name in ("Dataset", "Split"):
        return getattr(import_module("lossprune.data.dataset"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
