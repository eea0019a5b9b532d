"""What sparse kernels read: plain tensors, of images or of rows, in one piece.

An image has its channels at the second dimension.  Rows have their features at the last one, and
all dimensions before that are rows: examples, or positions of tokens in examples.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.passes.shape_prop import TensorMetadata

from lossprune.deployment.sparse.steps import Shape
from lossprune.deployment.sparse.token_steps import TokenPatches
from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import listed


def image_shape(tensor: Tensor | TensorMetadata) -> Shape:
    """Return (channels, height, width) of one image; features are channels of one position."""
    shape = tensor.shape
    return (shape[1], 1, 1) if len(shape) == 2 else (shape[1], shape[2], shape[3])


def row_shape(tensor: Tensor | TensorMetadata) -> Shape:
    """Return (features, 1, 1) of one row."""
    return tensor.shape[-1], 1, 1


def images_of(inputs: Sequence[Tensor]) -> tuple[Sequence[int], tuple[Tensor, ...]]:
    """Return how many images there are, and inputs in one piece, what all share once for each.

    Raises:
        PruningError: they are of different numbers of images.
    """
    if len(inputs) == 1 and inputs[0].is_contiguous() and not inputs[0].is_neg():
        # Nearly all calls, of which small ones take 20 µs in all.
        return inputs[0].shape[:1], (inputs[0],)
    counts = {tensor.shape[0] for tensor in inputs}
    if len(counts) > 1:
        counts.discard(1)  # what all images share, as they do a parameter
    if len(counts) > 1:
        raise PruningError(f"the inputs of a deployed network are of {sorted(counts)} examples")
    (images,) = counts
    return (images,), tuple(
        tensor.resolve_neg().expand(images, *tensor.shape[1:]).contiguous() for tensor in inputs
    )


def rows_of(inputs: Sequence[Tensor]) -> tuple[Sequence[int], tuple[Tensor, ...]]:
    """Return the dimensions that are rows, and inputs as matrices (rows, features) in one piece.

    What rows share is there once for each, as torch's sums have it.

    Raises:
        PruningError: they are of different dimensions.
    """
    if len(inputs) == 1 and inputs[0].is_contiguous() and not inputs[0].is_neg():
        *leading, features = inputs[0].shape
        return leading, (inputs[0].view(math.prod(leading), features),)
    try:
        leading = torch.broadcast_shapes(*[tensor.shape[:-1] for tensor in inputs])
    except RuntimeError:
        shapes = listed([str(tuple(tensor.shape)) for tensor in inputs])
        raise PruningError(f"inputs of shapes {shapes} do not go together") from None
    rows = math.prod(leading)
    whole = [tensor.resolve_neg().expand(*leading, tensor.shape[-1]) for tensor in inputs]
    return leading, tuple([one.reshape(rows, one.shape[-1]).contiguous() for one in whole])


def tokens_of(
    inputs: Sequence[Tensor], images: Sequence[TokenPatches | None], *, first: bool
) -> tuple[Sequence[int], tuple[Tensor, ...]]:
    """Return (n, tokens), and inputs (n, tokens, features) or images in one piece.

    Args:
        inputs: as the network takes them.
        images: for each, how it is cut into patches, where it is images.
        first: whether tokens are given as (tokens, n, features).

    Raises:
        PruningError: they are of other dimensions, or different ones.
    """
    wanted = "(tokens, n, features)" if first else "(n, tokens, features)"
    rows = []
    for tensor, patches in zip(inputs, images, strict=True):
        shape = tensor.shape
        if patches is not None:
            own = patches.channels, patches.height, patches.width
            if tensor.dim() != 4 or shape[1:] != own:
                raise PruningError(
                    f"a deployed network takes images of shape {own} here, got {tuple(shape)}"
                )
            # A row of no numbers for each token, whose examples others are to have.
            tensor = tensor.new_empty(shape[0], patches.tokens, 0)
        elif tensor.dim() != 3:
            raise PruningError(f"a deployed network takes {wanted}, got shape {tuple(shape)}")
        elif first:
            tensor = tensor.transpose(0, 1)
        rows.append(tensor)
    leading, matrices = rows_of(rows)
    return leading, tuple(
        [
            matrix.view(*leading, matrix.shape[-1])
            if patches is None
            else tensor.resolve_neg().expand(leading[0], *tensor.shape[1:]).contiguous()
            for tensor, matrix, patches in zip(inputs, matrices, images, strict=True)
        ]
    )


def check_input(tensor: object, *, rows: bool) -> None:
    """Refuse what the kernels cannot read.

    Raises:
        PruningError: it is not float32 on the CPU, asks for gradients, or is of another kind.
    """
    if not isinstance(tensor, Tensor):
        raise PruningError(f"a deployed network takes tensors, got {type(tensor).__name__}")
    if tensor.dtype != torch.float32 or not tensor.is_cpu:
        raise PruningError(
            "a deployed network takes float32 tensors on the CPU, "
            f"got {tensor.dtype} on {tensor.device}"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise PruningError(
            "a deployed network computes no gradients: detach its input "
            "or call it under torch.no_grad()"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise PruningError(
            "a deployed network takes plain tensors, got "
            + ("a nested one" if tensor.is_nested else f"one with layout {tensor.layout}")
        )
    if rows and not tensor.dim():
        raise PruningError("a deployed network takes (..., features), got a single number")
    if not rows and tensor.dim() not in (2, 4):
        raise PruningError(
            "a deployed network takes (n, channels, height, width) or (n, features), "
            f"got shape {tuple(tensor.shape)}"
        )
    if not _readable(tensor):
        raise PruningError(
            "a deployed network takes plain tensors with numbers in memory, not those of "
            f"torch.func, fake or distributed ones: got {type(tensor).__name__}"
        )
    # Outside of dual levels, nearly always, there is nothing to unpack.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise PruningError("a deployed network computes no gradients: give it no dual tensors")


def _readable(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0 or not tensor.numel()
    except RuntimeError:  # the only way that torch has to say so
        return False
