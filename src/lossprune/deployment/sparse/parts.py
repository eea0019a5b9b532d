"""A network in parts: runs of sparse steps, and between them what torch computes."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from lossprune.channels.nodes import in_place
from lossprune.deployment.sparse.inputs import image_shape, row_shape
from lossprune.deployment.sparse.lowering import Lowered, joined, lowered, of_rows, with_scales
from lossprune.deployment.sparse.network import SparseNetwork
from lossprune.deployment.sparse.steps import Shape, SparseConvolution, output_shape
from lossprune.pruning.errors import PruningError

_Steps = Mapping[str, Lowered | str]  # what each node lowers to, by its name


class NetworkInParts(nn.Module):
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
        return _mapped(self.output, ValueName, lambda value: values[value.name])


@dataclass(frozen=True)
class ValueName:
    """The name of a value, told from a string that a network returns."""

    name: str


def _mapped(output: Any, kind: type, put: Callable[[Any], Any]) -> Any:
    """Return ``output`` in Python's own containers, or of its class of named ones.

    Those of fx forbid changes.  ``put`` says what stands for each item of a ``kind``.
    """
    if isinstance(output, kind):
        return put(output)
    if isinstance(output, dict):
        return {key: _mapped(value, kind, put) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        items = [_mapped(value, kind, put) for value in output]
        if hasattr(output, "_fields"):
            return type(output)(*items)
        return items if isinstance(output, list) else tuple(items)
    return output


def in_parts(graph: fx.GraphModule, dense: Collection[str] = ()) -> nn.Module:
    """Return a traced network whose layers, but for those in ``dense``, are sparse steps.

    Args:
        graph: with the shapes of its values, as ``ShapeProp`` leaves them.
        dense: names of layers that torch computes.

    Returns:
        A :class:`SparseNetwork` where all of the network is one, else a :class:`NetworkInParts`.
    """
    steps = _steps(graph, dense)
    runs = _runs(graph, steps)
    while unfit := next(filter(None, (_unfit(run, steps) for run in runs if run.sparse)), None):
        del steps[unfit]
        runs = _runs(graph, steps)
    parts = [_sparse(run, steps) if run.sparse else _torch(graph, run) for run in runs]
    inputs = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    (returned,) = graph.graph.output_node().args
    output = _mapped(returned, fx.Node, lambda node: ValueName(node.name))
    wires = [
        (tuple(node.name for node in run.reads), tuple(node.name for node in run.makes))
        for run in runs
    ]
    if (
        isinstance(output, ValueName)
        and wires == [(tuple(inputs), (output.name,))]
        and runs[0].sparse
    ):
        return parts[0]
    return NetworkInParts(parts, wires, inputs, output)


def _steps(graph: fx.GraphModule, dense: Collection[str]) -> dict[str, Lowered | str]:
    """Return what the nodes lower to that need not be torch's."""
    found: dict[str, Lowered | str] = {}
    for node in graph.graph.nodes:
        left = node.name in dense or str(node.target) in dense
        shared = any(len(source.users) > 1 for source in node.all_input_nodes)
        if left or (shared and in_place(graph, node)):  # it may change what others read
            continue
        if (step := lowered(graph, node)) is not None:
            found[node.name] = step
    return found


@dataclass(frozen=True)
class _Run:
    """Nodes that follow each other and are computed in one way.

    Attributes:
        sparse: by the kernels, or else by torch.
        nodes: in order.
        rows: whether values are rows of features, or else images.
    """

    sparse: bool
    nodes: tuple[fx.Node, ...]
    rows: bool = False

    @property
    def reads(self) -> list[fx.Node]:
        """The values that it reads from outside."""
        sources = (source for node in self.nodes for source in node.all_input_nodes)
        own = set(self.nodes)
        return list(dict.fromkeys(source for source in sources if source not in own))

    @property
    def makes(self) -> list[fx.Node]:
        """Its values that are read outside."""
        own = set(self.nodes)
        return [node for node in self.nodes if any(user not in own for user in node.users)]

    def shapes(self) -> dict[str, Shape]:
        """The shapes of the values that it reads from outside, as the kernels take them."""
        one = row_shape if self.rows else image_shape
        return {node.name: one(node.meta["tensor_meta"]) for node in self.reads}


