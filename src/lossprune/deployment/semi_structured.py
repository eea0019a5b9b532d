"""Linear layers with 2:4 masks on a GPU: PyTorch's semi-structured products."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lossprune.deployment.sparse.parts import inputs_of
from lossprune.deployment.sparse.tuning import Caller, weighted_layers
from lossprune.deployment.timing import interleaved

# What the GPU's sparse units take: two of four neighbours kept, in these types and sizes.
_TYPES = (torch.float16, torch.bfloat16)
_MULTIPLE = 64


def is_two_of_four(weight: Tensor) -> bool:
    """Say whether at most two of every four neighbours in a row are not zero.

    >>> is_two_of_four(torch.tensor([[1.0, 0.0, 2.0, 0.0]]))
    True
    >>> is_two_of_four(torch.tensor([[1.0, 3.0, 2.0, 0.0]]))
    False
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool((weight.reshape(-1, 4).count_nonzero(1) <= 2).all())


@torch.no_grad()
def with_semi_structured(
    masked: nn.Module, call: Caller, seconds: float
) -> tuple[nn.Module, list[str]]:
    """Return a copy whose 2:4 linear layers are semi-structured where faster, and their names."""
    from torch.sparse import to_sparse_semi_structured

    network = copy.deepcopy(masked)
    changed = []
    layers = weighted_layers(network)
    seen = inputs_of(network, call, list(layers.values()))
    for name, layer in layers.items():
        if layer not in seen or not _suits(layer):
            continue
        sparse = copy.deepcopy(layer)
        sparse.weight = nn.Parameter(
            to_sparse_semi_structured(layer.get_parameter("weight")), requires_grad=False
        )
        calls: list[Callable[[], object]] = [
            (lambda module=module, its=seen[layer]: _finished(module(*its.inputs, **its.named)))
            for module in (sparse, layer)
        ]
        fast, slow = interleaved(calls, seconds=seconds)
        if fast.best < slow.best:
            layer.weight = sparse.weight
            changed.append(name)
    return network, changed


def _suits(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or layer.weight.dtype not in _TYPES:
        return False
    return not any(size % _MULTIPLE for size in layer.weight.shape) and is_two_of_four(layer.weight)


def _finished(outputs: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return outputs
