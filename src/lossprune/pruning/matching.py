"""Masks meet networks by the names of their parameters, and whatever does not fit is told."""

import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, nn, strided
from torch.nn.parameter import is_lazy

from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import ADAPTED_LAYER, counted, did_you_mean, listed, look_up
from lossprune.pruning.wholeness import check_whole


def match(kept: Mapping[str, Tensor], model: nn.Module, *, sharded: bool = False) -> dict[str, str]:
    """Return what each parameter that the mask names is called in ``model``.

    That is the same name, but for what ``torch.compile``, data parallel and the like put before it.

    Raises:
        PruningError: the mask does not fit, every mismatch is listed; or what it names is not whole
            (see :func:`check_whole`), where ``sharded`` takes parts of weights too.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {name for name in look_up(kept, parameters).values() if name is not None}
    tensors = {name: tensor for name, tensor in parameters.items() if name in found}
    check_whole(model, tensors, sharded=sharded)
    names, faults = compared(kept, model)
    if faults:
        raise PruningError(f"the mask does not fit {type(model).__name__}: {'; '.join(faults)}")
    return names


def warn_of_adapters(names: Iterable[str], stacklevel: int) -> None:
    """Warn where parameters of these names are under adapters (PEFT), which a merge adds to them.

    Args:
        names: in the network.
        stacklevel: as in :func:`warnings.warn`, of the caller.
    """
    adapted = [name for name in names if ADAPTED_LAYER in name.split(".")]
    if adapted:
        warnings.warn(
            f"{counted(len(adapted), 'masked layer has', 'masked layers have')} adapters, and "
            "merging them (merge_and_unload) fills removed weights again: call "
            "mask.apply_(network) after that",
            stacklevel=stacklevel + 1,
        )


def made_of(name: str) -> tuple[str, str]:
    """Return what a parameter is computed from: in torch's pruning, and parametrised.

    >>> made_of("fc.weight")
    ('fc.weight_orig', 'fc.parametrizations.weight.original')
    """
    path, dot, own = name.rpartition(".")
    return f"{path}{dot}{own}_orig", f"{path}{dot}parametrizations.{own}.original"


def compared(kept: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, str], list[str]]:
    """Return names as :func:`match` does where the mask fits, and a clause for each misfit."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names, faults = {}, []
    for name, found in look_up(kept, parameters).items():
        if found is None:
            lacking = f"it names {name!r}, which {type(model).__name__} lacks"
            faults.append(lacking + _instead(name, parameters))
        elif is_lazy(parameters[found]):
            faults.append(f"{found!r} is not initialised yet there")
        elif parameters[found].layout != strided:
            layout = parameters[found].layout
            faults.append(f"{found!r} is not dense there ({layout}): apply the mask before that")
        elif parameters[found].shape != kept[name].shape:
            faults.append(
                f"its {name!r} has shape {tuple(kept[name].shape)}, "
                f"the parameter {tuple(parameters[found].shape)}"
            )
        else:
            names[name] = found
    return names, faults


def _instead(name: str, parameters: Iterable[str]) -> str:
    """What the network has instead of a parameter of this name."""
    for original in made_of(name):
        if original in parameters:
            return (
                f" (there it is computed from {original!r}; lossprune.pruning.remove_masks_ makes "
                "masks of torch's pruning and parametrisations permanent)"
            )
    longer = [key for key in parameters if key.endswith(f".{name}") or name.endswith(f".{key}")]
    if len(longer) > 1 or (longer and not did_you_mean(name, longer)):
        return f" (it has {listed(map(repr, longer), 2)})"
    return did_you_mean(name, parameters)
