"""Activations are kept for the backward passes, also where the network would compute them anew."""

from typing import Any

from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks as _hooks
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lossprune.pruning.errors import PruningError

CHECKPOINTED = (
    "the network computes activations again in the backward pass (activation checkpointing) in a "
    "way that cannot be measured: give torch.utils.checkpoint use_reentrant=False, or switch it "
    "off while the network is measured"
)


class Saving(TorchFunctionMode):
    """While entered, what hooks the network itself puts around saving have no part in it.

    Activation checkpointing (``use_reentrant=False``) is such hooks.  It would compute the
    activations again in the first backward pass, when the weights that were put in are gone from
    the network, and for that pass alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._outside = _hooks(False)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _hooks(False) == self._outside:
            return func(*args, **(kwargs or {}))
        pack, unpack = self._outside or (_keep, _kept)
        with saved_tensors_hooks(pack, unpack):
            return func(*args, **(kwargs or {}))


def _keep(tensor: Tensor) -> tuple[Tensor, int]:
    # Detached, as a node that saves its own output would otherwise keep itself for ever.
    return tensor.detach(), tensor._version


def _kept(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:  # which torch checks only where there are no hooks
        raise PruningError(CHECKPOINTED)
    return tensor
