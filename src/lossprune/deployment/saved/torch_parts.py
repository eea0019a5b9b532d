"""Parts of a network that torch computes, as lists of operations that a file may ask for.

A graph of ``torch.fx`` is Python code with names of its own in it; what is read from a file is
never made code, but gone through step by step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lossprune.channels.nodes import changed
from lossprune.deployment.saved.known import FUNCTIONS, METHODS, MODULES, NAMES
from lossprune.deployment.saved.values import leaves, tree
from lossprune.deployment.sparse.parts import ValueName

_OF_ANY = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class SavedStep:
    """``target`` ← an operation of values by name.

    Attributes:
        target: the value that it makes.
        kind: "function", "method", "module" or "tensor".
        operation: its name, or the number of the module or tensor.
        inputs, named: what it is called with.
    """

    target: str
    kind: str
    operation: str
    inputs: Any
    named: Any


@dataclass(frozen=True)
class SavedModule:
    """A module of torch's: its class, its plain attributes, and which tensors it has or lacks."""

    name: str
    attributes: Any
    parameters: Mapping[str, bool]
    buffers: Mapping[str, bool]


@dataclass(frozen=True)
class SavedTorchPart:
    """What torch computes between sparse parts."""

    steps: tuple[SavedStep, ...]
    modules: tuple[SavedModule, ...]
    tensors: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class TorchPart(nn.Module):
    """A :class:`SavedTorchPart` with its modules and tensors."""

    def __init__(
        self, saved: SavedTorchPart, modules: Sequence[nn.Module], tensors: Sequence[Tensor]
    ) -> None:
        """Take what is computed, and with what."""
        super().__init__()
        self.saved = saved
        self.modules_used = nn.ModuleList(modules)
        for k, tensor in enumerate(tensors):
            self.register_buffer(f"tensor_{k}", tensor)
        self._calls = [
            (one, leaves(one.inputs, ValueName), leaves(one.named, ValueName))
            for one in saved.steps
        ]
        last = {name: one.target for one, *read in self._calls for name in _names(read)}
        kept = {*saved.outputs}
        self._done = {
            one.target: [n for n, user in last.items() if user == one.target and n not in kept]
            for one in saved.steps
        }

    def forward(self, *inputs: Any) -> Any:
        """Return the outputs, in order."""
        values: dict[str, Any] = dict(zip(self.saved.inputs, inputs, strict=True))
        for step, inputs_, named in self._calls:
            given, by_name = _resolved(inputs_, values), _resolved(named, values)
            if step.kind == "function":
                made = FUNCTIONS[step.operation](*given, **by_name)
            elif step.kind == "method":
                made = getattr(given[0], step.operation)(*given[1:], **by_name)
            elif step.kind == "module":
                made = self.modules_used[int(step.operation)](*given, **by_name)
            else:
                made = getattr(self, f"tensor_{step.operation}")
            values[step.target] = made
            for name in self._done[step.target]:
                del values[name]
        out = [values[name] for name in self.saved.outputs]
        return out[0] if len(out) == 1 else tuple(out)


def _names(value: Any) -> set[str]:
    """Return the names of values in a tree."""
    found: set[str] = set()

    def put(name: ValueName) -> None:
        found.add(name.name)

    _mapped(value, put)
    return found


def _resolved(value: Any, values: Mapping[str, Any]) -> Any:
    return _mapped(value, lambda name: values[name.name])


def _mapped(value: Any, put: Any) -> Any:
    """Return a tree with ``put`` of each name in its place."""
    if isinstance(value, ValueName):
        return put(value)
    if isinstance(value, dict):
        return {key: _mapped(item, put) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, put) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, slice):
        return slice(*[_mapped(item, put) for item in (value.start, value.stop, value.step)])
    return value


def torch_part_of(
    part: fx.GraphModule | TorchPart, prefix: str
) -> tuple[SavedTorchPart, dict[str, Any]]:
    """Return a part and its arrays, whose names begin with ``prefix``.

    Raises:
        TypeError: a file cannot hold an operation; the message names it.
    """
    if isinstance(part, TorchPart):
        modules = list(part.modules_used)
        tensors = [part.get_buffer(f"tensor_{k}") for k in range(part.saved.tensors)]
        saved = part.saved
    else:
        saved, modules, tensors = _read(part)
    arrays = {f"{prefix}.tensor.{k}": tensor for k, tensor in enumerate(tensors)}
    for k, module in enumerate(modules):
        own = {**module._parameters, **module._buffers}
        arrays |= {f"{prefix}.{k}.{name}": one for name, one in own.items() if one is not None}
    return saved, {name: tensor.detach().contiguous().numpy() for name, tensor in arrays.items()}


