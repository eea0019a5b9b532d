"""The network itself, out of its wrappers, and whether its tensors are here: whole, with values."""

import copy
from collections.abc import Mapping
from itertools import chain

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import listed

_SHARDED = "sharded (DTensor)"
# What a tensor may be instead, and what to do about it.
_ADVICE = {
    "not initialised yet": "run the network once on a batch first",
    _SHARDED: ("prune before fully_shard; Mask.apply_ and Mask.enforce take the sharded network"),
    "offloaded": (
        "load the network whole, or call accelerate.hooks.remove_hook_from_submodules, first"
    ),
    "on the meta device, without values": "load the network's values first",
}


def check_whole(
    model: nn.Module | Mapping[str, Tensor],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    offloaded: bool = False,
    sharded: bool = False,
) -> None:
    """Raise unless these tensors of ``model`` have their values in memory, all of them.

    Args:
        model: a network, which is not changed; or the state dict of one.
        tensors: those of it that are needed, by name; all its parameters and buffers if not given.
        offloaded: whether offloaded ones will do, as they do where the network is only run.
        sharded: whether parts of them will do.

    Raises:
        PruningError: some are not initialised yet (lazy layers), sharded (``fully_shard``),
            offloaded (accelerate) or on the meta device; the message names them.

    >>> check_whole(nn.Linear(2, 2, device="meta"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    lossprune.pruning.errors.PruningError: Linear has 'weight', 'bias' on the meta device, ...
    """
    if isinstance(model, nn.Module):
        owner = type(model).__name__
        everything = chain(model.named_parameters(), model.named_buffers())
        offloads = any(hasattr(module, "_hf_hook") for module in model.modules())
    else:
        owner, everything, offloads = "the state dict", model.items(), False
    does = {"offloaded": offloaded, _SHARDED: sharded}
    found: dict[str, list[str]] = {}
    for name, tensor in everything if tensors is None else tensors.items():
        state = _state(tensor, offloads)
        if state is not None and not does.get(state, False):
            found.setdefault(state, []).append(name)
    for state, names in found.items():
        raise PruningError(f"{owner} has {listed(map(repr, names), 3)} {state}: {_ADVICE[state]}")


def _state(tensor: Tensor, offloads: bool) -> str | None:
    """What the tensor is instead of whole, if anything."""
    if is_lazy(tensor):
        return "not initialised yet"
    if hasattr(tensor, "placements"):
        return _SHARDED
    if tensor.is_meta:
        return "offloaded" if offloads else "on the meta device, without values"
    return None


_COMPILED = "_orig_mod"  # where torch.compile keeps the module that it compiles


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network itself; a copy that shares its tensors where parts of it are compiled.

    Its parameters have the names that they have without wrappers.

    >>> network = nn.Linear(3, 2)
    >>> unwrapped(nn.DataParallel(network)) is network
    True
    """
    while (inner := _inside(model)) is not None:
        model = inner
    modules = list(model.modules())
    if any(_inside(m) is not None or m._compiled_call_impl is not None for m in modules):
        tensors = (*model.parameters(), *model.buffers())
        shared: dict[int, object] = {id(tensor): tensor for tensor in tensors}
        for module in reversed(modules):
            inner = _inside(module)
            if inner is not None:
                shared[id(module)] = copy.deepcopy(inner, shared)
        model = copy.deepcopy(model, shared)
        for module in model.modules():
            module._compiled_call_impl = None  # of a module that was compiled in place
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper is around; None: it is none."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        return module.module
    return module._modules.get(_COMPILED)
