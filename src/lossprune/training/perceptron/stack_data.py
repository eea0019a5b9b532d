"""Images and labels in the order in which ``sparse_stack.cu`` reads them.

A *part* is a batch, or as many examples of an evaluation.  Its pixels are rows of examples, padded
to whole words of four: (groups, parts, pixels, row) bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lossprune.data import Dataset, Split
from lossprune.training.perceptron.training import normalisation

WORD = 4  # examples of a word


@dataclass(frozen=True)
class Parts:
    """Examples of one or more groups, each in an order of its own.

    Attributes:
        images: uint8 (groups, parts, pixels, row).
        labels: int32 (groups, parts, row).
        affine: float32 (groups, pixels, 2): factor and offset of each pixel.
        examples: of each group, without padding.
    """

    images: Tensor
    labels: Tensor
    affine: Tensor
    examples: int


def split_in_parts(
    datasets: Sequence[Dataset],
    split_of: Callable[[Dataset], Split],
    size: int,
    orders: Sequence[Tensor] | None = None,
) -> Parts:
    """Gather a split of each data set, ``size`` examples a part, in these orders or as stored.

    What is not a whole part, or a whole word, is padded with repeated examples; they are not
    counted.
    """
    first = split_of(datasets[0])
    examples, device = len(first), first.images.device
    parts, row = -(-examples // size), -(-size // WORD) * WORD
    pixels = prod(datasets[0].shape)
    images = torch.empty((len(datasets), parts, pixels, row), dtype=torch.uint8, device=device)
    labels = torch.empty((len(datasets), parts, row), dtype=torch.int32, device=device)
    for group, dataset in enumerate(datasets):
        split = split_of(dataset)
        order = torch.arange(examples) if orders is None else orders[group]
        where = _padded(order, parts, size, row).to(device)
        found = split.images.flatten(1).index_select(0, where)
        images[group].copy_(found.view(parts, row, pixels).transpose(1, 2))
        labels[group].copy_(split.labels.index_select(0, where).view(parts, row))
    return Parts(images, labels, _affine(datasets, device), examples)


def _padded(order: Tensor, parts: int, size: int, row: int) -> Tensor:
    """Return which example stands at each place of all rows."""
    if parts * size > len(order):
        order = torch.cat((order, order[:1].expand(parts * size - len(order))))
    rows = order.view(parts, size)
    if row > size:
        rows = torch.cat((rows, rows[:, :1].expand(-1, row - size)), 1)
    return rows.flatten()


def _affine(datasets: Sequence[Dataset], device: torch.device) -> Tensor:
    return torch.stack([torch.stack(normalisation(it), 1) for it in datasets]).to(device)
