"""How much memory a network takes in a stack, so that a stack fits what there is."""

from math import prod

import torch
from torch import Tensor, nn

from lossprune.data import Dataset
from lossprune.pruning.substitution import call_with

_TRIED = 2  # examples whose activations are counted


def bytes_per_member(network: nn.Module, dataset: Dataset, batch_size: int = 100) -> int:
    """Return the bytes on the networks' device that one more member of a stack takes, at most.

    With θ bytes of parameters and b of buffers these are θ + b and a momentum θ of its own, the
    stack's parameters, momentum, mask and gradients 4θ + b, a bool a weight, and for each example
    of a batch three copies of its input (where no other member shares it) and twice what the
    backward pass needs.  What the stack takes whatever its size, workspaces of libraries above all,
    is not counted.
    """
    parameters = sum(it.numel() * it.element_size() for it in network.parameters())
    buffers = sum(it.numel() * it.element_size() for it in network.buffers())
    weights = sum(it.numel() for it in network.parameters())
    some = next(network.parameters())
    pixels = prod(dataset.shape) * some.element_size()
    example = 3 * pixels + 2 * _saved_bytes(network, dataset) // _TRIED
    return 6 * parameters + 2 * buffers + weights + batch_size * example


def _saved_bytes(network: nn.Module, dataset: Dataset) -> int:
    """Bytes that the backward pass of some examples needs, parameters aside; changes nothing."""
    some = next(network.parameters())
    inputs = dataset.inputs(dataset.train.images[:_TRIED].to(some.device)).to(some.dtype)
    parameters = {name: it.detach().requires_grad_() for name, it in network.named_parameters()}
    buffers = {name: it.clone() for name, it in network.named_buffers()}
    known = {it.untyped_storage().data_ptr() for it in parameters.values()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda it: it):
        logits = call_with({**parameters, **buffers}, network, inputs)
    del logits  # which kept them all until here, so that no two had one address
    return sum(found.values())
