"""A data set: inputs as they are stored and labels of three splits, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lossprune.data.batches import Affine, Change, Moves, iterate
from lossprune.data.checks import check
from lossprune.data.crops import Centre, RandomWindows

KINDS = (torch.uint8, torch.float32, torch.int64)  # of inputs
SHARE = 4  # images are moved to a GPU where they take at most one part in so many of what is free


@dataclass(frozen=True)
class Split:
    """Images, or other inputs, as they are stored, with their labels.

    Attributes:
        images: (examples, …), of any shape; uint8 as images are, float32, or int64, such as tokens,
            which networks get as they are.  On the labels' device, or, where they are too many for
            it, on the CPU, possibly as a file mapped into memory.
        labels: int64, (examples,), on the device that batches are wanted on.

    Raises:
        ValueError: the tensors are not of these types and shapes, or hold no examples.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        if self.images.dtype not in KINDS or self.images.ndim == 0:
            raise ValueError(
                "images must be uint8, float32 or int64, of shape (examples, …), "
                f"got {self.images.dtype} of shape {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 of shape ({len(self.images)},), one for each image, "
                f"got {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        if self.images.numel() == 0:
            raise ValueError(f"images must not be empty, got shape {tuple(self.images.shape)}")

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.images.shape[1:]))
        return f"Split({len(self.labels):,} images of {shape})"

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, *, images: bool = True) -> Split:
        """Return this split on ``device``, its images only if they are to be moved, too."""
        return Split(self.images.to(device) if images else self.images, self.labels.to(device))

    def take(self, indices: Tensor) -> Split:
        """Return the examples at ``indices`` (int64), in that order."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """Three splits and how their images become the inputs of a network.

    An input is (image / ``scale`` − ``mean``) / ``std``, for each channel, which is the first
    dimension of an image; of int64 it is what is stored.

    >>> points = Split(torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1]))
    >>> Dataset("points", points, points, points, ("left", "right"), (0.0,), (1.0,), 1.0).shape
    (2,)

    Attributes:
        name: the data set's name, for records and messages.
        train: the examples trained on.
        valid: the examples that choose the best network.
        test: the examples of the error that is reported.
        classes: the classes' names; label i is the i-th.
        mean: mean of image / scale over the training images, one value a channel or one for all.
        std: standard deviation of the same, likewise.
        scale: the largest pixel value.
        augmented: whether training crops and flips at random (see ``batches``).
        crop: height and width of the inputs, cut out of larger images; None: images are inputs.
        score_every: loss and error on training images are those of every so many-th.

    Raises:
        ValueError: a label outside the classes, splits of different image shapes or types, an input
            that is not finite, a class that is missing from training, a mean or std that cannot be
            used, or augmentation and crops of what is no image.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0
    augmented: bool = False
    crop: int | None = None
    score_every: int = 1

    def __post_init__(self):
        check(self)

    def __repr__(self) -> str:
        train, valid, test = (len(split.labels) for split in self.splits.values())
        return (
            f"Dataset({self.name}, {train:,} training, {valid:,} validation and {test:,} test "
            f"images of {'×'.join(map(str, self.shape))}, {len(self.classes)} classes)"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input: (channels, height, width) of an image."""
        shape = tuple(self.train.images.shape[1:])
        return shape if self.crop is None else (shape[0], self.crop, self.crop)

    @property
    def is_bytes(self) -> bool:
        """Whether inputs are stored as bytes, as those of images are."""
        return self.train.images.dtype == torch.uint8

    @property
    def splits(self) -> dict[str, Split]:
        """The three splits by name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    @property
    def scored(self) -> dict[str, Split]:
        """The examples of each split that loss and error are measured on."""
        every = slice(None, None, self.score_every)
        train = Split(self.train.images[every], self.train.labels[every])  # views, no copies
        return {**self.splits, "train": train}

    def to(self, device: torch.device | str) -> Dataset:
        """Return this data set with its labels on ``device``, and its images if there is room.

        They stay where they are if they would take more than a quarter of a GPU's free memory;
        batches are then moved as they are used.
        """
        size = sum(split.images.nbytes for split in self.splits.values())
        images = size <= _room(torch.device(device))
        moved = {name: split.to(device, images=images) for name, split in self.splits.items()}
        return replace(self, **moved)

    def inputs(self, images: Tensor) -> Tensor:
        """Return ``images`` (n, …), as they are stored, as inputs of a network."""
        if self.crop is not None:
            images = Centre(self.crop)(images)
        return self._affine(images.device)(images)

    def batches(
        self,
        split: Split,
        size: int,
        *,
        order: Tensor | None = None,
        generator: torch.Generator | None = None,
        augment: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over (inputs, labels) of ``split``, ``size`` examples at a time.

        The last batch holds what is left. Each batch is gathered, augmented and normalised as a
        whole on the labels' device, and equal on every device (random windows of photographs but
        for rounding): all draws are made here, before the first batch, from the CPU ``generator``.

        Args:
            split: the examples, usually one of this data set's splits.
            size: examples in a batch.
            order: int64 positions to visit, in order, on any device; None: all, as stored.
            generator: draws the augmentation; None: torch's global CPU generator.
            augment: pad each image by 4 zero pixels on all sides, flip it left to right with
                probability ½, and cut out a window of its own size at random; where inputs are
                cut out of larger images, a window of random size (see ``crops``).
            share: (k, of): give of each batch only the k-th of so many parts of near-equal size,
                from 0; together they are the batch. Draws are those of all parts.

        Raises:
            ValueError: ``size`` is below 1, or ``order`` is not a row of positions in the split.
        """
        visited = len(split if order is None else order)
        changes = self._changes(visited, generator, split.labels.device, augment)
        affine = self._affine(split.labels.device)
        return iterate(
            split.images,
            split.labels,
            size=size,
            affine=affine,
            order=order,
            changes=changes,
            share=share,
        )

    def _changes(
        self, visited: int, generator: torch.Generator | None, device: torch.device, augment: bool
    ) -> Change | None:
        if augment and self.crop is not None:
            return RandomWindows.draw(visited, self.crop, generator).to(device)
        if augment:
            return Moves.draw(visited, generator).to(device)
        return None if self.crop is None else Centre(self.crop)

    def _affine(self, device: torch.device) -> Affine:
        trailing = len(self.shape) - 1
        return Affine.standardising(self.mean, self.std, self.scale, device, trailing)


def _room(device: torch.device) -> float:
    """How many bytes of images may be moved to ``device``."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free / SHARE


def moments(
    images: Tensor, scale: float = 255.0, *, per_channel: bool = True
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) of uint8 ``images`` / ``scale``: tuples of a value a channel, or of one.

    The sums are exact integers, so the result does not depend on the device or on any order.
    std is the population's: √(E[x²] − E[x]²).

    >>> moments(torch.tensor([0, 4], dtype=torch.uint8).reshape(2, 1, 1, 1), scale=4.0)
    ((0.5,), (0.5,))
    """
    channels = images.shape[1]
    sums = torch.zeros(2, channels, dtype=torch.int64)
    for chunk in images.split(4096):
        values = chunk.to(torch.int64)
        sums[0] += values.sum((0, 2, 3)).cpu()
        sums[1] += values.square().sum((0, 2, 3)).cpu()
    count = images.numel() // channels
    if not per_channel:
        sums, count = sums.sum(1, keepdim=True), images.numel()
    means, stds = [], []
    for total, squares in sums.T.tolist():
        means.append(total / count / scale)
        # In whole numbers, for E[x²] − E[x]² cancels.
        stds.append((count * squares - total * total) ** 0.5 / count / scale)
    return tuple(means), tuple(stds)
