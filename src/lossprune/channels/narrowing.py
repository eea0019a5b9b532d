"""The network that is left to train: without the channels from which no path leads to an output.

The gradient of such a channel's weights and biases is exactly 0 and stays so, for a mask is not
lifted while training.  Without them every other gradient is the same.  A channel that no path leads
*to* stays: it holds a constant, but its bias is trained.  (:func:`lossprune.compact` removes both,
and is for networks that are trained no more.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor, nn

from lossprune.channels.analysis import analyse
from lossprune.channels.calls import usual_fixed
from lossprune.channels.compaction import masked_copy
from lossprune.channels.layers import Normalised
from lossprune.channels.nodes import BatchNorm
from lossprune.channels.slicing import LayerSlice, layer_slices, replace_, slice_norm_
from lossprune.channels.tracing import UntraceableError, trace
from lossprune.pruning.mask import Mask

Index = tuple[Tensor, ...] | EllipsisType


class NotNarrowableError(ValueError):
    """A network that cannot be trained without some of its channels; the message says why."""


@dataclass(frozen=True)
class Narrowing:
    """A network without the channels that lead to no output, and where its numbers come from.

    Attributes:
        model: of the same class, with layers of the same names, in training mode.
        mask: of ``model``'s weights, by the same parameter names.
        index: by the name of a parameter or buffer of ``model``, what it is of the tensor of the
            same name before: ``whole[index]`` reads it, ``whole[index] = part`` writes it.
    """

    model: nn.Module
    mask: Mask
    index: Mapping[str, Index]


def narrow(model: nn.Module, mask: Mapping[str, Tensor]) -> Narrowing:
    """Return ``model`` without the channels from which no kept weight leads on to an output.

    It is to be called with the arguments that have no default, as ``model`` is in training.

    Args:
        model: left unchanged.
        mask: which weights are kept, by parameter name; a weight it does not name is kept.

    Raises:
        NotNarrowableError: the network has no graph, computes with the sizes of its layers, draws
            random numbers, or does otherwise in training than in evaluation.
        PruningError: the mask names a parameter that the model lacks or has in another shape.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> mask = Mask.dense(model)
    >>> mask["0.weight"][1] = False  # holds a constant: tanh of its bias
    >>> mask["2.weight"][:, 2:] = False  # nothing reads these two
    >>> narrow(model, Mask(mask)).model
    Sequential(
      (0): Linear(in_features=3, out_features=2, bias=True)
      (1): Tanh()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    for name, module in model.named_modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if dropout or isinstance(module, nn.RReLU):
            raise NotNarrowableError(f"{name} draws random numbers")
    small, mask = masked_copy(model, mask)
    try:
        fixed = usual_fixed(small)
        analysis = analyse(small, mask, fixed, constants=False)
        index: dict[str, Index] = {}
        for part in list(layer_slices(analysis)):
            if not part.whole:
                index |= _slice_(small.get_submodule(part.operation.name), part)
        if not trace(small, fixed).same(analysis.trace):
            raise NotNarrowableError("the network's code computes with the sizes of its layers")
        if not trace(small.train(), fixed).same(analysis.trace):
            raise NotNarrowableError("it does otherwise in training than in evaluation")
    except UntraceableError as error:
        raise NotNarrowableError(str(error)) from None
    tensors = dict([*small.named_parameters(remove_duplicate=False), *small.named_buffers()])
    index = {name: index.get(name, ...) for name in tensors}
    kept = {
        name: whole.to(tensors[name].device)[index[name]].contiguous()
        for name, whole in mask.items()
    }
    return Narrowing(small, Mask(kept, criterion=mask.criterion), index)


def _slice_(layer: nn.Module, part: LayerSlice) -> dict[str, Index]:
    """Leave a layer what stays of it; return which part of its tensors that is, by full name."""
    tensors = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    device = tensors[0][1].device
    rows = part.rows.nonzero()[:, 0].to(device)
    index: dict[str, Index] = {name: (rows,) for name, tensor in tensors if tensor.dim()}
    if isinstance(part.operation, Normalised):
        assert isinstance(layer, BatchNorm)
        slice_norm_(layer, part.rows)
    else:
        weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
        if part.columns is not None:
            columns = part.columns.nonzero()[:, 0].to(device)
            index["weight"] = rows[:, None], columns
        left = weight.detach()[index["weight"]]
        shift = torch.zeros(len(rows)) if bias is None else bias.detach()[rows]
        replace_(layer, left.reshape(*left.shape[:2], -1), shift)
    return {f"{part.operation.name}.{name}": where for name, where in index.items()}
