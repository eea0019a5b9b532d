"""A pruned perceptron as integers and values, in the layout of ``sparse_stack.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossprune.kernels.interface import Activation
from lossprune.training.perceptron.structure import (
    NotSparseError,
    Stage,
    Survivors,
    find_survivors,
)

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
class Layout:
    """One network's.

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
    def value_count(self) -> int:
        """How many values there are."""
        return sum(len(where) for _, where in self.values)

    @property
    def idle_count(self) -> int:
        """How many idle ones there are."""
        return sum(len(where) for _, where in self.idle)


@dataclass(frozen=True)
class _Rows:
    """The surviving weights of a layer, units with most of them first.

    So the warps, which take units in turn, have equal shares.
    """

    stage: Stage
    weights: Tensor
    column: Tensor
    row: Tensor
    starts: Tensor
    live: Tensor


def lay_out(stages: tuple[Stage, ...], mask: Mapping[str, Tensor]) -> Layout:
    """Return the layout of a perceptron with these layers and a mask on the CPU.

    Raises:
        NotSparseError: the mask names something other than the layers' weights; the last layer has
            an activation; or a layer has no weight with a path to an output.
    """
    if stages[-1].activation != Activation.IDENTITY:
        raise NotSparseError(f"{stages[-1].name}, the last layer, has an activation")
    survivors, _ = find_survivors(stages, mask)
    layers: list[_Rows] = []
    rank: Tensor | None = None
    for layer in survivors:
        if not len(layer.weights):
            raise NotSparseError(f"{layer.stage.name} has no weight with a path to an output")
        found, rank = _ranked(layer, rank, keep_order=layer is survivors[-1])
        layers.append(found)
    return Layout(
        integers=_integers(layers),
        values=(
            *((f"{it.stage.name}.weight", it.weights) for it in layers),
            *((f"{it.stage.name}.bias", it.live) for it in layers),
        ),
        idle=tuple(
            (f"{it.stage.name}.{kind}", where)
            for it in survivors
            for kind, where in (("weight", it.idle_weights), ("bias", it.idle))
            if len(where) and (kind == "weight" or it.stage.linear.bias is not None)
        ),
        units=sum(len(it.live) for it in layers),
        first=len(layers[0].live),
    )


def _ranked(
    layer: Survivors, rank_below: Tensor | None, *, keep_order: bool
) -> tuple[_Rows, Tensor]:
    """Return a layer with its units in order, and each unit's place in that.

    The outputs of the last layer are classes, and keep theirs.
    """
    inputs = layer.stage.linear.in_features
    column = layer.weights % inputs if rank_below is None else rank_below[layer.columns]
    counts = layer.rows.diff()
    order = torch.argsort(counts, descending=True, stable=True)
    if keep_order:
        order = torch.arange(len(counts))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    row, by_row = torch.sort(torch.repeat_interleave(rank, counts), stable=True)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts[order].cumsum(0)))
    rows = _Rows(
        stage=layer.stage,
        weights=layer.weights[by_row],
        column=column[by_row],
        row=row,
        starts=starts,
        live=layer.live[order],
    )
    return rows, rank


def _integers(layers: list[_Rows]) -> Tensor:
    parts: list[Tensor] = []
    at = len(layers) * len(LayerHeader._fields_)

    def put(values: Tensor) -> int:
        nonlocal at
        parts.append(values)
        at += len(values)
        return at - len(values)

    headers = []
    weight, bias, unit = 0, sum(len(it.weights) for it in layers), 0
    below = None
    for it in layers:
        outputs, weights = len(it.live), len(it.weights)
        by_output = [put(it.starts), put(_padded(it.column)), put(_padded(it.row))]
        by_input = [0, 0, 0]
        if below is not None:
            order = torch.argsort(it.column, stable=True)
            counts = torch.bincount(it.column, minlength=below)
            starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
            by_input = [put(starts), put(it.row[order]), put(order)]
        inputs = it.stage.linear.in_features if below is None else below
        has_bias = int(it.stage.linear.bias is not None)
        headers += [outputs, inputs, weights, it.stage.activation, has_bias]
        headers += [*by_output, *by_input, weight, bias, unit]
        weight, bias, unit, below = weight + weights, bias + outputs, unit + outputs, outputs
    return torch.cat((torch.tensor(headers), *parts)).to(torch.int32)


def _padded(values: Tensor) -> Tensor:
    """Repeat the last one, up to a number that is read together."""
    return torch.cat((values, values[-1:].expand(-len(values) % TOGETHER)))
