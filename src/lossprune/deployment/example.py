"""What an example means: the arguments that a network is called with."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lossprune.pruning.errors import PruningError
from lossprune.torch_state import seeded


@dataclass(frozen=True)
class Call:
    """The arguments that a network is called with."""

    inputs: tuple[Any, ...]
    named: Mapping[str, Any]

    def __call__(self, network: nn.Module) -> Any:
        """Return what the network gives for copies, whatever random numbers were drawn before."""
        own = self.copied()
        with seeded(0):
            return network(*own.inputs, **own.named)

    @property
    def example(self) -> Any:
        """The same as one object: the arguments in a tuple, or by name where all have theirs."""
        return dict(self.named) if self.named else self.inputs

    @property
    def on_gpu(self) -> bool:
        """Whether a tensor among the arguments is on a GPU."""
        leaves = tree_leaves((self.inputs, dict(self.named)))
        return any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves)

    def copied(self) -> "Call":
        """Return the same call of copies of the tensors."""
        return Call(*tree_map_only(Tensor, torch.clone, (self.inputs, dict(self.named))))


def understood(masked: nn.Module, example: Any) -> tuple[Call, Any]:
    """Return the first reading of ``example`` that the network takes, and what it gives then.

    Raises:
        PruningError: it takes none of them.
    """
    first: Exception | None = None
    for call in _readings(masked, example):
        try:
            return call, call(masked)
        except Exception as error:  # whatever the network's own code raises
            first = first or error
    assert first is not None
    raise PruningError(f"{type(masked).__name__} does not run on example: {said(first)}") from first


def _readings(model: nn.Module, example: Any) -> list[Call]:
    """Return the calls that ``example`` may stand for, the likeliest first."""
    whole = Call((example,), {})
    if isinstance(example, Mapping):
        parameters = inspect.signature(type(model).forward).parameters
        named = Call((), dict(example))
        return [named, whole] if all(key in parameters for key in example) else [whole, named]
    if isinstance(example, (tuple, list)):
        return [Call(tuple(example), {}), whole]
    return [whole]


def said(error: Exception) -> str:
    """Return an error's message in one line, and its type where that tells more."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]}…"
    known = isinstance(error, PruningError) or type(error).__module__.startswith("lossprune.")
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")
