"""Which networks can be trained over their surviving weights alone, and where those weights are.

A *multilayer perceptron* here is ``nn.Sequential``: flatten, then linear layers, with tanh, ReLU or
nothing after each.  A hidden unit is *live* where a surviving weight leads from it to a live unit
of the next layer; all outputs are live.  What leads to no live unit has a gradient of exactly 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from lossprune.data import Dataset
from lossprune.kernels.interface import Activation
from lossprune.pruning.curvature.distributed import processes
from lossprune.training.plain import hooked_module

ACTIVATIONS = {nn.Tanh: Activation.TANH, nn.ReLU: Activation.RELU}
GROUP = 16  # neighbouring pixels that are read together


class NotSparseError(ValueError):
    """A network that cannot be trained over its surviving weights alone; the message says why."""


@dataclass(frozen=True)
class PerceptronLayer:
    """One linear layer and what follows it."""

    name: str
    linear: nn.Linear
    activation: Activation


@dataclass(frozen=True)
class Survivors:
    """Where the surviving weights of one linear layer are; all int64, rows by output.

    Attributes:
        layer: which one.
        weights: positions in the flattened weight that lead to live outputs.
        idle_weights: positions of those that lead to others.
        rows: (outputs + 1,), where the weights of each live output begin.
        columns: the input of each weight, counted as the layer before counts its outputs.
        live: positions of the live outputs, which are those of their biases.
        idle: positions of the other outputs.
    """

    layer: PerceptronLayer
    weights: Tensor
    idle_weights: Tensor
    rows: Tensor
    columns: Tensor
    live: Tensor
    idle: Tensor


def read_layers(network: nn.Module) -> tuple[PerceptronLayer, ...]:
    """Return the layers of a multilayer perceptron of any type on any device.

    Raises:
        NotSparseError: it is none, or has hooks, frozen or scattered parameters.
    """
    if type(network) is not nn.Sequential:
        raise NotSparseError(f"{type(network).__name__} is not a Sequential of linear layers")
    modules = list(network._modules.items())  # named_children gives a module of two names once
    if not modules or type(modules[0][1]) is not nn.Flatten or modules[0][1].start_dim != 1:
        raise NotSparseError("it does not begin with Flatten")
    layers: list[PerceptronLayer] = []
    for name, module in modules[1:]:
        if type(module) is nn.Linear:
            layers.append(PerceptronLayer(name, module, Activation.IDENTITY))
        elif type(module) in ACTIVATIONS and layers and not layers[-1].activation:
            layers[-1] = replace(layers[-1], activation=ACTIVATIONS[type(module)])
        else:
            raise NotSparseError(
                f"{name} is {type(module).__name__}; only linear layers with tanh or ReLU after "
                "them are trained sparsely"
            )
    parameters = [id(parameter) for layer in layers for parameter in layer.linear.parameters()]
    if len(set(parameters)) < max(1, len(parameters)):
        raise NotSparseError("it has no linear layer, or a parameter that is used twice")
    if hooked_module(network) is not None:
        raise NotSparseError("it has hooks, which sparse training would not run")
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad or not parameter.is_contiguous():
            raise NotSparseError(f"{name} is not trained, or not contiguous")
    return tuple(layers)


def check_perceptron(network: nn.Module, dataset: Dataset) -> None:
    """Raise NotSparseError unless it is a perceptron that can be trained where it is."""
    if next(network.parameters()).device.type == "cuda":
        check_fit(read_layers(network), dataset)
    else:
        layers_on_cpu(network, dataset)


def layers_on_cpu(network: nn.Module, dataset: Dataset) -> tuple[PerceptronLayer, ...]:
    """Return the layers of a multilayer perceptron that the CPU can train on this data set.

    Raises:
        NotSparseError: it cannot.
    """
    layers = read_layers(network)
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise NotSparseError(
                f"{name} is {parameter.dtype} on {parameter.device}, not torch.float32 on the CPU"
            )
    check_fit(layers, dataset)
    if dataset.train.images.device.type != "cpu":
        raise NotSparseError("the data are not on the CPU")
    return layers


def check_fit(layers: Sequence[PerceptronLayer], dataset: Dataset) -> None:
    """Raise NotSparseError unless a perceptron of these layers can be trained on this data set."""
    if processes() > 1:
        raise NotSparseError(f"sparse training is for one process, and there are {processes()}")
    pixels = dataset.train.images[0].numel()
    if not dataset.is_bytes:
        raise NotSparseError(f"its inputs are {dataset.train.images.dtype}, not bytes as of images")
    if dataset.augmented:
        raise NotSparseError("its training images are augmented")
    if layers[0].linear.in_features != pixels:
        raise NotSparseError(
            f"{layers[0].name} takes {layers[0].linear.in_features} inputs, an image has {pixels}"
        )
    if len(dataset.classes) > layers[-1].linear.out_features:
        raise NotSparseError(f"{layers[-1].name} has fewer outputs than the data have classes")


def find_survivors(
    layers: Sequence[PerceptronLayer], mask: Mapping[str, Tensor]
) -> tuple[tuple[Survivors, ...], Tensor]:
    """Return the survivors of each layer, and the first pixels of the blocks that are read.

    Raises:
        NotSparseError: the mask names something other than the layers' weights.
    """
    known = {f"{layer.name}.weight" for layer in layers}
    if unknown := [name for name in mask if name not in known]:
        raise NotSparseError(f"the mask names {unknown[0]}, which is not a linear layer's weight")
    kept = [
        mask.get(f"{layer.name}.weight", torch.ones_like(layer.linear.weight, dtype=torch.bool))
        for layer in layers
    ]
    live = [torch.ones(layers[-1].linear.out_features, dtype=torch.bool)]
    for weights in reversed(kept[1:]):
        live.insert(0, (weights & live[0][:, None]).any(0))
    pixels = (kept[0] & live[0][:, None]).any(0)
    blocks, number = _blocks(pixels)
    found = []
    for layer, weights, outputs in zip(layers, kept, live, strict=True):
        used = weights & outputs[:, None]
        where = used.nonzero()
        found.append(
            Survivors(
                layer=layer,
                weights=used.flatten().nonzero()[:, 0],
                idle_weights=(weights & ~outputs[:, None]).flatten().nonzero()[:, 0],
                rows=starts(used[outputs].sum(1)),
                columns=number[where[:, 1]],
                live=outputs.nonzero()[:, 0],
                idle=(~outputs).nonzero()[:, 0],
            )
        )
        number = outputs.cumsum(0) - 1
    return tuple(found), blocks


def starts(counts: Tensor) -> Tensor:
    """Return where each of several runs of these lengths begins, and the end of the last."""
    return torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))


def by_input(columns: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """Return where the weights of each input begin, and the weights in order of their inputs."""
    order = torch.argsort(columns, stable=True)
    return starts(torch.bincount(columns, minlength=inputs)), order


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


def normalisation(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return factor and offset of every pixel, rounded as the dense batches round them."""
    spread = [prod(dataset.shape) // len(dataset.std)] * len(dataset.std)
    factors = [1 / (dataset.scale * std) for std in dataset.std]
    offsets = [mean / std for mean, std in zip(dataset.mean, dataset.std, strict=True)]
    repeats = torch.tensor(spread)
    return (
        torch.tensor(factors, dtype=torch.float32).repeat_interleave(repeats),
        torch.tensor(offsets, dtype=torch.float32).repeat_interleave(repeats),
    )
