"""A network in parts: runs of sparse steps, and between them what torch computes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lossprune.deployment.example import Call
from lossprune.deployment.sparse.lowering import Lowered, filled, joined, lowered
from lossprune.deployment.sparse.network import SparseNetwork
from lossprune.deployment.sparse.steps import Shape
from lossprune.pruning.errors import PruningError


class Parts(nn.Module):
    """Parts of a network in order, each reading values by name and adding its own."""

    def __init__(
        self,
        parts: Sequence[nn.Module],
        wires: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
        inputs: Sequence[str],
        output: Any,
    ) -> None:
        """Take parts, the names that each reads and makes, the inputs' and the output's names."""
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.wires, self.inputs, self.output = tuple(wires), tuple(inputs), output

    def forward(self, *inputs: Tensor) -> Any:
        """Return the network's output."""
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        for part, (reads, makes) in zip(self.parts, self.wires, strict=True):
            made = part(*[values[name] for name in reads])
            if len(makes) == 1:
                values[makes[0]] = made
            else:
                values.update(zip(makes, made, strict=True))
        return _filled(self.output, values)


@dataclass(frozen=True)
class _Name:
    """The name of a value, told from a string that a network returns."""

    name: str


def _named(node: fx.Node) -> Any:
    return _Name(node.name)


def _filled(output: Any, values: dict[str, Any]) -> Any:
    if isinstance(output, _Name):
        return values[output.name]
    if isinstance(output, dict):
        return {key: _filled(value, values) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return _like(output, [_filled(value, values) for value in output])
    return output


def _like(sequence: tuple[Any, ...] | list[Any], items: list[Any]) -> Any:
    """Return the items in a sequence of Python's own, or of the same class of named ones."""
    if hasattr(sequence, "_fields"):
        return type(sequence)(*items)
    return items if isinstance(sequence, list) else tuple(items)


def in_parts(graph: fx.GraphModule, dense: Collection[str] = ()) -> nn.Module:
    """Return a traced network whose layers, but for those in ``dense``, are sparse steps.

    Args:
        graph: with the shapes of its values, as ``ShapeProp`` leaves them.
        dense: names of layers that torch computes.

    Returns:
        A :class:`SparseNetwork` where all of the network is one, else its :class:`Parts`.
    """
    unfit = set(dense)
    while True:
        try:
            return _in_parts(graph, unfit)
        except _UnfitError as found:
            unfit.add(found.name)


class _UnfitError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _in_parts(graph: fx.GraphModule, dense: Collection[str]) -> nn.Module:
    runs = _runs(graph, dense)
    inputs = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.graph.nodes if node.op == "output")
    parts: list[nn.Module] = []
    wires = []
    for sparse, nodes in runs:
        reads, makes = _borders(nodes)
        made = (_sparse if sparse else _torch)(graph, nodes, reads, makes)
        parts.append(made)
        wires.append((tuple(n.name for n in reads), tuple(n.name for n in makes)))
    answer = fx.map_arg(output.args[0], _named)
    whole = Parts(parts, wires, inputs, _plain(answer))
    if (
        len(parts) == 1
        and isinstance(parts[0], SparseNetwork)
        and isinstance(answer, _Name)
        and wires[0] == (tuple(inputs), (answer.name,))
    ):
        return parts[0]
    return whole


def _plain(value: Any) -> Any:
    """Containers of fx, which forbid changes, as Python's own."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return _like(value, [_plain(item) for item in value])
    return value


def _runs(graph: fx.GraphModule, dense: Collection[str]) -> list[tuple[bool, list[fx.Node]]]:
    """Split the nodes, in order, into runs that are sparse or not."""
    runs: list[tuple[bool, list[fx.Node]]] = []
    sparse = True
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        part = None if node.name in dense or str(node.target) in dense else lowered(graph, node)
        if part is None or _changes_what_others_read(graph, node):
            sparse = False
        elif not isinstance(part, str) and part[0].kind == "convolution":
            sparse = True  # the rest goes with what is before it
        if not runs or runs[-1][0] != sparse:
            runs.append((sparse, []))
        runs[-1][1].append(node)
    merged: list[tuple[bool, list[fx.Node]]] = []
    for sparse, nodes in runs:
        worth = sparse and any(_has_weights(graph, node) for node in nodes)
        if merged and merged[-1][0] == worth:
            merged[-1][1].extend(nodes)
        else:
            merged.append((worth, nodes))
    return merged


def _has_weights(graph: fx.GraphModule, node: fx.Node) -> bool:
    part = lowered(graph, node)
    return part is not None and not isinstance(part, str) and part[0].kind == "convolution"


def _changes_what_others_read(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operation in place changes a value that something else reads too."""
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    in_place = getattr(module, "inplace", False) or node.kwargs.get("inplace", False)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = in_place or (module is None and (name.endswith("_") or name == "iadd"))
    return bool(in_place) and any(len(source.users) > 1 for source in node.all_input_nodes)


