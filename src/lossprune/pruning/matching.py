"""Masks meet networks by the names of their parameters, and whatever does not fit is told."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import did_you_mean, look_up


def match(kept: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Return what each parameter that the mask names is called in ``model``.

    That is the same name, but for what ``torch.compile``, data parallel and the like put before it.

    Raises:
        PruningError: the mask does not fit; every mismatch is listed.
    """
    names, faults = _compared(kept, model)
    if faults:
        raise PruningError(f"the mask does not fit {type(model).__name__}: {'; '.join(faults)}")
    return names


def mismatches(kept: Mapping[str, Tensor], model: nn.Module) -> tuple[str, ...]:
    """Return every way in which the mask does not fit ``model``, one clause each."""
    return tuple(_compared(kept, model)[1])


def _compared(kept: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, str], list[str]]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names, faults = {}, []
    for name, found in look_up(kept, parameters).items():
        if found is None:
            lacking = f"it names {name!r}, which {type(model).__name__} lacks"
            faults.append(lacking + _instead(name, parameters))
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
    path, dot, own = name.rpartition(".")
    for made_of in (f"{path}{dot}{own}_orig", f"{path}{dot}parametrizations.{own}.original"):
        if made_of in parameters:
            return (
                f" (there it is computed from {made_of!r}; lossprune.pruning.remove_masks_ makes "
                "masks of torch's pruning and parametrisations permanent)"
            )
    return did_you_mean(name, parameters)
