"""The graph of a network's operations, and what in it must be left alone."""

from collections import Counter
from operator import iadd, imul, isub
from typing import Any

from torch import fx, nn

from lossprune.deployment.vocabulary import FRESH_NAMES

_IN_PLACE = (iadd, isub, imul)


class UntraceableError(Exception):
    """The operations of a network cannot be known without running it; the message says why."""


class _Tracer(fx.Tracer):
    """Takes modules that it is told of as single operations, beside those of torch itself."""

    def __init__(self, whole: frozenset[nn.Module]) -> None:
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.whole or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """Return the operations of ``model`` as it is, without running it.

    A module inside that cannot be traced becomes one operation as a whole.

    Raises:
        UntraceableError: the network's own ``forward`` depends on values that only inputs have.
    """
    try:
        return _Tracer(frozenset()).trace(model)
    except Exception as error:  # whatever the network's own code raises on a stand-in for a tensor
        whole = frozenset(
            child for child in model.modules() if child is not model and not _traceable(child)
        )
        first = error
    try:
        if whole:
            return _Tracer(whole).trace(model)
    except Exception as error:
        first = error
    said = " ".join(str(first).split()) or type(first).__name__
    raise UntraceableError(f"the network cannot be traced: {said}") from first


def _traceable(module: nn.Module) -> bool:
    if type(module).forward in (nn.ModuleList.forward, nn.ModuleDict.forward):
        return True  # a container, whose contents are asked one by one
    try:
        _Tracer(frozenset()).trace(module)
    except Exception:
        return False
    return True


def code(graph: fx.Graph) -> str:
    """Return the graph as text: equal for networks that do the same with other weights."""
    return graph.python_code("self").src


def untouchable(model: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """Return why a module that the graph calls must keep its size, by the module's name."""
    owners = Counter(
        id(tensor)
        for _, module in model.named_modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    reasons = {}
    for name, count in calls.items():
        module = model.get_submodule(name)
        tensors = [
            tensor
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        if not tensors:
            continue
        if count > 1:
            reasons[name] = f"the network uses it {count} times"
        elif any(owners[id(tensor)] > 1 for tensor in tensors):
            reasons[name] = "it shares a parameter with another layer"
        elif name in read:
            reasons[name] = "the network also uses its parameters outside of it"
        elif module._forward_hooks or module._forward_pre_hooks:
            reasons[name] = "it has hooks"
    return reasons


def overwritten(model: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose output one operation changes in place and another uses as well."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if "out" in node.kwargs:
            found.update(node.all_input_nodes)
        source: Any = node
        while source.all_input_nodes and (_in_place if source is node else _may_be_view)(
            model, source
        ):
            source = source.all_input_nodes[0]
            if len(source.users) > 1:
                found.add(source)
                break
    return found


def _in_place(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        # What could not be traced may do anything with its input.
        return not _of_torch(module) or bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    # A True after the tensor, as in F.relu(x, True), may be the flag; taking it for one is safe.
    flagged = node.kwargs.get("inplace") is True or any(flag is True for flag in node.args[1:])
    return node.op == "call_function" and (
        node.target in _IN_PLACE or name.endswith("_") or flagged
    )


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _may_be_view(model: nn.Module, node: fx.Node) -> bool:
    """Whether the output may share memory with an input, as views do."""
    if _in_place(model, node):
        return True
    if node.op == "call_module":
        kind = type(model.get_submodule(str(node.target))).__name__
        return kind in ("Identity", "Flatten", "Unflatten") or "Dropout" in kind
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name not in FRESH_NAMES and "pool" not in str(name)
