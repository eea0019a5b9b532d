"""Which parameters pruning may touch, and which of them are asked for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import did_you_mean, listed, without_wrappers
from lossprune.pruning.wholeness import check_whole
from lossprune.torch_state import in_mode

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Words for a network's first and last layer, in the order that it registers them.
ENDS = {"first": (0,), "last": (-1,), "first and last": (0, -1)}

# What a call chooses by: a name or glob pattern, a type of module, a module, or a function of
# (name, parameter, module).
Choice = str | type[nn.Module] | nn.Module | Callable[[str, Tensor, nn.Module], bool]
Choices = Choice | Sequence[Choice]

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


@dataclass(frozen=True)
class _Use:
    """A weight as one layer has it; a weight that layers share has several.

    Attributes:
        name: the parameter's, as ``model.named_parameters()`` gives it.
        here: the same through this layer.
        usual: whether it is the weight of a linear or convolution layer.
        computed: whether it is no parameter itself, but made from others.
    """

    name: str
    here: str
    layer: nn.Module
    weight: Tensor
    usual: bool
    computed: bool


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
        names = _chosen("parameters", parameters, model, uses)
    elif not names:
        kinds = ", ".join(kind.__name__ for kind in LAYERS)
        raise PruningError(
            f"{type(model).__name__} has nothing to prune: none of its layers is a {kinds}"
        )
    if exclude is not None:
        count = len(names)
        names = names - _chosen("exclude", exclude, model, uses)
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


def _uses(model: nn.Module, *, others: bool) -> Iterable[_Use]:
    """Weights of linear and convolution layers, and other parameters that could be pruned."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer_name, layer in model.named_modules():
        prefix = f"{layer_name}." if layer_name else ""
        usual = isinstance(layer, LAYERS) or _is_conv1d(layer)
        if usual:
            here = f"{prefix}weight"
            weight = _weight(layer)
            name = names.get(id(weight), here)
            yield _Use(name, here, layer, weight, True, id(weight) not in names)
        if not others or isinstance(layer, _NEVER):
            continue
        for attribute, parameter in layer.named_parameters(recurse=False):
            if usual and attribute == "weight":
                continue
            if is_lazy(parameter) or parameter.ndim > 1:
                here = f"{prefix}{attribute}"
                yield _Use(names[id(parameter)], here, layer, parameter, False, False)


def _weight(layer: Any) -> Tensor:
    """Return the layer's weight; where it is computed, as in evaluation mode.

    In training mode that would change the network: a spectral norm goes on with its iteration.
    """
    if not is_parametrized(layer, "weight"):
        return layer.weight
    with in_mode(layer.parametrizations.weight, training=False):
        return layer.weight


def _check_ordinary(use: _Use) -> None:
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


def _chosen(what: str, choices: Any, model: nn.Module, uses: Sequence[_Use]) -> set[str]:
    """Names of the parameters that any of the choices matches."""
    single = isinstance(choices, (str, nn.Module)) or callable(choices)
    listing = [choices] if single or not isinstance(choices, Iterable) else list(choices)
    exact: dict[str, set[str]] = {}
    for use in uses:
        for spelling in _spellings(use):
            exact.setdefault(spelling, set()).add(use.name)
    chosen: set[str] = set()
    for choice in listing:
        in_full = exact.get(choice) if isinstance(choice, str) else None
        found = in_full or _matches(what, choice, model, uses)
        if not found:
            raise ValueError(_nothing(what, choice, model, uses))
        chosen |= found
    if not listing and what == "parameters":
        raise ValueError("parameters=() chooses nothing to prune")
    return chosen


def _matches(what: str, choice: Any, model: nn.Module, uses: Sequence[_Use]) -> set[str]:
    usual = [use for use in uses if use.usual]
    if isinstance(choice, str):
        if choice in ENDS:
            return {usual[end].name for end in ENDS[choice]} if usual else set()
        return {use.name for use in usual if _is_like(use, choice)}
    if isinstance(choice, (type, nn.Module)):
        return _within(choice, model, uses)
    if callable(choice):
        check_whole(model, {use.name: use.weight for use in usual})
        return {use.name for use in usual if choice(use.name, use.weight, use.layer)}
    raise ValueError(
        f"{what} must be names, patterns, types of modules or functions of (name, parameter, "
        f"module), got {choice!r}"
    )


def _within(choice: Any, model: nn.Module, uses: Sequence[_Use]) -> set[str]:
    """Weights of linear and convolution layers in such modules, other parameters of their own."""
    if isinstance(choice, nn.Module):
        tops = [choice]
    else:
        tops = [module for module in model.modules() if isinstance(module, choice)]
    inside = {id(module) for top in tops for module in top.modules()}
    own = {id(top) for top in tops}
    return {
        use.name
        for use in uses
        if id(use.layer) in (inside if use.usual else own)
        # Tables and tokens that a module learns beside its weights are no weights.
        and (use.usual or "weight" in use.here.rpartition(".")[2])
    }


def _spellings(use: _Use) -> set[str]:
    return {use.name, use.here, without_wrappers(use.name), without_wrappers(use.here)}


def _is_like(use: _Use, pattern: str) -> bool:
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in _spellings(use)
    )


def _nothing(what: str, choice: Any, model: nn.Module, uses: Sequence[_Use]) -> str:
    """Say that a choice matches nothing, why that may be, and what there is."""
    names = list(dict.fromkeys(use.name for use in uses if use.usual))
    there = f"; there are: {listed(names)}" if names else "; the network has none by default"
    if not isinstance(choice, str):
        shown = choice.__name__ if isinstance(choice, type) else repr(choice)
        return f"{what}={shown} chooses no weight that can be pruned{there}"
    other = [use.name for use in uses if not use.usual and _is_like(use, choice)]
    if other:
        hint = f", only {listed(other)}: name them in full, or their module's type"
    else:
        every = (name for name, _ in model.named_parameters())
        never = [n for n in every if fnmatchcase(n, choice) or fnmatchcase(n, f"{choice}.*")]
        hint = did_you_mean(choice, [*names, *(name.rpartition(".")[0] for name in names)])
        if never:
            hint = f", only {listed(never)} (biases, normalisations and embeddings are kept)"
    return f"{what}={choice!r} matches no weight that can be pruned{hint}{there}"
