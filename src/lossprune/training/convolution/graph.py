"""A network's graph, rewritten so that its layers work on blocks of images.

Every value of the graph is kept as torch has it, as blocks, or both.  An operation that can work on
blocks does so where it finds them; all others find torch's values.  So what lies between two sparse
layers, in a network of convolutions, is never turned from one layout into the other.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lossprune.channels.nodes import Layer, changed, read_call, read_module
from lossprune.channels.operations import Flatten, Mean, Operation, Pointwise, Pooling, Sum
from lossprune.channels.tracing import Trace, UntraceableError
from lossprune.training.convolution.blocks import images_of, packed, unpacked
from lossprune.training.convolution.layers import BlockNorm1d, BlockNorm2d, SparseLayer
from lossprune.training.convolution.pools import adaptive_means, maxima, mean, means
from lossprune.training.convolution.sharing import SharedMemory

# Of these neither value nor slope is infinite anywhere, so that lanes without an image do no harm.
_SMOOTH = frozenset((
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "gelu_tanh", "silu", "mish",
    "tanh", "sigmoid", "logsigmoid", "softplus", "softsign", "hardtanh", "hardswish",
    "hardsigmoid", "contiguous",
))  # fmt: skip


@dataclass
class _Value:
    """A value of the graph in the layouts it has been needed in.

    Attributes:
        shape: of torch's tensor, for the example.
        plain: the node of torch's tensor.
        blocks: the node of the blocks.
        images: the node that counts the images of the blocks.
        producer: the layer whose call makes the blocks and can rectify them as well.
    """

    shape: torch.Size | None
    plain: fx.Node | None = None
    blocks: fx.Node | None = None
    images: fx.Node | None = None
    producer: fx.Node | None = None


@dataclass
class Rewritten:
    """A rewritten graph, and what in it is left to torch between layers that are not."""

    module: fx.GraphModule
    left: list[str] = field(default_factory=list)


class _Graph(fx.GraphModule):
    """A graph that is pickled as it is: torch's would be traced again, through our functions."""

    def __reduce__(self) -> tuple[Any, ...]:
        names = (str(n.target) for n in self.graph.nodes if n.op in ("call_module", "get_attr"))
        return _Graph, ({name: _attribute(self, name) for name in names}, copy.deepcopy(self.graph))


def rewritten(trace: Trace, network: nn.Module) -> Rewritten:
    """Return a network's graph over blocks of images, with the network's own modules.

    Args:
        trace: with the shapes of its values in the nodes, as ``ShapeProp`` leaves them.
        network: with its layers replaced.

    Raises:
        UntraceableError: the network changes in place what is kept in two layouts.
    """
    return _Rewriting(trace, network).done()


