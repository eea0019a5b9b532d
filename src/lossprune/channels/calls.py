"""How a network is called, with which arguments, and whether two calls give the same.

Code such as ``if mask is None`` does one thing where an argument is left out and another where it
is a tensor, and a graph holds one of the two.  What the arguments that are no tensors are, by name,
are the *fixed* arguments of a call here.
"""

import dis
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from lossprune.pruning.errors import PruningError
from lossprune.torch_state import seeded

Fixed = dict[str, Any]

_Kind = inspect.Parameter
# What ``torch.fx`` puts before the names of arguments that stand for several.
_MARKS = {_Kind.VAR_POSITIONAL: "*", _Kind.VAR_KEYWORD: "**"}
_NOTHING = {_Kind.VAR_POSITIONAL: (), _Kind.VAR_KEYWORD: {}}
_TENSOR = object()  # whatever tensor it may be
_MOST = 4  # arguments that may be there or not: 2⁴ = 16 graphs


class TooManyCallsError(Exception):
    """There are too many ways to call a network to look at each of them; the message says so."""


@dataclass(frozen=True)
class Call:
    """The arguments that a network is called with."""

    inputs: tuple[Any, ...]
    named: Mapping[str, Any]

    @classmethod
    def of(cls, example: Any) -> "Call":
        """Return the call that ``example`` stands for: a batch, a tuple or a mapping."""
        if isinstance(example, Mapping):
            return cls((), dict(example))
        return cls(example if isinstance(example, tuple) else (example,), {})

    def __call__(self, network: nn.Module) -> Any:
        """Return what the network gives for copies, whatever random numbers were drawn before."""
        own = self.copied()
        with seeded(0):
            return network(*own.inputs, **own.named)

    @property
    def example(self) -> Any:
        """The arguments in a tuple, or by name where all have theirs."""
        return dict(self.named) if self.named else self.inputs

    @property
    def on_gpu(self) -> bool:
        """Whether a tensor among the arguments is on a GPU."""
        leaves = tree_leaves((self.inputs, dict(self.named)))
        return any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves)

    def copied(self) -> "Call":
        """Return the same call of copies of the tensors."""
        return Call(*tree_map_only(Tensor, torch.clone, (self.inputs, dict(self.named))))


def fixed_by(example: Any, model: nn.Module) -> Fixed:
    """Return the fixed arguments of ``model`` where it is called with ``example``.

    Raises:
        PruningError: ``example`` is not what it takes.
    """
    return _without_tensors({name: usual for name, (usual, _) in _usual(model, example).items()})


def usual_fixed(model: nn.Module, example: Any = None) -> Fixed:
    """Return the first of :func:`possible_fixed`."""
    return _without_tensors({name: values[0] for name, values in _choices(model, example).items()})


def possible_fixed(model: nn.Module, example: Any = None) -> list[Fixed]:
    """Return the ways to fix arguments of ``model``; first as in ``example``, or by default.

    Numbers and strings count as tensors.  What may be None, or True or False, is so in some ways
    and not in others; the first argument is a tensor in all.

    Raises:
        PruningError: ``example`` is not what the network takes.
        TooManyCallsError: there are more than sixteen.
    """
    choices = _choices(model, example)
    optional = sum(len(values) > 1 for values in choices.values())
    if optional > _MOST:
        raise TooManyCallsError(
            f"what it computes may depend on which of {optional} optional arguments it gets"
        )
    ways = product(*choices.values())
    return [_without_tensors(dict(zip(choices, way, strict=True))) for way in ways]


def differing(one: Fixed, other: Fixed) -> list[str]:
    """Return the names of the arguments that are not the same in two calls."""
    return [
        name
        for name in dict.fromkeys((*one, *other))
        if one.get(name, _TENSOR) is not other.get(name, _TENSOR)
    ]


def _without_tensors(values: Mapping[str, Any]) -> Fixed:
    return {name: value for name, value in values.items() if value is not _TENSOR}


def _choices(model: nn.Module, example: Any) -> dict[str, list[Any]]:
    """What each argument may be, the usual first, by the name that ``torch.fx`` gives it."""
    asked = any(_asks_for_none(type(module).forward) for module in model.modules())
    choices: dict[str, list[Any]] = {}
    for name, (usual, default) in _usual(model, example).items():
        if not choices:
            values = [_TENSOR]
        elif isinstance(usual, bool) or isinstance(default, bool):
            values = [usual, not usual] if isinstance(usual, bool) else [usual, True, False]
        elif isinstance(usual, int | float | complex | str):
            values = [_TENSOR, None] if asked else [_TENSOR]
        elif usual is not _TENSOR:
            values = [usual, _TENSOR]
        elif default is _TENSOR or isinstance(default, int | float | complex | str):
            values = [_TENSOR, None] if asked else [_TENSOR]
        else:
            values = [_TENSOR, default]
        choices[name] = values
    return choices


def _usual(model: nn.Module, example: Any) -> dict[str, tuple[Any, Any]]:
    """What each argument is in ``example``, and its default: itself, or that it is a tensor."""
    signature = inspect.signature(type(model).forward)
    given: Mapping[str, Any] = {}
    if example is not None:
        call = Call.of(example)
        try:
            given = signature.bind(model, *call.inputs, **call.named).arguments
        except TypeError as error:
            raise PruningError(
                f"example does not fit what {type(model).__name__} takes: {error}"
            ) from None
    found = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        default: Any = _NOTHING.get(parameter.kind, parameter.default)
        default = _TENSOR if default is parameter.empty else default
        usual = given.get(name, default)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(usual)):
            usual = _TENSOR
        found[_MARKS.get(parameter.kind, "") + name] = usual, default
    return found


def _asks_for_none(forward: Any) -> bool:
    """Whether the code asks if an argument is None."""
    code = getattr(forward, "__code__", None)
    if code is None:
        return False
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    steps = list(dis.get_instructions(code))
    return any(
        step.opname == "LOAD_FAST"
        and step.argval in arguments
        and (after.opname.endswith("NONE") or (after.opname, after.argval) == ("LOAD_CONST", None))
        for step, after in pairwise(steps)
    )


def same_outputs(outputs: Any, expected: Any) -> bool:
    """Whether ``outputs`` are ``expected``, in the same containers; tensors to rounding.

    That is √ε of the largest finite number, ε being that of the type: 3·10⁻⁴ in single and
    1.5·10⁻⁸ in double precision.
    """
    found, structure = tree_flatten(outputs)
    wanted, like = tree_flatten(expected)
    return structure == like and all(map(_same, found, wanted))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _close(one, other)
    if type(one) is not type(other):
        return False
    if is_dataclass(one) and not isinstance(one, type):
        return same_outputs(vars(one), vars(other))
    # Objects of other classes, such as caches, hold what cannot be compared in general.
    return one == other if isinstance(one, int | float | complex | str) else True


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (other.is_floating_point() or other.is_complex()):
        return torch.equal(one, other)
    finite = other[other.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    tolerance = math.sqrt(torch.finfo(other.dtype).eps)
    return torch.allclose(one, other, rtol=0, atol=tolerance * largest, equal_nan=True)
