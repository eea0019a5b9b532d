"""Which parameters of a network pruning may touch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lossprune.pruning.choices import Choices, LayerWeight, chosen, ends
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
# Projections that attention has packed, or apart where keys or values have other sizes.
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# Modules whose parameters are no weights, or not for long.
_NEVER = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, ParametrizationList)


def prunable_weights(
    model: nn.Module, parameters: Choices | None = None, exclude: Choices | None = None
) -> dict[str, Tensor]:
    """Return the weights of ``model`` to prune, by parameter name.

    By default all that stand in products with activations: of linear and convolution layers, also
    transposed, among them the linear layers on tokens that ``transformers`` calls ``Conv1D``; of
    recurrent and bilinear layers; the projections that ``nn.MultiheadAttention`` has packed; and
    of experts, where a module that counts them (a whole-number attribute named ``num_experts`` or
    the like) has a parameter of three dimensions with a matrix for each.  Never biases,
    normalisations or embeddings.  A weight that several layers share appears once, under the name
    that ``model.named_parameters()`` gives it.

    Args:
        model: the network.
        parameters: which ones, if not all of these.  A string is a parameter's name, the name of a
            module (for all in it) or a glob pattern (``*`` also crosses dots); ``"first"`` and
            ``"last"`` are the first and last linear or convolution layer that the network
            registers, where it has none the first and last weight.  A type of module, or a module,
            is for all in such modules.  A function of (name, parameter, module) says of each.  A
            sequence of these is for what any of them chooses.  A full name, or the very type of
            module, also reaches other parameters of two or more dimensions, such as those of a
            layer of one's own.
        exclude: which ones of these not, in the same ways; ``"first and last"`` for both.

    Raises:
        ValueError: a choice that matches nothing, or only what cannot be pruned; nothing is left.
        PruningError: the network has no such weight; a weight is not initialised yet, offloaded, on
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
    uses = _chosen(model, parameters, exclude)
    for use in uses:
        _check_ordinary(use)
    found = {use.name: use.weight for use in uses}
    check_whole(model, found)
    check_numbers(found)
    return found


def chosen_weights(
    model: nn.Module, parameters: Choices | None = None, exclude: Choices | None = None
) -> dict[str, Tensor]:
    """Return the weights that :func:`prunable_weights` would, with values or without."""
    return {use.name: use.weight for use in _chosen(model, parameters, exclude)}


def _chosen(
    model: nn.Module, parameters: Choices | None, exclude: Choices | None
) -> list[LayerWeight]:
    """The uses of the weights that are asked for."""
    uses = list(_uses(model, others=parameters is not None))
    names = {use.name for use in uses if use.usual}
    if parameters is not None:
        names = chosen("parameters", parameters, model, uses)
    elif not names:
        raise PruningError(
            f"{type(model).__name__} has nothing to prune: none of its layers is linear, a "
            "convolution, recurrent, attention, bilinear or of experts; parameters= names others"
        )
    if exclude is not None:
        count = len(names)
        names = names - chosen("exclude", exclude, model, uses)
        if not names:
            raise ValueError(f"exclude={exclude!r} leaves none of the {count} parameters to prune")
    return [use for use in uses if use.name in names]


def usual_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the weights that are pruned by default."""
    return frozenset(use.name for use in _uses(model, others=False))


def last_layer(model: nn.Module) -> str:
    """Return the name of the weight of the last linear or convolution layer of ``model``.

    Where there is none, of the last weight that is pruned by default, or of none at all.
    """
    last = ends(list(_uses(model, others=False)))[-1:]
    return last[0].name if last else ""


def input_dimensions(model: nn.Module) -> dict[str, int]:
    """Return which dimension of each parameter of ``model`` that may be pruned its inputs are.

    Experts are left out where their module does not say it (``is_transposed``).
    """
    found = {
        use.name: _input_dimension(use)
        for use in reversed(list(_uses(model, others=True)))  # the first layer that has it counts
    }
    return {name: dimension for name, dimension in found.items() if dimension is not None}


def stacked_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that are a stack of matrices, one for each expert."""
    return frozenset(use.name for use in _uses(model, others=False) if _is_stack(use))


