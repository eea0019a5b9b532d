"""Which of a network's weights are asked for: by name, pattern, module or function."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lossprune.pruning.names import did_you_mean, listed, without_wrappers
from lossprune.pruning.wholeness import check_whole

# Words for a network's first and last layer, in the order that it registers them.
ENDS = {"first": (0,), "last": (-1,), "first and last": (0, -1)}

# What a call chooses by: a name or glob pattern, a type of module, a module, or a function of
# (name, parameter, module).
Choice = str | type[nn.Module] | nn.Module | Callable[[str, Tensor, nn.Module], bool]
Choices = Choice | Sequence[Choice]


@dataclass(frozen=True)
class LayerWeight:
    """A weight as one layer has it; a weight that layers share has several.

    Attributes:
        name: the parameter's, as ``model.named_parameters()`` gives it.
        here: the same through this layer.
        usual: whether it is pruned by default.
        single: whether it is the one weight of a linear or convolution layer.
        computed: whether it is no parameter itself, but made from others.
    """

    name: str
    here: str
    layer: nn.Module
    weight: Tensor
    usual: bool
    single: bool
    computed: bool


def chosen(what: str, choices: Any, model: nn.Module, uses: Sequence[LayerWeight]) -> set[str]:
    """Return the names of the parameters that any of the choices matches.

    Args:
        what: the argument that chooses, for messages: ``"parameters"`` or ``"exclude"``.
        choices: one or a sequence of them.
        model: the network.
        uses: its weights.

    Raises:
        ValueError: a choice that matches nothing, or is none.
    """
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


def _matches(what: str, choice: Any, model: nn.Module, uses: Sequence[LayerWeight]) -> set[str]:
    usual = [use for use in uses if use.usual]
    if isinstance(choice, str):
        if choice in ENDS:
            return {ends(usual)[end].name for end in ENDS[choice]} if usual else set()
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


def ends(usual: Sequence[LayerWeight]) -> Sequence[LayerWeight]:
    """Return what ``"first"`` and ``"last"`` are of: linear and convolution layers, if any."""
    return [use for use in usual if use.single] or usual


def _within(choice: Any, model: nn.Module, uses: Sequence[LayerWeight]) -> set[str]:
    """What is pruned by default in such modules, other parameters of their own."""
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


def _spellings(use: LayerWeight) -> set[str]:
    return {use.name, use.here, without_wrappers(use.name), without_wrappers(use.here)}


def _is_like(use: LayerWeight, pattern: str) -> bool:
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in _spellings(use)
    )


def _nothing(what: str, choice: Any, model: nn.Module, uses: Sequence[LayerWeight]) -> str:
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
