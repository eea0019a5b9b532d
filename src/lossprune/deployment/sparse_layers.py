"""One sparse layer for one of torch's: by the compiled kernels, in CSR format, or 2:4 on a GPU.

Products in CSR format are of torch alone, for machines without a C compiler.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from lossprune.deployment.race import Budget
from lossprune.deployment.sparse.parts import in_parts, sparse_networks
from lossprune.deployment.sparse.tuning import tune_

# Returns the sparse layer for a layer's name, itself, its inputs and what tuning it may
# take; None where it has none.
MakeLayer = Callable[[str, nn.Module, tuple[Tensor, ...], Budget], nn.Module | None]

# What the GPU's sparse units take: two of four neighbours kept, in these types and sizes.
_TYPES = (torch.float16, torch.bfloat16)
_MULTIPLE = 64


def sparse_layer(
    name: str, layer: nn.Module, args: tuple[Tensor, ...], budget: Budget
) -> nn.Module | None:
    """Return a layer as a sparse network of its own, tuned; None where the kernels have none."""
    alone = nn.Sequential(layer).eval()
    graph = fx.GraphModule(alone, fx.symbolic_trace(alone).graph)
    ShapeProp(graph).propagate(*args)
    sparse = in_parts(graph)
    if not sparse_networks(sparse):
        return None
    for part in sparse_networks(sparse):
        part.steps = tuple(replace(step, name=name) for step in part.steps)
    tune_(sparse, lambda network: network(*args), budget)
    return sparse


def csr_layer(_: str, layer: nn.Module, args: tuple[Tensor, ...], __: Budget) -> nn.Module | None:
    """Return a layer in CSR format; None where it has none."""
    if args[0].dtype != torch.float32:
        return None
    if type(layer) is nn.Linear:
        return CsrLinear(layer.weight, layer.bias)
    if type(layer) is not nn.Conv2d or args[0].dim() != 4:
        return None
    plain = layer.groups == 1 and layer.padding_mode == "zeros"
    return CsrConv2d(layer) if plain and not isinstance(layer.padding, str) else None


@torch.no_grad()
def semi_structured_layer(
    _: str, layer: nn.Module, __: tuple[Tensor, ...], ___: Budget
) -> nn.Module | None:
    """Return a linear layer with a 2:4 mask as PyTorch's semi-structured one; else None."""
    from torch.sparse import to_sparse_semi_structured

    if type(layer) is not nn.Linear or layer.weight.dtype not in _TYPES:
        return None
    if any(size % _MULTIPLE for size in layer.weight.shape) or not is_two_of_four(layer.weight):
        return None
    sparse = copy.deepcopy(layer)
    sparse.weight = nn.Parameter(
        to_sparse_semi_structured(layer.get_parameter("weight")), requires_grad=False
    )
    return sparse


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


class _Compressed(nn.Module):
    """A matrix in compressed rows, (outputs, inputs), and a bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take W (outputs, inputs) and b (outputs,)."""
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.register_buffer("weight", weight.detach().to_sparse_csr())
        shift = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().clone()
        self.register_buffer("bias", shift)


class CsrLinear(_Compressed):
    """y = x Wᵀ + b with W in compressed rows.

    >>> layer = nn.Linear(3, 2)
    >>> torch.allclose(CsrLinear(layer.weight, layer.bias)(torch.ones(1, 3)), layer(torch.ones(3)))
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        y = (self.get_buffer("weight") @ x.reshape(-1, x.shape[-1]).t()).t()
        y = y + self.get_buffer("bias")
        return y.reshape(*x.shape[:-1], y.shape[-1])


class CsrConv2d(_Compressed):
    """A convolution as the product of W in compressed rows and the unfolded input."""

    def __init__(self, layer: nn.Conv2d) -> None:
        """Take the weights of a convolution with one group that pads with zeros."""
        super().__init__(layer.weight.flatten(1), layer.bias)
        self.size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding: tuple[int, ...] = tuple(layer.padding)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, height, width) to (n, outputs, rows, columns)."""
        columns = F.unfold(x, self.size, self.dilation, self.padding, self.stride)
        images, depth, places = columns.shape
        y = self.get_buffer("weight") @ columns.transpose(0, 1).reshape(depth, images * places)
        y = y + self.get_buffer("bias")[:, None]
        rows = (
            x.shape[2] + 2 * self.padding[0] - self.dilation[0] * (self.size[0] - 1) - 1
        ) // self.stride[0] + 1
        return y.reshape(-1, images, rows, places // rows).transpose(0, 1).contiguous()