def check_mask(mask: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str) -> None:
    """Raise a ``ValueError`` unless ``mask`` has exactly the names and shapes of ``weights``."""
    lacking = [f"it lacks {name!r}" for name in weights if name not in mask]
    faults = [f"{name!r} is none of them" for name in mask if name not in weights]
    faults += [
        f"it has shape {tuple(mask[name].shape)} for {name!r}, the weight {tuple(weight.shape)}"
        for name, weight in weights.items()
        if name in mask and mask[name].shape != weight.shape
    ]
    if lacking or faults:
        # As of a pruning of fewer parameters.
        instead = "" if faults else f"; parameters=list({what}) prunes those that it has"
        raise ValueError(
            f"{what} must be a mask of this network's prunable weights: "
            f"{'; '.join([*lacking, *faults])}{instead}"
        )


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether this is the linear layer of ``transformers`` whose weight is (inputs, outputs)."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
        for kind in type(layer).__mro__
    )


def _uses(model: nn.Module, *, others: bool) -> Iterable[LayerWeight]:
    """Weights that are pruned by default, and other parameters that could be."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer_name, layer in model.named_modules():
        prefix = f"{layer_name}." if layer_name else ""
        usual = _weights_of(layer)
        single = isinstance(layer, LAYERS) or _is_conv1d(layer)
        for attribute in usual:
            here = f"{prefix}{attribute}"
            weight = _weight(layer, attribute)
            if weight is not None:
                name, computed = names.get(id(weight), here), id(weight) not in names
                yield LayerWeight(name, here, layer, weight, True, single, computed)
        if not others or isinstance(layer, _NEVER):
            continue
        for attribute, parameter in layer.named_parameters(recurse=False):
            if attribute not in usual and (is_lazy(parameter) or parameter.ndim > 1):
                here = f"{prefix}{attribute}"
                yield LayerWeight(names[id(parameter)], here, layer, parameter, False, False, False)


def _weights_of(layer: Any) -> Sequence[str]:
    """The attributes of a module that are its weights in products with activations."""
    if isinstance(layer, (*LAYERS, *_TRANSPOSED, nn.Bilinear)) or _is_conv1d(layer):
        return ("weight",)
    if isinstance(layer, nn.MultiheadAttention):
        return _PROJECTIONS
    if isinstance(layer, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    if isinstance(layer, nn.RNNBase):
        return [name for name in layer._flat_weights_names if name.startswith("weight_")]
    return _experts_of(layer)


def _experts_of(layer: nn.Module) -> Sequence[str]:
    """Those that have a matrix for each of the experts that the module says it has."""
    counts = {
        number
        for attribute, number in vars(layer).items()
        if "expert" in attribute and isinstance(number, int) and number > 1
    }
    if not counts:
        return ()
    return [
        name
        for name, parameter in layer.named_parameters(recurse=False)
        if not is_lazy(parameter)
        and parameter.ndim == 3
        and len(parameter) in counts
        and min(parameter.shape[1:]) > 1
    ]


def _is_stack(use: LayerWeight) -> bool:
    return use.here.rpartition(".")[2] in _experts_of(use.layer)


def _input_dimension(use: LayerWeight) -> int | None:
    if _is_stack(use):
        transposed = getattr(use.layer, "is_transposed", None)
        return None if transposed is None else 1 if transposed else 2
    return 0 if _is_conv1d(use.layer) or isinstance(use.layer, _TRANSPOSED) else 1


def _weight(layer: Any, attribute: str) -> Tensor | None:
    """Return the layer's weight; where it is computed, as in evaluation mode.

    In training mode that would change the network: a spectral norm goes on with its iteration.
    """
    if not is_parametrized(layer, attribute):
        return getattr(layer, attribute)
    with in_mode(layer.parametrizations[attribute], training=False):
        return getattr(layer, attribute)


def _check_ordinary(use: LayerWeight) -> None:
    if use.computed:
        raise PruningError(
            f"{use.name!r} is computed from other parameters: make it an ordinary parameter first "
            "(lossprune.pruning.remove_masks_ for torch's pruning, else "
            "torch.nn.utils.parametrize.remove_parametrizations), or exclude it"
        )


def check_numbers(weights: Mapping[str, Tensor]) -> None:
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
