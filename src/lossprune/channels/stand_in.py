"""A tracer that takes no branch in silence.

``torch.fx`` runs a network's code on stand-ins for tensors.  A stand-in is not None, is no tensor
and has every attribute, so code that asks for these things takes a branch that it would not take on
a tensor, and the graph is that of another network.  Here whatever asks is refused instead.
"""

import dis
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute, TraceError

from lossprune.channels.nodes import is_shape

# Of a tensor in use these are mostly None, and of a stand-in never.
_MOSTLY_NONE = frozenset({"grad", "grad_fn", "_base", "_grad"})
# These are single objects, which code may tell apart by ``is``.
_SINGLE = frozenset({"dtype", "device", "layout"})
_OPEN = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
# Torch's own code may ask for types where it knows what a stand-in is.
_KNOWING = ("torch.fx.", "torch.utils._pytree", "torch.overrides")


_LONGEST = 120  # characters of an error that it raised


class UnfollowedError(Exception):
    """A network's code cannot be followed; the message says why.

    Attributes:
        culprit: the innermost module inside whose code it is; None: it is the network's own.
    """

    def __init__(self, reason: str, culprit: nn.Module | None) -> None:
        """Take why, and whose code."""
        super().__init__(reason)
        self.culprit = culprit


def follow(root: nn.Module, whole: frozenset[nn.Module], fixed: Mapping[str, Any]) -> fx.Graph:
    """Return the operations of ``root``, which may be left with other attributes.

    Args:
        root: the network.
        whole: modules inside that are taken as one operation, beside those of torch itself.
        fixed: values of arguments, by name; the other arguments are stand-ins.

    Raises:
        UnfollowedError: its code does what it may do otherwise on tensors, or fails.
    """
    tracer = _Tracer(whole, fixed)
    try:
        graph = tracer.trace(root)
    except Exception as error:  # whatever the network's own code raises on a stand-in
        said = tracer.refusal or _short(error)
        raise UnfollowedError(said, tracer.culprit) from error
    if tracer.refusal is not None:  # the network's code took the error for something else
        raise UnfollowedError(tracer.refusal, tracer.culprit)
    return graph


def _short(error: Exception) -> str:
    """Return the first sentence of an error, which may go on about what to do with torch.fx."""
    first = " ".join(str(error).split()).split(". ")[0]
    kind = type(error).__name__
    return f"{kind}: {first if len(first) <= _LONGEST else first[:_LONGEST] + '…'}".rstrip(": ")


class _Tracer(fx.Tracer):
    """Notes in ``refusal`` what it refused, and in ``culprit`` the innermost module that failed."""

    def __init__(self, whole: frozenset[nn.Module], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.whole, self.fixed = whole, fixed
        self.refusal: str | None = None
        self.culprit: nn.Module | None = None
        self._inside: list[nn.Module] = []

    def refuse(self, reason: str) -> NoReturn:
        """Raise an error, and remember it should the network's code swallow it."""
        if self.refusal is None:
            self.refusal = reason
            self.culprit = self._inside[-1] if self._inside else None
        raise TraceError(reason)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.whole or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        plain = inspect.unwrap(root_fn)
        if plain is not root_fn and plain.__code__.co_flags & _OPEN:  # which torch.fx confuses
            self.refuse("its forward method has a decorator and takes any number of arguments")
        function, stand_ins = super().create_args_for_root(root_fn, is_module, concrete_args)
        arguments = []
        for given in stand_ins:
            if isinstance(given, fx.Proxy) and given.node.target in self.fixed:
                self.graph.erase_node(given.node)
                arguments.append(self.fixed[str(given.node.target)])
            else:
                arguments.append(given)
        self._check_types_of_arguments(self.root)
        return function, arguments

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, dict) and type(a) is not dict and all(isinstance(key, str) for key in a):
            # torch.fx would make a plain one of it, without the attributes that it may have.
            items = {key: self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", type(a), (), items)
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, *others: Any, **options: Any) -> Any:
        # A default that a graph cannot hold is none of a stand-in's.
        args = () if kind == "placeholder" else args
        return super().create_proxy(kind, target, args, *others, **options)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self._inside.append(m)
        try:
            if not self.is_leaf_module(m, self.path_of_module(m)):
                self._check_types_of_arguments(m)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.culprit = m if self.culprit is None else self.culprit
            raise
        finally:
            self._inside.pop()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("its code branches on the value of a tensor")

    def iter(self, obj: Any) -> Iterator[Any]:
        length = _unpacked(obj, sys._getframe(2))  # of who asks, behind torch.fx
        if length is None:
            self.refuse("its code goes through a tensor or through arguments one by one")
        return iter([obj[place] for place in range(length)])

    def keys(self, obj: fx.Proxy) -> fx.Proxy:
        self.refuse("its code passes on arguments by keyword that are not known")

    def _check_types_of_arguments(self, module: nn.Module) -> None:
        if _asks_for_a_type(getattr(type(module).forward, "__code__", None)):
            self.refuse("its code asks for the type of a tensor")


