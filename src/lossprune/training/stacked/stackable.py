"""Which networks can be stacked."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lossprune.data import Dataset
from lossprune.pruning.errors import PruningError
from lossprune.pruning.matching import match
from lossprune.pruning.wholeness import check_whole
from lossprune.training.perceptron.structure import NotSparseError, Stage, read_layers
from lossprune.training.stacked.state import Member, Stack
from lossprune.training.stacked.vmap import AnySteps


class NotStackableError(ValueError):
    """Networks that cannot be trained together; the message says why."""


def read_members(
    networks: Sequence[nn.Module],
    masks: Sequence[Mapping[str, Tensor] | None],
    datasets: Sequence[Dataset],
) -> tuple[Member, ...]:
    """Return the members of a stack.

    Raises:
        NotStackableError: there are none, they differ in more than their values, or they train in
            a way that a stack does not.
        ValueError: there is not one mask and one data set for each network.
    """
    if not len(networks) == len(masks) == len(datasets):
        raise ValueError(
            "networks, masks and datasets must be as many, got "
            f"{len(networks)}, {len(masks)} and {len(datasets)}"
        )
    if not networks:
        raise NotStackableError("there is no network to stack")
    if len({id(network) for network in networks}) < len(networks):
        raise NotStackableError("a network is given twice")
    _check_network(networks[0])
    for number, network in enumerate(networks):
        check_whole(network)
        if _build(network) != _build(networks[0]):
            raise NotStackableError(f"network {number} is built otherwise than network 0")
        _check_hooks(network, number)
        if not all(parameter.requires_grad for parameter in network.parameters()):
            raise NotStackableError(f"network {number} has parameters that are not trained")
    device = next(networks[0].parameters()).device
    for number, dataset in enumerate(datasets):
        _check_dataset(dataset, datasets[0], number, device)
    return tuple(
        _member(network, mask or {}, number)
        for number, (network, mask) in enumerate(zip(networks, masks, strict=True))
    )


def perceptron_layers(network: nn.Module, dataset: Dataset) -> tuple[Stage, ...] | None:
    """Return the layers of a multilayer perceptron for these images; None: it is none."""
    try:
        stages = read_layers(network)
    except NotSparseError:
        return None
    fits = stages[0].linear.in_features == prod(dataset.shape)
    return stages if fits and len(dataset.classes) <= stages[-1].linear.out_features else None


def _build(network: nn.Module) -> tuple[object, ...]:
    """What two networks have in common that are built by the same code, at the same sizes."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    return (
        [(name, type(module)) for name, module in network.named_modules()],
        repr(network),
        [(name, tuple(it.shape), it.dtype, it.device) for name, it in tensors],
    )


def _check_network(network: nn.Module) -> None:
    parameters = dict(network.named_parameters())
    if not parameters:
        raise NotStackableError("the networks have no parameters")
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise NotStackableError(f"{name} is {parameter.dtype}, not torch.float32 or float64")
    if len({(it.dtype, it.device) for it in parameters.values()}) > 1:
        raise NotStackableError("the parameters of a network are of several types or devices")
    for name, module in network.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise NotStackableError(f"{name} is dropout, whose draws would differ in a stack")


def _check_hooks(network: nn.Module, number: int) -> None:
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise NotStackableError(
                f"network {number} has hooks on {name or 'itself'}, which a stack would not run"
            )


def _check_dataset(dataset: Dataset, first: Dataset, number: int, device: torch.device) -> None:
    if dataset.train.labels.device != device:
        raise NotStackableError(
            f"data set {number} is on {dataset.train.labels.device}, the networks on {device}"
        )
    sizes, expected = (
        [len(it) for it in (*one.splits.values(), one.scored["train"])] for one in (dataset, first)
    )
    if sizes != expected or dataset.shape != first.shape:
        raise NotStackableError(
            f"data set {number} has {sizes} examples (train, valid, test, scored of train) "
            f"of shape {dataset.shape}, data set 0 {expected} of {first.shape}"
        )


def _member(network: nn.Module, mask: Mapping[str, Tensor], number: int) -> Member:
    try:
        names = match(mask, network)
    except PruningError as error:
        raise NotStackableError(f"network {number}: {error}") from None
    device = next(network.parameters()).device
    kept = {found: mask[name].to(device) for name, found in names.items()}
    return Member(network, {name: it for name, it in kept.items() if not it.all()})


def check_by_trial(steps: AnySteps, members: Sequence[Member], dataset: Dataset) -> None:
    """Take a step of copies of the first networks, and see whether torch can batch it.

    Raises:
        NotStackableError: it cannot, as where a network draws random numbers or looks at values.
    """
    stack = Stack.joined(members[:2])
    for row in range(len(stack)):
        stack.load(row)
    stack.begin([{"lr": 0.0, "weight_decay": 0.0}] * len(stack))
    images = dataset.train.images[:2].to(stack.device)
    inputs = dataset.inputs(images)[None].to(stack.dtype)
    try:
        steps.step(stack, inputs, dataset.train.labels[None, :2], momentum=0.0)
    except (RuntimeError, TypeError, ValueError) as error:
        told = str(error).strip().partition("\n")[0].partition(". ")[0]
        name = type(members[0].network).__name__
        raise NotStackableError(f"torch.func.vmap cannot batch {name}: {told}") from None
