"""From stored images to batches of inputs, a whole batch at a time.

Augmentation is drawn for all examples before the first batch, from a CPU generator, so that every
device sees the same batches and the device is sent one tensor rather than one a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4


@dataclass(frozen=True)
class Affine:
    """x ↦ x · ``factor`` − ``offset``: normalisation as one product and one difference.

    Both are numbers, or float32 tensors of shape (channels, 1, …). The two steps are kept apart:
    a fused one rounds differently from device to device.
    """

    factor: float | Tensor
    offset: float | Tensor

    @staticmethod
    def standardising(
        mean: Sequence[float],
        std: Sequence[float],
        scale: float,
        device: torch.device,
        trailing: int = 2,
    ) -> Affine:
        """Return x ↦ (x / scale − mean) / std, of inputs with ``trailing`` dimensions more."""
        factors = [1 / (scale * s) for s in std]
        offsets = [m / s for m, s in zip(mean, std, strict=True)]
        return Affine(*(_constant(values, device, trailing) for values in (factors, offsets)))

    def __call__(self, images: Tensor) -> Tensor:
        """Map images (n, channels, …) to new float32 tensors; int64 is copied as it is."""
        if images.dtype == torch.int64:
            return images.clone()
        if images.dtype == torch.float32:  # a network may change what it gets, but not the data
            return images.mul(self.factor).sub_(self.offset)
        return images.to(torch.float32).mul_(self.factor).sub_(self.offset)


def _constant(values: Sequence[float], device: torch.device, trailing: int) -> float | Tensor:
    """One value as a number, which costs less to apply; more as a (channels, 1, …) tensor."""
    if len(values) == 1:
        return values[0]
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, *[1] * trailing)


class Change(Protocol):
    """What is done to the images of a batch, example by example, before they are normalised."""

    def __getitem__(self, part: slice) -> Change:
        """Return what is done to these examples."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Return the changed images."""
        ...


def iterate(
    images: Tensor,
    labels: Tensor,
    *,
    size: int,
    affine: Affine,
    order: Tensor | None = None,
    changes: Change | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over (inputs, labels), ``size`` examples at a time.

    Args:
        images: (n, …), as they are stored.
        labels: int64 (n,), on the device that the batches are wanted on.
        size: examples in a batch; the last one holds what is left.
        affine: normalises a batch, on the labels' device.
        order: int64 positions to visit; None: all, as stored.
        changes: changes the examples, in the order visited, on the labels' device; None: leaves
            them as they are.
        share: (k, of): of each batch only the k-th of so many parts, from 0; some may be empty.

    Raises:
        ValueError: ``size`` is below 1, or ``order`` is not a row of positions among the images.
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size of a batch must be a whole number of at least 1, got {size!r}")
    if order is not None:
        _check_order(order, len(labels))
        # All labels at once, for they are small and a batch then costs one gather, not two.
        labels = labels.index_select(0, order.to(labels.device))
        order = order.to(images.device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(labels), size):
            part = _part(start, min(size, len(labels) - start), share)
            batch = images[part] if order is None else images.index_select(0, order[part])
            batch = batch.to(labels.device)
            if changes is not None:
                batch = changes[part](batch)
            yield affine(batch), labels[part]

    return batches()


def _part(start: int, count: int, share: tuple[int, int]) -> slice:
    """The k-th of parts of near-equal size of the ``count`` positions from ``start`` on."""
    k, of = share
    return slice(start + count * k // of, start + count * (k + 1) // of)


def _check_order(order: Tensor, examples: int) -> None:
    if order.dtype != torch.int64 or order.ndim != 1:
        raise ValueError(
            "order must be a row of int64 positions, "
            f"got {order.dtype} of shape {tuple(order.shape)}"
        )
    if len(order) and not 0 <= int(order.min()) <= int(order.max()) < examples:
        raise ValueError(
            f"order must hold positions from 0 to {examples - 1}, "
            f"got {int(order.min())} to {int(order.max())}"
        )


@dataclass(frozen=True)
class Moves:
    """A random flip and crop for each of n images.

    Attributes:
        down: int64 (n,), rows to shift by, 0 to 2 · PADDING; PADDING leaves the image in place.
        right: int64 (n,), the same for columns.
        flip: int64 (n,), 1 where the image is mirrored left to right, else 0.
    """

    down: Tensor
    right: Tensor
    flip: Tensor

    @staticmethod
    def draw(count: int, generator: torch.Generator | None) -> Moves:
        """Draw the moves of ``count`` images, independent and uniform."""
        shifts = torch.randint(2 * PADDING + 1, (2, count), generator=generator)
        flip = torch.randint(2, (count,), generator=generator)
        return Moves(shifts[0], shifts[1], flip)

    def to(self, device: torch.device) -> Moves:
        """Return the moves on ``device``."""
        return Moves(self.down.to(device), self.right.to(device), self.flip.to(device))

    def __getitem__(self, part: slice) -> Moves:
        return Moves(self.down[part], self.right[part], self.flip[part])

    def __call__(self, images: Tensor) -> Tensor:
        """Pad ``images`` (n, channels, height, width) with zeros, flip, and crop to their size."""
        height, width = images.shape[2:]
        padded = F.pad(images, (PADDING,) * 4)
        either = torch.stack((padded, padded.flip(3)))
        # Choosing between windows of both costs half of what flipping the chosen ones would.
        # (2, n, channels, 9, 9, height, width): every window of every image, as a view.
        windows = either.unfold(3, height, 1).unfold(4, width, 1)
        each = torch.arange(len(images), device=images.device)
        return windows[self.flip, each, :, self.down, self.right]