def _borders(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the values that nodes read from outside, and those of theirs read outside."""
    own = set(nodes)
    reads = dict.fromkeys(
        source for node in nodes for source in node.all_input_nodes if source not in own
    )
    makes = [node for node in nodes if any(user not in own for user in node.users)]
    return list(reads), makes


def _torch(
    graph: fx.GraphModule, nodes: list[fx.Node], reads: list[fx.Node], makes: list[fx.Node]
) -> nn.Module:
    made = fx.Graph()
    copies = {node: made.placeholder(node.name) for node in reads}
    for node in nodes:
        copies[node] = made.node_copy(node, lambda source: copies[source])
    out = [copies[node] for node in makes]
    made.output(out[0] if len(out) == 1 else tuple(out))
    return fx.GraphModule(graph, made).requires_grad_(False)


def _sparse(
    graph: fx.GraphModule, nodes: list[fx.Node], reads: list[fx.Node], makes: list[fx.Node]
) -> nn.Module:
    same = {node.name: node.name for node in reads}
    parts: list[Lowered] = []
    for node in nodes:
        part = lowered(graph, node)
        if isinstance(part, str):
            same[node.name] = same[part]
        elif part is not None:
            step, weight = part
            other = None if step.other is None else same[step.other]
            parts.append((step.replace(source=same[step.source], other=other), weight))
            same[node.name] = node.name
    kept = {same[node.name] for node in makes}
    shapes: dict[str, Shape] = {node.name: _map(node) for node in reads}
    _check(parts, dict(shapes))
    steps: list[Lowered] = []
    for part in joined(parts, kept):
        step = part[0]
        steps.append(filled(part, shapes[step.source][0]))
        shapes[step.target] = step.output(shapes[step.source])
    outputs = [(same[node.name], len(node.meta["tensor_meta"].shape) == 2) for node in makes]
    return SparseNetwork(
        [step for step, _ in steps], [weight for _, weight in steps],
        [node.name for node in reads], outputs,
    )  # fmt: skip


def _check(parts: Sequence[Lowered], shapes: dict[str, Shape]) -> None:
    """Refuse what only looks alike when flattened: maps of other shapes, or other channels."""
    for step, weight in parts:
        source = shapes[step.source]
        if step.other is not None and shapes[step.other] != source:
            raise _UnfitError(step.target)
        if step.kind == "affine" and weight.scale.numel() not in (0, source[0]):
            raise _UnfitError(step.target)
        try:
            shapes[step.target] = step.output(source)
        except PruningError:
            raise _UnfitError(step.target) from None


def _map(node: fx.Node) -> Shape:
    shape = node.meta["tensor_meta"].shape
    if len(shape) not in (2, 4):
        raise _UnfitError(node.name)
    return (shape[1], 1, 1) if len(shape) == 2 else tuple(shape[1:])


def sparse_networks(network: nn.Module) -> list[SparseNetwork]:
    """Return the sparse parts of a network."""
    return [module for module in network.modules() if isinstance(module, SparseNetwork)]


@torch.no_grad()
def inputs_of(
    network: nn.Module, call: Callable[[nn.Module], object], modules: Sequence[nn.Module]
) -> dict[nn.Module, Call]:
    """Return how each of ``modules`` is called first where ``call`` calls ``network``."""
    seen: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.setdefault(module, Call(args, named))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        call(network)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
