"""The network itself, out of what data parallel training and compilers put around it."""

import copy

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

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
    if any(_compiled(module) for module in model.modules()):
        tensors = (*model.parameters(), *model.buffers())
        shared: dict[int, object] = {id(tensor): tensor for tensor in tensors}
        for module in reversed(list(model.modules())):
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


def _compiled(module: nn.Module) -> bool:
    return _inside(module) is not None or module._compiled_call_impl is not None
