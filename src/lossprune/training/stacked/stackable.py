"""Which networks can be stacked, whether it pays, and what memory each takes."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lossprune.data import Dataset
from lossprune.pruning.errors import PruningError
from lossprune.pruning.matching import match
from lossprune.pruning.substitution import call_with
from lossprune.pruning.wholeness import check_whole
from lossprune.training.mirror import read_
from lossprune.training.perceptron.structure import NotSparseError, PerceptronLayer, read_layers
from lossprune.training.plain import hooked_module
from lossprune.training.stacked.state import Stack, StackMember
from lossprune.training.stacked.steps import AnySteps

_TRIED = 2  # examples whose activations are counted


class NotStackableError(ValueError):
    """Networks that cannot be trained together; the message says why."""


def read_members(
    networks: Sequence[nn.Module],
    masks: Sequence[Mapping[str, Tensor] | None],
    datasets: Sequence[Dataset],
) -> tuple[StackMember, ...]:
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


def perceptron_layers(network: nn.Module, dataset: Dataset) -> tuple[PerceptronLayer, ...] | None:
    """Return the layers of a multilayer perceptron for these images; None: it is none."""
    try:
        layers = read_layers(network)
    except NotSparseError:
        return None
    fits = layers[0].linear.in_features == prod(dataset.shape)
    return layers if fits and len(dataset.classes) <= layers[-1].linear.out_features else None


def _build(network: nn.Module) -> tuple[object, ...]:
    """What two networks have in common that are built by the same code, at the same sizes."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    return (
        [(name, type(module)) for name, module in network.named_modules()],
        repr(network),
        [(name, tuple(own.shape), own.dtype, own.device) for name, own in tensors],
    )


def _check_network(network: nn.Module) -> None:
    parameters = dict(network.named_parameters())
    if not parameters:
        raise NotStackableError("the networks have no parameters")
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise NotStackableError(f"{name} is {parameter.dtype}, not torch.float32 or float64")
    if len({(own.dtype, own.device) for own in parameters.values()}) > 1:
        raise NotStackableError("the parameters of a network are of several types or devices")
    for name, module in network.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise NotStackableError(f"{name} is dropout, whose draws would differ in a stack")


def _check_hooks(network: nn.Module, number: int) -> None:
    if (name := hooked_module(network)) is not None:
        raise NotStackableError(
            f"network {number} has hooks on {name or 'itself'}, which a stack would not run"
        )


def _check_dataset(dataset: Dataset, first: Dataset, number: int, device: torch.device) -> None:
    if dataset.train.labels.device != device:
        raise NotStackableError(
            f"data set {number} is on {dataset.train.labels.device}, the networks on {device}"
        )
    if not _is_real(dataset):
        raise NotStackableError(f"the inputs of data set {number} are whole numbers")
    sizes, expected = (
        [len(split) for split in (*one.splits.values(), one.scored["train"])]
        for one in (dataset, first)
    )
    if sizes != expected or dataset.shape != first.shape:
        raise NotStackableError(
            f"data set {number} has {sizes} examples (train, valid, test, scored of train) "
            f"of shape {dataset.shape}, data set 0 {expected} of {first.shape}"
        )


def _is_real(dataset: Dataset) -> bool:
    """Whether inputs are numbers of the networks' type, and not tokens."""
    return dataset.train.images.dtype != torch.int64


def _member(network: nn.Module, mask: Mapping[str, Tensor], number: int) -> StackMember:
    try:
        names = match(mask, network)
    except PruningError as error:
        raise NotStackableError(f"network {number}: {error}") from None
    device = next(network.parameters()).device
    kept = {found: mask[name].to(device) for name, found in names.items()}
    return StackMember(network, {name: own for name, own in kept.items() if not own.all()})


def check_by_trial(steps: AnySteps, members: Sequence[StackMember], dataset: Dataset) -> None:
    """Take a step of copies of the first networks, and see whether torch can batch it.

    Raises:
        NotStackableError: it cannot, as where a network draws random numbers or looks at values.
    """
    stack = Stack.joined(members[:2])
    for row in range(len(stack)):
        read_(stack.mirrors(row))
    stack.begin([{"lr": 0.0, "weight_decay": 0.0}] * len(stack))
    images = dataset.train.images[:2].to(stack.device)
    inputs = dataset.inputs(images)[None].to(stack.dtype)
    try:
        steps.step(stack, inputs, dataset.train.labels[None, :2], momentum=0.0)
    except (RuntimeError, TypeError, ValueError) as error:
        told = str(error).strip().partition("\n")[0].partition(". ")[0]
        name = type(members[0].network).__name__
        raise NotStackableError(f"torch.func.vmap cannot batch {name}: {told}") from None


def worthwhile(network: nn.Module, dataset: Dataset) -> bool:
    """Whether a stack of such networks is no slower than one after the other.

    Always on CUDA; on the CPU for perceptrons alone: others are slower under vmap
    (docs/training.md has the measurements).
    """
    cuda = next(network.parameters()).device.type == "cuda"
    return _is_real(dataset) and (cuda or perceptron_layers(network, dataset) is not None)


def bytes_per_member(network: nn.Module, dataset: Dataset, batch_size: int = 100) -> int:
    """Return the bytes on the networks' device that one more member of a stack takes, at most.

    With θ bytes of parameters and b of buffers these are θ + b and a momentum θ of its own, the
    stack's parameters, momentum, mask and gradients 4θ + b, a bool a weight, and for each example
    of a batch three copies of its input (where no other member shares it) and twice what the
    backward pass needs.  What the stack takes whatever its size, workspaces of libraries above all,
    is not counted.
    """
    parameters = sum(own.numel() * own.element_size() for own in network.parameters())
    buffers = sum(own.numel() * own.element_size() for own in network.buffers())
    weights = sum(own.numel() for own in network.parameters())
    some = next(network.parameters())
    pixels = prod(dataset.shape) * some.element_size()
    example = 3 * pixels + 2 * _saved_bytes(network, dataset) // _TRIED
    return 6 * parameters + 2 * buffers + weights + batch_size * example


def _saved_bytes(network: nn.Module, dataset: Dataset) -> int:
    """Bytes that the backward pass of some examples needs, parameters aside; changes nothing."""
    some = next(network.parameters())
    inputs = dataset.inputs(dataset.train.images[:_TRIED].to(some.device)).to(some.dtype)
    parameters = {name: own.detach().requires_grad_() for name, own in network.named_parameters()}
    buffers = {name: own.clone() for name, own in network.named_buffers()}
    known = {own.untyped_storage().data_ptr() for own in parameters.values()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = call_with({**parameters, **buffers}, network, inputs)
    del logits  # which kept them all until here, so that no two had one address
    return sum(found.values())
