"""Sparse layers of torch alone, for machines without a C compiler: products in CSR format."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CsrLinear(nn.Module):
    """y = x Wᵀ + b with W in compressed rows.

    >>> layer = nn.Linear(3, 2)
    >>> torch.allclose(CsrLinear(layer.weight, layer.bias)(torch.ones(1, 3)), layer(torch.ones(3)))
    True
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take W (outputs, inputs) and b (outputs,)."""
        super().__init__()
        self.register_buffer("weight", compressed(weight))
        self.register_buffer("bias", _bias(weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        y = (self.get_buffer("weight") @ x.reshape(-1, x.shape[-1]).t()).t()
        y = y + self.get_buffer("bias")
        return y.reshape(*x.shape[:-1], y.shape[-1])


class CsrConv2d(nn.Module):
    """A convolution as the product of W in compressed rows and the unfolded input."""

    def __init__(self, layer: nn.Conv2d) -> None:
        """Take the weights of a convolution with one group that pads with zeros."""
        super().__init__()
        self.register_buffer("weight", compressed(layer.weight.flatten(1)))
        self.register_buffer("bias", _bias(layer.weight, layer.bias))
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


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().clone()


def compressed(weight: Tensor) -> Tensor:
    """Return a matrix in compressed rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return weight.detach().to_sparse_csr()


def csr_layer(_: str, layer: nn.Module, args: tuple[Tensor, ...], __: float) -> nn.Module | None:
    """Return a layer in CSR format; None where it has none."""
    if args[0].dtype != torch.float32:
        return None
    if type(layer) is nn.Linear:
        return CsrLinear(layer.weight, layer.bias)
    if type(layer) is not nn.Conv2d or args[0].dim() != 4:
        return None
    plain = layer.groups == 1 and layer.padding_mode == "zeros"
    return CsrConv2d(layer) if plain and not isinstance(layer.padding, str) else None
