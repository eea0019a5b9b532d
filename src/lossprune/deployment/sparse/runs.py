"""Which nodes of a graph are computed together: runs of sparse steps, and what torch computes."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from lossprune.deployment.sparse.forms import permutes
from lossprune.deployment.sparse.inputs import image_shape, row_shape
from lossprune.deployment.sparse.lowering import Lowered, of_rows
from lossprune.deployment.sparse.steps import Shape, SparseConvolution
from lossprune.deployment.sparse.token_steps import RowNorm, TokenPatches, TokenShift

Steps = Mapping[str, Lowered | str]  # what each node lowers to, by its name


@dataclass(frozen=True)
class Run:
    """Nodes that follow each other and are computed in one way.

    Attributes:
        sparse: by the kernels, or else by torch.
        nodes: in order.
        rows: whether values are rows of features, or else images.
        taken: parameters that are no values: every run has those that it needs.
    """

    sparse: bool
    nodes: tuple[fx.Node, ...]
    rows: bool = False
    taken: frozenset[fx.Node] = frozenset()

    @property
    def reads(self) -> list[fx.Node]:
        """The values that it reads from outside."""
        sources = (source for node in self.nodes for source in node.all_input_nodes)
        own = {*self.nodes, *self.taken}
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


def runs_of(graph: fx.GraphModule, steps: Steps) -> list[Run]:
    """Split the nodes, in order, into runs that are sparse or not."""
    runs: list[Run] = []
    sparse = True
    taken = _taken_in(graph, steps)
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output") or node in taken:
            continue
        if node.name not in steps:
            sparse = False
        elif _begins(steps[node.name]) or permutes(node):
            sparse = True  # the rest goes with what is before it
        _append_(runs, sparse, (node,))
    merged: list[Run] = []
    for run in runs:
        for piece in _pieces(run, steps) if run.sparse else [run]:
            if piece.sparse and any(_has_weights(steps[node.name]) for node in piece.nodes):
                merged.append(piece)
            else:
                _append_(merged, False, piece.nodes)
    return [dataclasses.replace(run, taken=taken) for run in merged]


def _pieces(run: Run, steps: Steps) -> list[Run]:
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
            pieces.append(Run(True, tuple(piece), rows))
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


def _append_(runs: list[Run], sparse: bool, nodes: tuple[fx.Node, ...]) -> None:
    """Let the last run go on with ``nodes`` if it is of their kind, or else begin one."""
    if runs and runs[-1].sparse == sparse:
        nodes = (*runs.pop().nodes, *nodes)
    runs.append(Run(sparse, nodes))


def _begins(step: Lowered | str) -> bool:
    """Whether the kernels take a step though torch computes what is before it."""
    kinds = SparseConvolution | RowNorm | TokenShift | TokenPatches
    return not isinstance(step, str) and isinstance(step[0].operation, kinds)


def _has_weights(step: Lowered | str) -> bool:
    return not isinstance(step, str) and isinstance(step[0].operation, SparseConvolution)


def _taken_in(graph: fx.GraphModule, steps: Steps) -> frozenset[fx.Node]:
    """Return the parameters that are weights of all the steps that use them, and so no values."""
    return frozenset(
        node
        for node in graph.graph.nodes
        if node.op == "get_attr"
        and all(
            user.name in steps and not _reads(steps[user.name], node.name) for user in node.users
        )
    )


def _reads(step: Lowered | str, name: str) -> bool:
    return step == name if isinstance(step, str) else name in step[0].reads
