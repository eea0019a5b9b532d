"""What a data set must be, so that a network can be trained on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lossprune.data.dataset import Dataset


def check(dataset: Dataset) -> None:
    """Raise ValueError, naming what and where, unless ``dataset`` can be trained on."""
    count = len(dataset.classes)
    for name, split in dataset.splits.items():
        _check_inputs(dataset, name, split.images)
        wrong = ((split.labels < 0) | (split.labels >= count)).nonzero()
        if len(wrong):
            position = int(wrong[0])
            raise ValueError(
                f"data set {dataset.name!r}: {name} label {int(split.labels[position])} of example "
                f"{position} is outside the {count} classes (0 to {count - 1})"
            )
    present = torch.bincount(dataset.train.labels, minlength=count)
    for label, examples in enumerate(present.tolist()):
        if examples == 0:
            raise ValueError(
                f"data set {dataset.name!r}: class {dataset.classes[label]!r} (label {label}) has "
                "no training example"
            )
    _check_normalisation(dataset)


def _check_inputs(dataset: Dataset, name: str, images: Tensor) -> None:
    train = dataset.train.images
    if images.shape[1:] != train.shape[1:]:
        raise ValueError(
            f"data set {dataset.name!r}: {name} images have shape {tuple(images.shape[1:])}, "
            f"train images {tuple(train.shape[1:])}"
        )
    if images.dtype != train.dtype:
        raise ValueError(
            f"data set {dataset.name!r}: {name} images are {images.dtype}, "
            f"train images {train.dtype}"
        )
    if images.is_floating_point() and not images.isfinite().all():
        finite = images.reshape(len(images), -1).isfinite().all(1)
        raise ValueError(
            f"data set {dataset.name!r}: {name} input {int((~finite).nonzero()[0])} holds a value "
            "that is not finite"
        )
    if (dataset.augmented or dataset.crop is not None) and images.ndim != 4:
        raise ValueError(
            f"data set {dataset.name!r}: only images of (channels, height, width) can be augmented "
            f"or cropped, got shape {tuple(images.shape[1:])}"
        )


def _check_normalisation(dataset: Dataset) -> None:
    channels = dataset.shape[0] if dataset.shape else 1
    if len(dataset.mean) != len(dataset.std) or len(dataset.std) not in (1, channels):
        raise ValueError(
            f"data set {dataset.name!r}: mean and std must hold 1 or {channels} values each, "
            f"got {len(dataset.mean)} and {len(dataset.std)}"
        )
    if not all(0 < std < float("inf") for std in (*dataset.std, dataset.scale)):
        raise ValueError(
            f"data set {dataset.name!r}: std and scale must be above 0, got std {dataset.std} and "
            f"scale {dataset.scale} (std is 0 where all training images are of one colour)"
        )