def _refusing(reason: str) -> Callable[..., Any]:
    def refuse(self: "_Guarded", *_: object) -> NoReturn:
        self.tracer.refuse(reason)

    return refuse


class _Guarded(fx.Proxy):
    """What stand-ins refuse."""

    tracer: _Tracer  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        # What ``isinstance`` reads of an object that is not of the type itself.
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(_KNOWING):
            self.tracer.refuse("its code asks for the type of a tensor")
        return type(self)

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__"):
            raise AttributeError(k)
        return _Attribute(self, k)

    def __len__(self) -> int:
        length = _unpacked(self, sys._getframe(1))
        if length is None:
            self.tracer.refuse("its code asks for the length of a tensor")
        return length

    __contains__ = _refusing("its code looks for something in a tensor or in arguments")
    __setitem__ = _refusing("its code writes into a tensor")
    __int__ = __float__ = __complex__ = __index__ = _refusing("it makes a number of a tensor")


class _StandIn(_Guarded):
    def __getattr__(self, k: str) -> Any:
        if not k.startswith("__"):
            if k in _MOSTLY_NONE or not hasattr(torch.Tensor, k):
                self.tracer.refuse(f"its code asks for the attribute {k!r} of a tensor")
            if k in _SINGLE and _compares_identity(sys._getframe(1)):
                self.tracer.refuse(f"its code may compare the {k} of a tensor by `is`")
        return super().__getattr__(k)


class _Attribute(_Guarded, Attribute):
    pass


def _unpacked(stand_in: fx.Proxy, frame: FrameType) -> int | None:
    """Return how many numbers ``*x.shape[:2]`` is, in a call or tuple; None of all else.

    A tensor of fewer dimensions has no such place, which is an error when the graph runs.
    """
    node = stand_in.node
    if node.target is not operator.getitem or not is_shape(node.args[0]):
        return None
    match node.args[1]:
        case slice(start=None | 0, stop=int(stop), step=None | 1) if stop >= 0:
            steps = dis.get_instructions(frame.f_code)
            now = next((step.opname for step in steps if step.offset == frame.f_lasti), "")
            return stop if now == "LIST_EXTEND" else None
    return None


def _asks_for_a_type(code: CodeType | None) -> bool:
    """Whether there is ``type(argument)``, for any argument but the module itself."""
    if code is None or "type" not in code.co_names:
        return False
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    read = [step for step in dis.get_instructions(code) if step.opname.startswith("LOAD_")]
    return any(
        step.opname == "LOAD_GLOBAL" and step.argval == "type" and after.argval in arguments
        for step, after in pairwise(read)
    )


def _compares_identity(frame: FrameType) -> bool:
    """Whether the code of ``frame`` has an ``is`` with another object than None."""
    steps = list(dis.get_instructions(frame.f_code))
    return any(
        step.opname == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None)
        for before, step in pairwise(steps)
    )
