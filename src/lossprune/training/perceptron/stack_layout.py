"""Pruned perceptrons and their examples, laid out as ``sparse_stack.cu`` reads them.

A perceptron is integers (sizes, and where its surviving weights are) and values.  Examples are in
*parts*: a batch, or as many examples of an evaluation.  A part's pixels are rows of examples,
padded to whole words of four: (groups, parts, pixels, row) bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lossprune.data import Dataset, Split
from lossprune.kernels.interface import Activation
from lossprune.training.perceptron.structure import (
    NotSparseError,
    PerceptronLayer,
    Survivors,
    by_input,
    find_survivors,
    normalisation,
    starts,
)

WORD = 4  # examples of a word
TOGETHER = 8  # weights whose gradients are summed together
Where = tuple[str, Tensor]  # a parameter's name, and positions in it, flattened


class LayerHeader(ctypes.Structure):
    """What the integers begin with, for each layer."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            "outputs", "inputs", "weights", "activation", "has_bias",
            "row_start", "column", "row",
            "column_start", "by_input_row", "by_input",
            "weight", "bias", "unit",
        )
    )  # fmt: skip


@dataclass(frozen=True)
class StackLayout:
    """One network as integers and values.

    Attributes:
        integers: int32, the layers' sizes and where their surviving weights are.
        values: of which parameters the values are, in order: weights that lead to an output, layer
            by layer, then the biases of live units, of layers without biases too.
        idle: the same of weights and biases without a path to an output.
        units: live units of all layers, the outputs among them.
        first: live units of the first layer.
    """

    integers: Tensor
    values: tuple[Where, ...]
    idle: tuple[Where, ...]
    units: int
    first: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many integers, values and idle ones there are."""
        values, idle = (sum(len(where) for _, where in own) for own in (self.values, self.idle))
        return len(self.integers), values, idle


@dataclass(frozen=True)
class _Rows:
    """The surviving weights of a layer, units with most of them first.

    So the warps, which take units in turn, have equal shares.
    """

    layer: PerceptronLayer
    weights: Tensor
    column: Tensor
    row: Tensor
    starts: Tensor
    live: Tensor


def lay_out(layers: Sequence[PerceptronLayer], mask: Mapping[str, Tensor]) -> StackLayout:
    """Return the layout of a perceptron with these layers and a mask on the CPU.

    Raises:
        NotSparseError: the mask names something other than the layers' weights; the last layer has
            an activation; or a layer has no weight with a path to an output.
    """
    if layers[-1].activation != Activation.IDENTITY:
        raise NotSparseError(f"{layers[-1].name}, the last layer, has an activation")
    survivors, _ = find_survivors(layers, mask)
    found: list[_Rows] = []
    rank: Tensor | None = None
    for kept in survivors:
        if not len(kept.weights):
            raise NotSparseError(f"{kept.layer.name} has no weight with a path to an output")
        rows, rank = _ranked(kept, rank, keep_order=kept is survivors[-1])
        found.append(rows)
    return StackLayout(
        integers=_integers(found),
        values=(
            *((f"{rows.layer.name}.weight", rows.weights) for rows in found),
            *((f"{rows.layer.name}.bias", rows.live) for rows in found),
        ),
        idle=tuple(
            (f"{kept.layer.name}.{kind}", where)
            for kept in survivors
            for kind, where in (("weight", kept.idle_weights), ("bias", kept.idle))
            if len(where) and (kind == "weight" or kept.layer.linear.bias is not None)
        ),
        units=sum(len(rows.live) for rows in found),
        first=len(found[0].live),
    )


def _ranked(
    kept: Survivors, rank_below: Tensor | None, *, keep_order: bool
) -> tuple[_Rows, Tensor]:
    """Return a layer with its units in order, and each unit's place in that.

    The outputs of the last layer are classes, and keep theirs.
    """
    inputs = kept.layer.linear.in_features
    column = kept.weights % inputs if rank_below is None else rank_below[kept.columns]
    counts = kept.rows.diff()
    order = torch.argsort(counts, descending=True, stable=True)
    if keep_order:
        order = torch.arange(len(counts))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    row, by_row = torch.sort(torch.repeat_interleave(rank, counts), stable=True)
    rows = _Rows(
        layer=kept.layer,
        weights=kept.weights[by_row],
        column=column[by_row],
        row=row,
        starts=starts(counts[order]),
        live=kept.live[order],
    )
    return rows, rank


def _integers(layers: Sequence[_Rows]) -> Tensor:
    headers: list[int] = []
    parts: list[Tensor] = []
    at = len(layers) * len(LayerHeader._fields_)

    def put(values: Tensor) -> int:
        nonlocal at
        parts.append(values)
        at += len(values)
        return at - len(values)

    weight, bias, unit = 0, sum(len(rows.weights) for rows in layers), 0
    below = None
    for rows in layers:
        linear, outputs, weights = rows.layer.linear, len(rows.live), len(rows.weights)
        by_output = [put(rows.starts), put(_padded(rows.column)), put(_padded(rows.row))]
        by_inputs = [0, 0, 0]
        if below is not None:
            column_start, order = by_input(rows.column, below)
            by_inputs = [put(column_start), put(rows.row[order]), put(order)]
        inputs = linear.in_features if below is None else below
        headers += [outputs, inputs, weights, rows.layer.activation, int(linear.bias is not None)]
        headers += [*by_output, *by_inputs, weight, bias, unit]
        weight, bias, unit, below = weight + weights, bias + outputs, unit + outputs, outputs
    return torch.cat((torch.tensor(headers), *parts)).to(torch.int32)


def _padded(values: Tensor) -> Tensor:
    """Repeat the last one, up to a number that is read together."""
    return torch.cat((values, values[-1:].expand(-len(values) % TOGETHER)))


@dataclass(frozen=True)
class StackExamples:
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
) -> StackExamples:
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
        where = _filled_up(order, parts, size, row).to(device)
        found = split.images.flatten(1).index_select(0, where)
        images[group].copy_(found.view(parts, row, pixels).transpose(1, 2))
        labels[group].copy_(split.labels.index_select(0, where).view(parts, row))
    return StackExamples(images, labels, _affine(datasets, device), examples)


def _filled_up(order: Tensor, parts: int, size: int, row: int) -> Tensor:
    """Return which example stands at each place of all rows."""
    if parts * size > len(order):
        order = torch.cat((order, order[:1].expand(parts * size - len(order))))
    rows = order.view(parts, size)
    if row > size:
        rows = torch.cat((rows, rows[:, :1].expand(-1, row - size)), 1)
    return rows.flatten()


def _affine(datasets: Sequence[Dataset], device: torch.device) -> Tensor:
    return torch.stack([torch.stack(normalisation(dataset), 1) for dataset in datasets]).to(device)
