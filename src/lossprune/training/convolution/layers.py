"""Layers that hold the kept weights alone, and what stands between them, over blocks of images."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossprune.pruning.errors import PruningError
from lossprune.training.convolution import between
from lossprune.training.convolution.blocks import packed, unpacked
from lossprune.training.convolution.functions import (
    KeptConvolution,
    Normalisation,
    Relu,
)
from lossprune.training.convolution.structure import Convolution


class SparseLayer(nn.Module):
    """A linear or convolution layer whose weight is a vector of the kept ones.

    Called with blocks of images it returns blocks; otherwise it takes and returns what the layer
    did.

    Attributes:
        values: of the kept weights, (kept,), in the order of ``kept``.
        bias: as the layer's.
        kept: their positions in the flattened weight, ascending: int32, saved with them.
        shape: of the whole weight.
    """

    kept: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, mask: Tensor, values: nn.Parameter) -> None:
        super().__init__()
        for name in layer.__constants__:  # which a network's code may read
            setattr(self, name, getattr(layer, name))
        self.shape, self.linear, self.settings = layer.weight.shape, *settings_of(layer)
        self.register_buffer("kept", positions(mask).int())
        self.values = values
        self.bias = layer.bias
        self._made = functools.cache(self._convolution)

    def forward(
        self,
        x: Tensor,
        *,
        blocks: bool = False,
        relu: bool = False,
        gated: bool = False,
        rectified: bool = False,
    ) -> Tensor:
        """Return the layer's outputs; for what stands around blocks see :class:`Relu`."""
        if blocks:
            _, height, channels, width, _ = x.shape
            made = self._made(channels, height, width)
            return made(x, self.values, self.bias, Relu(relu, gated, rectified))
        if not self.linear and x.dim() not in (3, 4):
            raise PruningError(
                f"a convolution takes (n, channels, height, width), but got {tuple(x.shape)}"
            )
        last = 1 if self.linear else 3  # dimensions of one image, or of one token
        images = x.reshape(math.prod(x.shape[:-last]), *x.shape[-last:])
        made = self(packed(images), blocks=True)
        out = unpacked(made, len(images), flat=self.linear)
        return out.view(*x.shape[:-last], *out.shape[1:])

    @property
    def weight(self) -> Tensor:
        """The whole weight, for code of a network that reads it."""
        return scattered(self.values, self.kept, self.shape)

    def _convolution(self, channels: int, height: int, width: int) -> KeptConvolution:
        """For maps of one size."""
        layer = convolution_of(self.shape, (channels, height, width), self.settings)
        return KeptConvolution(layer, self.kept.long())

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *arguments: Any, **options: Any
    ) -> None:
        check_mask(state_dict.get(f"{prefix}kept"), self.kept, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._made = functools.cache(self._convolution)

    def extra_repr(self) -> str:
        """Say what is kept."""
        return f"{self.values.numel():,} of {self.shape.numel():,} weights of {tuple(self.shape)}"


def check_mask(given: Tensor | None, kept: Tensor, prefix: str) -> None:
    """Raise PruningError if a state keeps other weights."""
    if given is not None and not torch.equal(given.cpu(), kept):
        raise PruningError(f"{prefix}kept: the state is of another mask")


def settings_of(layer: nn.Linear | nn.Conv2d) -> tuple[bool, dict[str, Any]]:
    """Return whether a layer is linear, and the settings of one that is not."""
    if isinstance(layer, nn.Linear):
        return True, {}
    names = ("stride", "padding", "dilation")
    settings: dict[str, Any] = {name: _pair(getattr(layer, name)) for name in names}
    return False, {**settings, "groups": layer.groups}


def convolution_of(
    weight: Sequence[int], inputs: tuple[int, int, int], settings: Mapping[str, Any]
) -> Convolution:
    """Return what a layer computes over maps (channels, height, width).

    A linear layer's weight is (outputs, features), which are those of all positions in order.

    Raises:
        PruningError: it has another number of features or channels, or a kernel as large as no map.
    """
    if len(weight) == 4:
        outputs, channels, rows, columns = weight
        layer = Convolution(inputs, (outputs, channels, rows, columns), **settings)
        if inputs[0] != channels * layer.groups:
            raise PruningError(f"a layer of {channels * layer.groups} channels got {inputs[0]}")
        if min(layer.output_shape) < 1:
            size = f"{inputs[1]}×{inputs[2]}"
            raise PruningError(f"maps of {size} are too small for the layer's kernel")
        return layer
    outputs, features = weight
    if features != math.prod(inputs):
        channels, height, width = inputs
        raise PruningError(
            f"a layer of {features} inputs got {channels} channels of {height}×{width}"
        )
    return Convolution(inputs, (outputs, *inputs))


class Scattered(nn.Module):
    """The parametrisation of a weight by its kept values, for layers that the kernels lack."""

    kept: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.shape = mask.shape
        self.register_buffer("kept", positions(mask))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *arguments: Any, **options: Any
    ) -> None:
        check_mask(state_dict.get(f"{prefix}kept"), self.kept, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    def forward(self, values: Tensor) -> Tensor:
        """Return the whole weight."""
        return scattered(values, self.kept, self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the kept values of a weight."""
        return weight.detach().flatten()[self.kept]


class BlockNorm1d(nn.BatchNorm1d):
    """A batch normalisation that takes blocks of images too, where ``images`` says of how many."""

    def forward(
        self,
        input: Tensor,  # noqa: A002, as torch calls it
        images: int | None = None,
        *,
        relu: bool = False,
        gated: bool = False,
    ) -> Tensor:
        """Return what the normalisation does."""
        if images is None:
            return super().forward(input)
        return block_norm(self, input, images, Relu(relu, gated))


class BlockNorm2d(nn.BatchNorm2d):
    """The same of maps."""

    def forward(
        self,
        input: Tensor,  # noqa: A002, as torch calls it
        images: int | None = None,
        *,
        relu: bool = False,
        gated: bool = False,
    ) -> Tensor:
        """Return what the normalisation does."""
        if images is None:
            return super().forward(input)
        return block_norm(self, input, images, Relu(relu, gated))


BLOCK_NORMS = {nn.BatchNorm1d: BlockNorm1d, nn.BatchNorm2d: BlockNorm2d}


def over_blocks(norm: nn.Module) -> nn.Module:
    """Return a batch normalisation with the same parameters and buffers that takes blocks too."""
    kind = BLOCK_NORMS[type(norm)]
    made = kind.__new__(kind)
    made.__dict__.update(norm.__dict__)
    return made


def scattered(values: Tensor, kept: Tensor, shape: torch.Size) -> Tensor:
    """Return a whole weight of its kept values."""
    return values.new_zeros(shape.numel()).index_put((kept.long(),), values).view(shape)


def positions(mask: Tensor) -> Tensor:
    """Return where a mask is True, flattened: int64."""
    return mask.flatten().nonzero()[:, 0]


def _pair(value: int | str | tuple[int, int]) -> tuple[int, int]:
    assert not isinstance(value, str)
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def block_norm(norm: Any, x: Tensor, images: int, relu: Relu) -> Tensor:
    """Return blocks of images normalised as ``norm`` does, its running statistics moved on."""
    if not norm.training and norm.track_running_stats:
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias
        if not torch.is_grad_enabled() or not (x.requires_grad or scale.requires_grad):
            return between.scaled(x, scale, shift, relu=relu.after)
        out = x * scale[:, None, None] + shift[:, None, None]
        return F.relu(out) if relu.after else out
    count = images * x.shape[1] * x.shape[3]
    if count < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got {images} image of "
            f"{x.shape[1]}×{x.shape[3]} positions"
        )
    out, mean, variance = Normalisation(images, norm.eps, relu)(x, norm.weight, norm.bias)
    if norm.training and norm.track_running_stats:
        norm.num_batches_tracked.add_(1)
        by = norm.momentum
        by = 1.0 / float(norm.num_batches_tracked) if by is None else by
        norm.running_mean.lerp_(mean, by)
        norm.running_var.lerp_(variance * (count / (count - 1)), by)
    return out
