"""Which networks can be trained over their surviving weights alone, and where those weights are.

A *multilayer perceptron* here is ``nn.Sequential``: flatten, then linear layers, with tanh, ReLU or
nothing after each.  A hidden unit is *live* where a surviving weight leads from it to a live unit
of the next layer; all outputs are live.  What leads to no live unit has a gradient of exactly 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lossprune.kernels.interface import Activation

ACTIVATIONS = {nn.Tanh: Activation.TANH, nn.ReLU: Activation.RELU}
GROUP = 16  # neighbouring pixels that are read together


class NotSparseError(ValueError):
    """A network that cannot be trained over its surviving weights alone; the message says why."""


@dataclass(frozen=True)
class Stage:
    """One linear layer and what follows it."""

    name: str
    linear: nn.Linear
    activation: Activation


@dataclass(frozen=True)
class Survivors:
    """Where the surviving weights of one linear layer are; all int64, rows by output.

    Attributes:
        stage: the layer.
        weights: positions in the flattened weight that lead to live outputs.
        idle_weights: positions of those that lead to others.
        rows: (outputs + 1,), where the weights of each live output begin.
        columns: the input of each weight, counted as the layer before counts its outputs.
        live: positions of the live outputs, which are those of their biases.
        idle: positions of the other outputs.
    """

    stage: Stage
    weights: Tensor
    idle_weights: Tensor
    rows: Tensor
    columns: Tensor
    live: Tensor
    idle: Tensor


def read_stages(network: nn.Module) -> tuple[Stage, ...]:
    """Return the layers of a multilayer perceptron in float32 on the CPU.

    Raises:
        NotSparseError: it is none, or one that trains in another way.
    """
    stages = read_layers(network)
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise NotSparseError(
                f"{name} is {parameter.dtype} on {parameter.device}, not torch.float32 on the CPU"
            )
    return stages


def read_layers(network: nn.Module) -> tuple[Stage, ...]:
    """Return the layers of a multilayer perceptron of any type on any device.

    Raises:
        NotSparseError: it is none, or has hooks, frozen or scattered parameters.
    """
    if type(network) is not nn.Sequential:
        raise NotSparseError(f"{type(network).__name__} is not a Sequential of linear layers")
    modules = list(network._modules.items())  # named_children gives a module of two names once
    if not modules or type(modules[0][1]) is not nn.Flatten or modules[0][1].start_dim != 1:
        raise NotSparseError("it does not begin with Flatten")
    stages: list[Stage] = []
    for name, module in modules[1:]:
        if type(module) is nn.Linear:
            stages.append(Stage(name, module, Activation.IDENTITY))
        elif type(module) in ACTIVATIONS and stages and not stages[-1].activation:
            last = stages[-1]
            stages[-1] = Stage(last.name, last.linear, ACTIVATIONS[type(module)])
        else:
            raise NotSparseError(
                f"{name} is {type(module).__name__}; only linear layers with tanh or ReLU after "
                "them are trained sparsely"
            )
    parameters = [id(it) for stage in stages for it in stage.linear.parameters()]
    if len(set(parameters)) < max(1, len(parameters)):
        raise NotSparseError("it has no linear layer, or a parameter that is used twice")
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise NotSparseError("it has hooks, which sparse training would not run")
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad or not parameter.is_contiguous():
            raise NotSparseError(f"{name} is not trained, or not contiguous")
    return tuple(stages)


def find_survivors(
    stages: tuple[Stage, ...], mask: Mapping[str, Tensor]
) -> tuple[tuple[Survivors, ...], Tensor]:
    """Return the survivors of each layer, and the first pixels of the blocks that are read.

    Raises:
        NotSparseError: the mask names something other than the layers' weights.
    """
    known = {f"{stage.name}.weight" for stage in stages}
    if unknown := [name for name in mask if name not in known]:
        raise NotSparseError(f"the mask names {unknown[0]}, which is not a linear layer's weight")
    kept = [
        mask.get(f"{stage.name}.weight", torch.ones_like(stage.linear.weight, dtype=torch.bool))
        for stage in stages
    ]
    live = [torch.ones(stages[-1].linear.out_features, dtype=torch.bool)]
    for layer in reversed(kept[1:]):
        live.insert(0, (layer & live[0][:, None]).any(0))
    pixels = (kept[0] & live[0][:, None]).any(0)
    blocks, number = _blocks(pixels)
    found = []
    for stage, layer, outputs in zip(stages, kept, live, strict=True):
        used = layer & outputs[:, None]
        where = used.nonzero()
        per_output = used[outputs].sum(1)
        found.append(
            Survivors(
                stage=stage,
                weights=used.flatten().nonzero()[:, 0],
                idle_weights=(layer & ~outputs[:, None]).flatten().nonzero()[:, 0],
                rows=torch.cat((torch.zeros(1, dtype=torch.int64), per_output.cumsum(0))),
                columns=number[where[:, 1]],
                live=outputs.nonzero()[:, 0],
                idle=(~outputs).nonzero()[:, 0],
            )
        )
        number = outputs.cumsum(0) - 1
    return tuple(found), blocks


def _blocks(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first pixel of each block that holds any of ``pixels``, and each one's number.

    The last block ends with the image, so that it may overlap the one before it.
    """
    size = len(pixels)
    block = torch.arange(size) // GROUP
    used = torch.zeros((size + GROUP - 1) // GROUP, dtype=torch.bool)
    used[block[pixels]] = True
    first = (torch.arange(len(used)) * GROUP).clamp(max=max(size - GROUP, 0))
    number = (used.cumsum(0) - 1)[block] * GROUP + torch.arange(size) - first[block]
    return first[used], number
