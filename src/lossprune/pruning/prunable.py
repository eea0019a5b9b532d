"""Which parameters of a network pruning may touch."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lossprune.pruning.choices import Choices, LayerWeight, chosen
from lossprune.pruning.errors import PruningError
from lossprune.pruning.wholeness import check_whole
from lossprune.torch_state import in_mode

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# The types of weights that can be pruned.
_TYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Modules whose parameters are no weights, or not for long.
_NEVER = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, ParametrizationList)


def prunable_weights(
    model: nn.Module, parameters: Choices | None = None, exclude: Choices | None = None
) -> dict[str, Tensor]:
    """Return the weights of ``model`` to prune, by parameter name.

    By default those of its linear and convolution layers, among them the linear layers on tokens
    that ``transformers`` calls ``Conv1D``; never biases, normalisations or embeddings.  A weight
    that several layers share appears once, under the name that ``model.named_parameters()`` gives
    it.

    Args:
        model: the network.
        parameters: which ones, if not all of these.  A string is a parameter's name, the name of a
            module (for all in it) or a glob pattern (``*`` also crosses dots); ``"first"`` and
            ``"last"`` are the first and last linear or convolution layer that the network
            registers.  A type of module, or a module, is for all in such modules.  A function of
            (name, parameter, module) says of each.  A sequence of these is for what any of them
            chooses.  A full name, or the very type of module, also reaches other parameters of
            two or more dimensions, such as those of ``nn.LSTM`` or ``nn.ConvTranspose2d``.
        exclude: which ones of these not, in the same ways; ``"first and last"`` for both.

    Raises:
        ValueError: a choice that matches nothing, or only what cannot be pruned; nothing is left.
        PruningError: the network has no such layer; a weight is not initialised yet, offloaded, on
            the meta device or sharded; or it is computed from other parameters (a parametrisation,
            spectral norm, torch's own pruning), so that removing an entry of it would not last.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2))
    >>> list(prunable_weights(model))
    ['0.weight', '2.weight', '3.weight']
    >>> list(prunable_weights(model, exclude="first and last"))
    ['2.weight']
    >>> list(prunable_weights(model, lambda name, parameter, module: parameter.numel() < 6))
    ['2.weight', '3.weight']
    """
    uses = list(_uses(model, others=parameters is not None))
    names = {use.name for use in uses if use.usual}
    if parameters is not None:
        names = chosen("parameters", parameters, model, uses)
    elif not names:
        kinds = ", ".join(kind.__name__ for kind in LAYERS)
        raise PruningError(
            f"{type(model).__name__} has nothing to prune: none of its layers is a {kinds}"
        )
    if exclude is not None:
        count = len(names)
        names = names - chosen("exclude", exclude, model, uses)
        if not names:
            raise ValueError(f"exclude={exclude!r} leaves none of the {count} parameters to prune")
    weights = {}
    for use in uses:
        if use.name in names:
            _check_ordinary(use)
            weights[use.name] = use.weight
    check_whole(model, weights)
    _check_numbers(weights)
    return weights


def last_layer(model: nn.Module) -> str:
    """Return the name of the weight of the last linear or convolution layer of ``model``."""
    return [use for use in _uses(model, others=False) if use.usual][-1].name


def input_dimensions(model: nn.Module) -> dict[str, int]:
    """Return which dimension of each parameter of ``model`` that may be pruned its inputs are."""
    return {
        use.name: 0 if _is_conv1d(use.layer) or isinstance(use.layer, _TRANSPOSED) else 1
        for use in reversed(list(_uses(model, others=True)))  # the first layer that has it counts
    }


def check_mask(mask: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str) -> None:
    """Raise a ``ValueError`` unless ``mask`` has exactly the names and shapes of ``weights``."""
    faults = [f"it lacks {name!r}" for name in weights if name not in mask]
    faults += [f"{name!r} is none of them" for name in mask if name not in weights]
    faults += [
        f"it has shape {tuple(mask[name].shape)} for {name!r}, the weight {tuple(weight.shape)}"
        for name, weight in weights.items()
        if name in mask and mask[name].shape != weight.shape
    ]
    if faults:
        raise ValueError(
            f"{what} must be a mask of this network's prunable weights: {'; '.join(faults)}"
        )


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether this is the linear layer of ``transformers`` whose weight is (inputs, outputs)."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
        for kind in type(layer).__mro__
    )


def _uses(model: nn.Module, *, others: bool) -> Iterable[LayerWeight]:
    """Weights of linear and convolution layers, and other parameters that could be pruned."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer_name, layer in model.named_modules():
        prefix = f"{layer_name}." if layer_name else ""
        usual = isinstance(layer, LAYERS) or _is_conv1d(layer)
        if usual:
            here = f"{prefix}weight"
            weight = _weight(layer)
            name = names.get(id(weight), here)
            yield LayerWeight(name, here, layer, weight, True, id(weight) not in names)
        if not others or isinstance(layer, _NEVER):
            continue
        for attribute, parameter in layer.named_parameters(recurse=False):
            if usual and attribute == "weight":
                continue
            if is_lazy(parameter) or parameter.ndim > 1:
                here = f"{prefix}{attribute}"
                yield LayerWeight(names[id(parameter)], here, layer, parameter, False, False)


def _weight(layer: Any) -> Tensor:
    """Return the layer's weight; where it is computed, as in evaluation mode.

    In training mode that would change the network: a spectral norm goes on with its iteration.
    """
    if not is_parametrized(layer, "weight"):
        return layer.weight
    with in_mode(layer.parametrizations.weight, training=False):
        return layer.weight


def _check_ordinary(use: LayerWeight) -> None:
    if use.computed:
        raise PruningError(
            f"{use.name!r} is computed from other parameters: make it an ordinary parameter first "
            "(lossprune.pruning.remove_masks_ for torch's pruning, else "
            "torch.nn.utils.parametrize.remove_parametrizations), or exclude it"
        )


def _check_numbers(weights: Mapping[str, Tensor]) -> None:
    """Raise unless they are dense tensors of numbers that can be compared and set to zero."""
    for name, weight in weights.items():
        what = None
        if is_traceable_wrapper_subclass(weight):  # as quantisation libraries make them
            what = f"a {type(weight).__name__}"
        elif weight.layout != torch.strided:
            what = f"sparse ({weight.layout})"
        elif weight.dtype not in _TYPES:
            what = f"of {weight.dtype}"
        if what is not None:
            raise PruningError(
                f"{name!r} is {what}: only dense weights of 16 bits or more, real or complex, can "
                f"be pruned; prune before quantising or converting it, or exclude={name!r}"
            )
