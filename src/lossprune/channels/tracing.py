"""The graph of a network's operations, and what in it must be left alone."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lossprune.channels.nodes import changed, in_place, may_be_view
from lossprune.channels.stand_in import UnfollowedError, follow
from lossprune.pruning.names import listed

_CONSTANT = "_tensor_constant"  # so torch.fx calls the tensors that a network's code makes


class UntraceableError(Exception):
    """The operations of a network cannot be known without running it; the message says why."""


@dataclass(frozen=True)
class Trace:
    """The operations of a network, and the tensors that its code makes anew, by name."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]

    def same(self, other: "Trace") -> bool:
        """Whether the other network does the same with other weights."""
        texts = [trace.graph.python_code("self").src for trace in (self, other)]
        return (
            texts[0] == texts[1]
            and self.constants.keys() == other.constants.keys()
            and all(_equal(one, other.constants[name]) for name, one in self.constants.items())
        )

    def module(self, model: nn.Module) -> fx.GraphModule:
        """Return a module that computes this, with the layers of ``model``."""
        root = apart(model)
        for name, tensor in self.constants.items():
            setattr(root, name, tensor)
        return fx.GraphModule(root, self.graph)


def trace(model: nn.Module, fixed: Mapping[str, Any]) -> Trace:
    """Return the operations of ``model`` as it is, called with the arguments ``fixed`` as given.

    The other arguments are tensors. Nothing is computed, and ``model`` is left as it is.  A module
    inside that cannot be traced becomes one operation as a whole.

    Raises:
        UntraceableError: the network's own ``forward`` depends on values that only inputs have, or
            does not do the same every time.
    """
    root, whole = apart(model), frozenset[nn.Module]()
    what = f"the code of {type(model).__name__} could not be followed"
    parts = frozenset(part for part in root.modules() if part is not root)
    if "forward" in vars(root):
        raise UntraceableError(f"{what} (its forward method was replaced)")
    while True:
        try:
            with torch.random.fork_rng(devices=[]):
                with torch.enable_grad():
                    first = _trace_once(root, whole, fixed)
                with torch.inference_mode():
                    second = _trace_once(root, whole, fixed)
            break
        except UnfollowedError as error:
            if error.culprit not in parts - whole:
                raise UntraceableError(f"{what} ({error})") from error.__cause__
            whole |= parts & {error.culprit}
    if not first.same(second):
        raise UntraceableError(f"{what} (it does not do the same every time)")
    return first


def apart(model: nn.Module) -> nn.Module:
    """Return a copy that shares the parameters, for code that may leave something in its module."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _trace_once(root: nn.Module, whole: frozenset[nn.Module], fixed: Mapping[str, Any]) -> Trace:
    before, made = _state(root), dict[str, Tensor]()
    own = {
        name: copy.copy(value) if isinstance(value, list | dict) else value
        for name, value in fixed.items()
    }
    try:
        graph = follow(root, whole, own)
    finally:
        for name in [name for name in vars(root) if name.startswith(_CONSTANT)]:
            made[name] = vars(root).pop(name)
    changed = [name for name, value in _state(root).items() if not _equal(value, before.get(name))]
    if changed:
        raise UnfollowedError(f"its code changes {listed(map(repr, changed))} at every call", None)
    return Trace(graph, made)


def _state(root: nn.Module) -> dict[str, Any]:
    """The numbers and buffers that the code of a network may change and come back to."""
    found: dict[str, Any] = {name: buffer.clone() for name, buffer in root.named_buffers()}
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, int | float | str):
                found[f"{path}.{name}".lstrip(".")] = value
    return found


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return type(one) is type(other) and one == other
    if not isinstance(other, Tensor) or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one, other) or (
        one.is_floating_point() and torch.equal(one.nan_to_num(), other.nan_to_num())
    )


def _own_tensors(module: nn.Module) -> list[Tensor]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def untouchable(model: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """Return why a module that the graph calls must keep its size, by the module's name."""
    owners = Counter(id(tensor) for module in model.modules() for tensor in _own_tensors(module))
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    called = [model.get_submodule(name) for name in calls]
    inside = {id(part) for module in called for part in module.modules() if part is not module}
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    reasons = {}
    for name, count in calls.items():
        module = model.get_submodule(name)
        tensors = _own_tensors(module)
        if not tensors:
            continue
        if count > 1:
            reasons[name] = f"the network uses it {count} times"
        elif id(module) in inside:
            reasons[name] = "it is also part of a module that is not followed"
        elif any(owners[id(tensor)] > 1 for tensor in tensors):
            reasons[name] = "it shares a parameter with another layer"
        elif name in read:
            reasons[name] = "the network also uses its parameters outside of it"
        elif reason := changed(module):
            reasons[name] = reason
    return reasons


def overwritten(model: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose output one operation changes in place and another uses as well."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if "out" in node.kwargs:
            found.update(node.all_input_nodes)
        source: Any = node
        while source.all_input_nodes and (in_place if source is node else may_be_view)(
            model, source
        ):
            source = source.all_input_nodes[0]
            if len(source.users) > 1:
                found.add(source)
                break
    return found
