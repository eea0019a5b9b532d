"""What a pruning leaves alone: which parameters, why, and how much of the network they are."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lossprune.pruning.prunable import usual_names

_NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Share of what could be pruned that matrices left out may have without a word.
_CONSIDERABLE = 0.1


@dataclass(frozen=True)
class Skipped:
    """A parameter that is not pruned.

    Attributes:
        kind: ``"embedding"``; ``"normalisation"``; ``"not chosen"``, which is pruned where nothing
            else is asked for; ``"parametrisation"``, from which a weight is computed; ``"matrix"``,
            of two or more dimensions in a module of another kind; ``"vector"``, such as a scale.
        shape: of it; empty where it is not initialised yet.
        size: numbers in it.
    """

    kind: str
    shape: tuple[int, ...]
    size: int


def find_skipped(model: nn.Module, pruned: Collection[str]) -> dict[str, Skipped]:
    """Return the parameters of ``model`` that are not among ``pruned``, by name, without biases.

    >>> model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> for name, part in find_skipped(model, ["2.weight"]).items():
    ...     print(name, part.kind, part.size)
    0.weight embedding 20
    1.weight normalisation 4
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    usual = usual_names(model)
    found: dict[str, Skipped] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = names[id(parameter)]
            shape = () if is_lazy(parameter) else tuple(parameter.shape)
            kind = "not chosen" if name in usual else _kind(module, attribute, len(shape))
            if name not in pruned and name not in found and kind != "bias":
                size = 0 if is_lazy(parameter) else parameter.numel()
                found[name] = Skipped(kind, shape, size)
    return found


def numbers_in(model: nn.Module) -> int:
    """Count the numbers in all parameters of ``model``, each once."""
    return sum(0 if is_lazy(parameter) else parameter.numel() for parameter in model.parameters())


def left_out(parts: Mapping[str, Skipped], pruned: int) -> tuple[str, ...]:
    """Return the names of the matrices among ``parts``, if they are considerable, else none.

    They are from a tenth of all that could be pruned: beyond that, a sparsity says too little of
    the network.  A first dimension of 1 is that of a batch, over which tables of positions and
    tokens are spread; they are no such matrices, and neither are embeddings.

    Args:
        parts: what is skipped.
        pruned: how many weights are not.
    """
    matrices = {n: part for n, part in parts.items() if part.kind == "matrix"}
    sizes = {name: part.size for name, part in matrices.items() if part.shape[0] != 1}
    left = sum(sizes.values())
    return tuple(sizes) if left > _CONSIDERABLE * (left + pruned) else ()


def _kind(module: nn.Module, attribute: str, dimensions: int) -> str:
    """What a parameter is that is not pruned by default, by its module, else by its name."""
    kind = type(module).__name__.lower()
    if isinstance(module, ParametrizationList):
        return "parametrisation"
    if attribute == "bias" or attribute.startswith("bias_") or attribute.endswith("_bias"):
        return "bias"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "embed" in kind + attribute.lower():
        return "embedding"
    if isinstance(module, _NORMALISATIONS) or ("norm" in kind and dimensions < 2):
        return "normalisation"
    return "matrix" if dimensions > 1 else "vector"