def _read(part: fx.GraphModule) -> tuple[SavedTorchPart, list[nn.Module], list[Tensor]]:
    steps: list[SavedStep] = []
    modules: dict[str, nn.Module] = {}
    tensors: dict[str, Tensor] = {}
    outputs: list[str] = []
    for node in part.graph.nodes:
        target = str(node.target)
        match node.op:
            case "placeholder":
                continue
            case "output":
                (returned,) = node.args
                found = returned if isinstance(returned, tuple) else (returned,)
                outputs = [one.name for one in found]
                continue
            case "call_function" if node.target in NAMES:
                kind, operation = "function", NAMES[node.target]
            case "call_method" if target in METHODS:
                kind, operation = "method", target
            case "call_module" if _known(part.get_submodule(target)):
                modules.setdefault(target, part.get_submodule(target))
                kind, operation = "module", str(list(modules).index(target))
            case "get_attr":
                tensors.setdefault(target, _attribute(part, target))
                kind, operation = "tensor", str(list(tensors).index(target))
            case _:
                raise TypeError(_called(part, node))
        given = tree(tuple(node.args), _name), tree(dict(node.kwargs), _name)
        steps.append(SavedStep(node.name, kind, operation, *given))
    inputs = [node.name for node in part.graph.nodes if node.op == "placeholder"]
    saved = SavedTorchPart(
        tuple(steps), tuple(_described(module) for module in modules.values()), len(tensors),
        tuple(inputs), tuple(outputs),
    )  # fmt: skip
    return saved, list(modules.values()), list(tensors.values())


def _name(leaf: Any) -> str | None:
    return leaf.name if isinstance(leaf, fx.Node) else None


def _called(part: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{node.target!r} ({type(part.get_submodule(str(node.target))).__name__})"
    return f"{getattr(node.target, '__name__', node.target)!r}"


def _known(module: nn.Module) -> bool:
    known = MODULES.get(type(module).__name__) is type(module)
    return known and not module._modules and not changed(module)


def _attribute(part: fx.GraphModule, target: str) -> Tensor:
    value: Any = part
    for name in target.split("."):
        value = getattr(value, name)
    if not isinstance(value, Tensor):
        raise TypeError(f"{target!r} ({type(value).__name__})")
    return value


def _described(module: nn.Module) -> SavedModule:
    plain = {key: value for key, value in vars(module).items() if key not in _OF_ANY}
    return SavedModule(
        type(module).__name__,
        tree(plain),
        {name: tensor is not None for name, tensor in module._parameters.items()},
        {name: tensor is not None for name, tensor in module._buffers.items()},
    )


def torch_network_of(saved: SavedTorchPart, arrays: Mapping[str, Any], prefix: str) -> TorchPart:
    """Return the part that :func:`torch_part_of` was given.

    Raises:
        ValueError: it is of other operations, or contradicts itself.
    """
    known = set(saved.inputs)
    counts = {"module": len(saved.modules), "tensor": saved.tensors}
    for step in saved.steps:
        names = {"function": FUNCTIONS, "method": METHODS}.get(step.kind, ())
        count = counts.get(step.kind, 0)
        if step.operation not in names and step.operation not in map(str, range(count)):
            raise ValueError(f"{step.operation!r:.40} is no operation that is known here")
        given = leaves(step.inputs, ValueName), leaves(step.named, ValueName)
        shaped = isinstance(given[0], tuple) and isinstance(given[1], dict)
        if not shaped or (step.kind == "method" and not given[0]) or not _names(given) <= known:
            raise ValueError(f"{step.target!r:.40} reads what is not there")
        if step.target in known:
            raise ValueError(f"{step.target!r:.40} is made twice")
        known.add(step.target)
    if not saved.outputs or not known.issuperset(saved.outputs):
        raise ValueError("a part's outputs are not all computed")
    modules = [_module(one, arrays, f"{prefix}.{k}") for k, one in enumerate(saved.modules)]
    tensors = [_tensor(arrays, f"{prefix}.tensor.{k}") for k in range(saved.tensors)]
    return TorchPart(saved, modules, tensors).requires_grad_(False).eval()


def _module(saved: SavedModule, arrays: Mapping[str, Any], prefix: str) -> nn.Module:
    attributes = leaves(saved.attributes)
    names = {*saved.parameters, *saved.buffers}
    if saved.name not in MODULES or not isinstance(attributes, dict):
        raise ValueError(f"{saved.name!r:.40} is no module that is known here")
    kind = MODULES[saved.name]
    own = [*attributes, *names]
    if any(name in _OF_ANY or hasattr(nn.Module, name) or not name.isidentifier() for name in own):
        raise ValueError(f"a {saved.name} has attributes of another kind")
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    vars(module).update(attributes)
    for name, there in saved.parameters.items():
        tensor = _tensor(arrays, f"{prefix}.{name}") if there else None
        floating = tensor is None or tensor.is_floating_point()
        if not floating:
            raise ValueError(f"{name} of a {saved.name} are whole numbers")
        made = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        module.register_parameter(name, made)
    for name, there in saved.buffers.items():
        module.register_buffer(name, _tensor(arrays, f"{prefix}.{name}") if there else None)
    return module.eval()


def _tensor(arrays: Mapping[str, Any], name: str) -> Tensor:
    if name not in arrays:
        raise ValueError(f"it lacks the numbers {name!r:.60}")
    return torch.from_numpy(arrays[name].copy())
