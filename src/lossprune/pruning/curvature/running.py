"""Running another's network as it is written; what it or its loss raises is one sentence."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks as _hooks
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError

from lossprune.pruning.curvature.forms import LABELS
from lossprune.pruning.errors import PruningError
from lossprune.torch_state import in_full_float32, in_mode

T = TypeVar("T")

# What torch, and code that is given what it did not expect, raises.
_RAISED = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
_MOST = 200  # characters of another's message


def run(what: str, function: Callable[[], T], advice: Callable[[str], str]) -> T:
    """Return what the function returns.

    Args:
        what: what cannot be done if it raises, such as ``"the network could not be run"``.
        function: another's code.
        advice: what to write instead, for the message that was raised.

    Raises:
        PruningError: it raised what torch raises of types and shapes, which is the cause.
    """
    try:
        return function()
    except (PruningError, torch.OutOfMemoryError):
        raise
    except _RAISED as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= _MOST else f"{text[:_MOST]}…"
        raise PruningError(f"{what}: {type(error).__name__}: {text} ({advice(text)})") from error


def described(batch: Any) -> str:
    """Return shapes and types of what a batch is made of."""
    if isinstance(batch, dict):
        return ", ".join(f"{name} {_kind(part)}" for name, part in [*batch.items()][:4])
    if isinstance(batch, (tuple, list)) and len(batch) <= 4:
        return ", ".join(map(_kind, batch))
    return _kind(batch)


def advice_on_inputs(batch: Any, weights: Iterable[Tensor], text: str) -> str:
    """Return what to do about a pair or dict that a network of such weights raised on.

    Nothing is ever converted unasked: bytes are to be normalised as in training, and whether
    numbers may lose digits only their owner knows.
    """
    parts = [v for k, v in batch.items() if k != LABELS] if isinstance(batch, dict) else batch[0]
    given = {leaf.dtype for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)}
    own = {weight.dtype for weight in weights}
    # torch's words: "same dtype", "Input type", "scalar type", "not implemented for 'Byte'".
    if len(own) == 1 and given and not given <= own and ("type" in text or "implemented" in text):
        dtype = own.pop()
        if torch.uint8 in given:
            return f"normalise the inputs as in training, such as inputs.to({dtype}) / 255"
        return f"the network is of {dtype}: give inputs.to({dtype}), or the network in their type"
    if isinstance(batch, dict):
        return "called with all but the labels by name; forward= says how else"
    return "called as forward=lambda model, batch: (model(batch[0]), batch[1]), which says how else"


def _kind(part: Any) -> str:
    if isinstance(part, Tensor):
        return f"{tuple(part.shape)} {str(part.dtype).removeprefix('torch.')}"
    return type(part).__name__


_CHECKPOINTED = (
    "the network computes activations again in the backward pass (activation checkpointing) in a "
    "way that cannot be measured: give torch.utils.checkpoint use_reentrant=False, or switch it "
    "off while the network is measured"
)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on, everything put back afterwards, also on an error."""
    with ExitStack() as stack:
        stack.enter_context(in_mode(model, training=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_running_plainly(model))
        # TF32 would cost three digits of the curvature, and masks that agree with the CPU.
        stack.enter_context(in_full_float32())
        try:
            yield
        except RuntimeError as error:
            # Of checkpointing that goes about it by autograd functions of its own.
            if "use_reentrant" in str(error) or isinstance(error, CheckpointError):
                raise PruningError(_CHECKPOINTED) from error
            raise


@contextmanager
def _running_plainly(model: nn.Module) -> Iterator[None]:
    """Let what is compiled run as it was written, and data parallel call the network in it.

    A compiled network computes with graphs of its own weights, and data parallel runs copies on
    other devices, or keeps the processes in step, which measure different numbers of times.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes long to import
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            if isinstance(module, (DataParallel, DistributedDataParallel)):
                attributes = vars(module)
                if "forward" in attributes:
                    stack.callback(attributes.update, forward=attributes["forward"])
                else:
                    stack.callback(attributes.pop, "forward")
                attributes["forward"] = partial(_inside, module)
        yield


def _inside(wrapper: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return wrapper.get_submodule("module")(*args, **kwargs)


@contextmanager
def outside_inference() -> Iterator[None]:
    """Leave ``torch.inference_mode`` for a while, whose tensors can have no gradient."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def ordinary(tensor: Tensor) -> Tensor:
    """Return the tensor, of one made in inference mode a copy: no backward pass can save that."""
    return tensor.clone() if tensor.is_inference() else tensor


class Saving(TorchFunctionMode):
    """While entered, activations are kept, also where the network would compute them anew.

    Activation checkpointing (``use_reentrant=False``) is hooks that the network itself puts around
    saving.  It would compute the activations again in the first backward pass, when the weights
    that were put in are gone from the network, and for that pass alone.  Here such hooks have no
    part in what is saved.
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
        raise PruningError(_CHECKPOINTED)
    return tensor
