"""What another's network or loss raises on a batch, in one sentence."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lossprune.pruning.curvature.forms import LABELS
from lossprune.pruning.errors import PruningError

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