class _Rewriting:
    def __init__(self, trace: Trace, network: nn.Module) -> None:
        self._trace, self._old = trace, network
        self._new = fx.Graph()
        self._values: dict[fx.Node, _Value] = {}
        self._memory = SharedMemory(network)
        self._root: dict[str, nn.Module] = {}
        self._left: list[str] = []

    def done(self) -> Rewritten:
        for node in self._trace.graph.nodes:
            if node.op == "output":
                self._new.output(fx.map_arg(node.args[0], self._plain))
            else:
                self._values[node] = self._rewritten(node)
                self._memory.add(node)
        self._gate_once()
        root: dict[str, Any] = dict(self._root)
        for node in self._new.nodes:
            name = str(node.target)
            if node.op == "call_module" and name not in root:
                root[name] = self._old.get_submodule(name)
            elif node.op == "get_attr":
                root[name] = self._trace.constants.get(name, _attribute(self._old, name))
        return Rewritten(_Graph(root, self._new), self._left)

    def _gate_once(self) -> None:
        """Let the only reader of what a layer rectifies gate the gradient, where it can."""
        for node in self._new.nodes:
            if not node.kwargs.get("relu") or len(node.users) != 1:
                continue
            (reader,) = node.users
            if reader.target is maxima or reader.kwargs.get("blocks"):
                reader.kwargs = {**reader.kwargs, "rectified": True}
                node.kwargs = {**node.kwargs, "gated": True}

    # Layouts

    def _plain(self, node: fx.Node) -> fx.Node:
        value = self._values[node]
        if value.plain is None:
            flat = value.shape is not None and len(value.shape) == 2
            arguments = (value.blocks, value.images, flat)
            value.plain = self._new.call_function(unpacked, arguments)
        return value.plain

    def _blocks(self, node: fx.Node) -> _Value:
        value = self._values[node]
        if value.blocks is None:
            value.images = self._new.call_function(images_of, (value.plain,))
            value.blocks = self._new.call_function(packed, (value.plain, len(value.shape or ())))
        return value

    def _made(
        self, node: fx.Node, blocks: fx.Node, source: _Value, *, layer: bool = False
    ) -> _Value:
        return _Value(_shape(node), None, blocks, source.images, blocks if layer else None)

    # Operations

    def _rewritten(self, node: fx.Node) -> _Value:
        sources = node.all_input_nodes
        if node.op in ("call_module", "call_function", "call_method") and sources:
            if (found := self._layer(node)) is not None:
                return found
            if (found := self._between(node)) is not None:
                self._note_in_place(node, found)
                return found
        made = self._new.node_copy(node, self._plain)
        value = _Value(_shape(node), made)
        if any(self._values[source].blocks is not None for source in sources):
            self._left.append(str(node.target) if node.op != "call_function" else node.name)
        self._note_in_place(node, value)
        return value

    def _note_in_place(self, node: fx.Node, value: _Value) -> None:
        """Let all who read a value that is changed in place read what it is changed to."""
        source = self._memory.changed_by(node)
        if source is None:
            return
        old = self._values[source]
        others = [other for other in self._memory.others(source) if self._later(other, node)]
        if any(self._values[other].blocks is not None for other in others):
            raise UntraceableError(f"{node.name} changes in place what is read elsewhere")
        if value.blocks is None:  # torch has changed its tensor
            old.blocks, old.producer = None, None
        elif len(source.users) > 1:
            if old.plain is not None:
                raise UntraceableError(f"{node.name} changes in place what is read elsewhere")
            self._values[source] = value

    def _later(self, value: fx.Node, node: fx.Node) -> bool:
        """Whether a value is read after ``node``."""
        return any(user is not node and user not in self._values for user in value.users)

    def _layer(self, node: fx.Node) -> _Value | None:
        """A sparse layer, or a normalisation of what is blocks."""
        if node.op != "call_module" or len(node.all_input_nodes) != 1 or node.kwargs:
            return None
        module, (source,) = self._old.get_submodule(str(node.target)), node.all_input_nodes
        shape = self._values[source].shape
        flat = isinstance(module, BlockNorm1d) or (
            isinstance(module, SparseLayer) and module.linear
        )
        if shape is None or len(shape) != (2 if flat else 4):
            return None
        if isinstance(module, SparseLayer):
            value = self._blocks(source)
            made = self._new.call_module(str(node.target), (value.blocks,), {"blocks": True})
            return self._made(node, made, value, layer=True)
        value = self._values[source]
        if isinstance(module, BlockNorm1d | BlockNorm2d) and value.blocks is not None:
            made = self._new.call_module(str(node.target), (value.blocks, value.images))
            return self._made(node, made, value, layer=True)
        return None

    def _between(self, node: fx.Node) -> _Value | None:
        """What works on blocks, where its input is blocks."""
        values = [self._values[source] for source in node.all_input_nodes]
        if all(value.blocks is None for value in values):
            return None
        if any(value.shape is None or len(value.shape) not in (2, 4) for value in values):
            return None
        read = self._read(node)
        first = values[0]
        mapped = len(first.shape or ()) == 4
        made: _Value | None = None
        match read:
            case Pointwise(name="identity" | "contiguous"):
                alone = len(node.all_input_nodes[0].users) == 1
                made = replace(first, producer=first.producer if alone else None)
            case Pointwise(name=name) if name in _SMOOTH and len(values) == 1:
                made = self._pointwise(node, read, first)
            case Sum(sign=sign) if len(values) == 2 and values[0].shape == values[1].shape:
                one, other = (self._blocks(source).blocks for source in node.all_input_nodes)
                function = torch.add if sign == 1 else torch.sub
                made = self._made(node, self._call(function, one, other), first)
            case Flatten():
                made = self._flattened(node, first)
            case Pooling(dimensions=2) if mapped:
                made = self._pooling(node, read, first)
            case Mean(dimensions=dimensions) if mapped and {d % 4 for d in dimensions} == {2, 3}:
                made = self._made(node, self._call(mean, first.blocks), first)
            case _:
                pass
        return made

    def _read(self, node: fx.Node) -> Operation | Layer | None:
        """What a node computes, in training too."""
        if node.op != "call_module":
            return read_call(node)
        module = self._old.get_submodule(str(node.target))
        left = changed(module) or "Dropout" in type(module).__name__
        return None if left else read_module(module)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> fx.Node:
        return self._new.call_function(function, arguments)

    def _pointwise(self, node: fx.Node, read: Pointwise, source: _Value) -> _Value:
        producer = source.producer
        if read.name == "relu" and producer is not None and len(node.all_input_nodes[0].users) == 1:
            producer.kwargs = {**producer.kwargs, "relu": True}
            return self._made(node, producer, source)
        if node.op == "call_module":
            module = copy.deepcopy(self._old.get_submodule(str(node.target)))
            if hasattr(module, "inplace"):
                vars(module)["inplace"] = False
            name = f"_{node.name}_of_blocks"
            self._root[name] = module
            return self._made(node, self._new.call_module(name, (source.blocks,)), source)
        name = read.name.removesuffix("_tanh")  # GELU's, which is among the arguments as well
        function = getattr(F, name, None) or getattr(torch, name)
        others = [argument for argument in node.args[1:] if argument is not True]
        named = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
        made = self._new.call_function(function, (source.blocks, *others), named)
        return self._made(node, made, source)

    def _flattened(self, node: fx.Node, source: _Value) -> _Value | None:
        """Blocks as they are, for a layer of features that reads them all in order, or torch's."""
        layers = [
            self._old.get_submodule(str(user.target)) if user.op == "call_module" else None
            for user in node.users
        ]
        shape = source.shape
        one = shape is not None and (len(shape) == 2 or shape[2:] == (1, 1))
        read = all(isinstance(layer, SparseLayer) and layer.linear for layer in layers)
        if not one and not (read and layers):
            return None
        return _Value(_shape(node), None, source.blocks, source.images)

    def _pooling(self, node: fx.Node, read: Pooling, source: _Value) -> _Value | None:
        given = read.arguments
        made = None
        if read.kind == "adaptive_avg":
            made = self._call(adaptive_means, source.blocks, _two(given["output_size"]))
        elif read.kind in ("max", "avg") and not given["ceil_mode"]:
            kernel, padding = _two(given["kernel_size"]), _two(given["padding"])
            stride = _two(given["stride"]) if given["stride"] else kernel
            if read.kind == "max" and _two(given["dilation"]) == (1, 1):
                made = self._call(maxima, source.blocks, kernel, stride, padding)
            if read.kind == "avg" and stride == kernel and not read.rescales:
                made = self._call(means, source.blocks, *kernel) if padding == (0, 0) else None
        return made and self._made(node, made, source)


def _attribute(network: nn.Module, path: str) -> Any:
    *parents, name = path.split(".")
    return getattr(network.get_submodule(".".join(parents)), name, None)


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1 % len(value)])


def _shape(node: fx.Node) -> torch.Size | None:
    """The shape of a float32 value on the CPU; None of all others."""
    known: Any = node.meta.get("tensor_meta")
    usual = getattr(known, "dtype", None) == torch.float32
    return known.shape if usual else None