def _runs(graph: fx.GraphModule, steps: _Steps) -> list[_Run]:
    """Split the nodes, in order, into runs that are sparse or not."""
    runs: list[_Run] = []
    sparse = True
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.name not in steps:
            sparse = False
        elif _has_weights(steps[node.name]):
            sparse = True  # the rest goes with what is before it
        _append_(runs, sparse, (node,))
    merged: list[_Run] = []
    for run in runs:
        for piece in _pieces(run, steps) if run.sparse else [run]:
            if piece.sparse and any(_has_weights(steps[node.name]) for node in piece.nodes):
                merged.append(piece)
            else:
                _append_(merged, False, piece.nodes)
    return merged


def _pieces(run: _Run, steps: _Steps) -> list[_Run]:
    """Split a sparse run where images become rows or rows images, and into what is connected.

    Values without a connection may be of different numbers of rows in another call.
    """
    stretches: list[tuple[bool | None, list[fx.Node]]] = [(None, [])]
    for node in run.nodes:
        need, (before, nodes) = of_rows(node, steps[node.name]), stretches[-1]
        if None not in (need, before) and need != before:
            stretches.append((need, [node]))
        else:
            stretches[-1] = (before if need is None else need, [*nodes, node])
    pieces = []
    for _, nodes in stretches:
        for piece in _connected(nodes):
            rows = any(of_rows(node, steps[node.name]) for node in piece)
            pieces.append(_Run(True, tuple(piece), rows))
    return pieces


def _connected(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Return nodes in groups that share no value, each in order."""
    groups: list[tuple[set[fx.Node], list[fx.Node]]] = []
    for node in nodes:
        values, members = {node, *node.all_input_nodes}, [node]
        apart = []
        for group in groups:
            if group[0] & values:
                values, members = values | group[0], [*group[1], *members]
            else:
                apart.append(group)
        groups = [*apart, (values, members)]
    places = {node: place for place, node in enumerate(nodes)}
    ordered = [sorted(members, key=places.__getitem__) for _, members in groups]
    return sorted(ordered, key=lambda members: places[members[0]])


def _append_(runs: list[_Run], sparse: bool, nodes: tuple[fx.Node, ...]) -> None:
    """Let the last run go on with ``nodes`` if it is of their kind, or else begin one."""
    if runs and runs[-1].sparse == sparse:
        nodes = (*runs.pop().nodes, *nodes)
    runs.append(_Run(sparse, nodes))


def _has_weights(step: Lowered | str) -> bool:
    return not isinstance(step, str) and isinstance(step[0].operation, SparseConvolution)


def _torch(graph: fx.GraphModule, run: _Run) -> nn.Module:
    made = fx.Graph()
    copies = {node: made.placeholder(node.name) for node in run.reads}
    for node in run.nodes:
        copies[node] = made.node_copy(node, lambda source: copies[source])
    out = [copies[node] for node in run.makes]
    made.output(out[0] if len(out) == 1 else tuple(out))
    return fx.GraphModule(graph, made).requires_grad_(False)


def _unfit(run: _Run, steps: _Steps) -> str | None:
    """Return the first node that fits only flattened values: its maps or channels differ."""
    shapes = run.shapes()
    for step, _ in _wired(run, steps)[0]:
        try:
            shapes[step.target] = output_shape(step, shapes)
        except PruningError:
            return step.target
    return None


def _wired(run: _Run, steps: _Steps) -> tuple[list[Lowered], dict[str, str]]:
    """Return the steps of a run, and of which value each of its nodes is.

    The steps read the values behind what flattens them or does nothing.
    """
    same = {node.name: node.name for node in run.reads}
    parts: list[Lowered] = []
    for node in run.nodes:
        found = steps[node.name]
        if isinstance(found, str):
            same[node.name] = same[found]
        else:
            step, weights = found
            reads = tuple(same[name] for name in step.reads)
            parts.append((dataclasses.replace(step, reads=reads), weights))
            same[node.name] = node.name
    return parts, same


def _sparse(run: _Run, steps: _Steps) -> SparseNetwork:
    parts, same = _wired(run, steps)
    shapes = run.shapes()
    made: list[Lowered] = []
    for part in joined(parts, {same[node.name] for node in run.makes}):
        made.append(with_scales(part, shapes[part[0].source][0]))
        shapes[part[0].target] = output_shape(made[-1][0], shapes)
    outputs = [(same[node.name], len(node.meta["tensor_meta"].shape) == 2) for node in run.makes]
    return SparseNetwork(
        [step for step, _ in made], [weights for _, weights in made],
        [node.name for node in run.reads], outputs, rows=run.rows,
    )  # fmt: skip


def sparse_networks(network: nn.Module) -> list[SparseNetwork]:
    """Return the sparse parts of a network."""
    return [module for module in network.modules() if isinstance(module, SparseNetwork)]
