"""A network in parts: runs of sparse steps, and between them what torch computes."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from lossprune.channels.nodes import in_place, may_be_view
from lossprune.deployment.sparse.channels_last import moved_channels
from lossprune.deployment.sparse.fusing import joined, with_scales
from lossprune.deployment.sparse.lowering import Lowered, lowered
from lossprune.deployment.sparse.network import SparseNetwork
from lossprune.deployment.sparse.runs import Run, Steps, runs_of
from lossprune.deployment.sparse.steps import MapJoin, SparseStep, Weights, output_shape
from lossprune.deployment.sparse.token_steps import OF_TOKENS, images_among, misfit, single_values
from lossprune.pruning.errors import PruningError


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
    moved = [group for group in moved_channels(graph) if not _names(graph, group) & {*dense}]
    runs, steps = _fitting(graph, steps, moved)
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


def _names(graph: fx.GraphModule, group: Collection[str]) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if node.name in group}


def _fitting(
    graph: fx.GraphModule, alone: Steps, moved: Sequence[Steps]
) -> tuple[list[Run], Steps]:
    """Return the runs whose steps all fit, and the steps.

    Args:
        graph: what they are of.
        alone: what nodes lower to, each by itself.
        moved: what nodes lower to where channels have moved, which must all be in one run.
    """
    while True:
        steps = {**alone, **{name: step for group in moved for name, step in group.items()}}
        runs = runs_of(graph, steps)
        own = [{node.name for node in run.nodes} for run in runs if run.sparse]
        whole = [group for group in moved if any(group.keys() <= names for names in own)]
        if len(whole) < len(moved):
            moved = whole
            continue
        unfit = next(filter(None, (_unfit(run, steps) for run in runs if run.sparse)), None)
        if unfit is None:
            return runs, steps
        left = [group for group in moved if unfit not in group]
        if len(left) == len(moved):
            alone = {name: step for name, step in alone.items() if name != unfit}
        moved = left


def _steps(graph: fx.GraphModule, dense: Collection[str]) -> dict[str, Lowered | str]:
    """Return what the nodes lower to that need not be torch's."""
    found: dict[str, Lowered | str] = {}
    for node in graph.graph.nodes:
        left = node.name in dense or str(node.target) in dense
        if left or _changes_shared(graph, node):
            continue
        if (step := lowered(graph, node)) is not None:
            found[node.name] = step
    return found


def _changes_shared(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may write its output over what others read as well."""
    source = node
    while source.all_input_nodes and (in_place if source is node else may_be_view)(graph, source):
        source = source.all_input_nodes[0]
        if len(source.users) > 1:
            return True
    return False


def _torch(graph: fx.GraphModule, run: Run) -> nn.Module:
    made = fx.Graph()
    copies = {node: made.placeholder(node.name) for node in run.reads}
    for node in run.nodes:
        for parameter in run.taken.intersection(node.all_input_nodes) - copies.keys():
            copies[parameter] = made.node_copy(parameter)
        copies[node] = made.node_copy(node, lambda source: copies[source])
    out = [copies[node] for node in run.makes]
    made.output(out[0] if len(out) == 1 else tuple(out))
    return fx.GraphModule(graph, made).requires_grad_(False)


def _unfit(run: Run, steps: Steps) -> str | None:
    """Return the first node that fits only flattened values: its maps or channels differ."""
    shapes = run.shapes()
    for step, _ in _wired(run, steps)[0]:
        try:
            shapes[step.target] = output_shape(step, shapes)
        except PruningError:
            return step.target if step.target in steps else step.name
    return _unfit_tokens(run, [step for step, _ in _wired(run, steps)[0]])


def _unfit_tokens(run: Run, steps: Sequence[SparseStep]) -> str | None:
    """Return the first node that takes rows for tokens of examples which may be something else."""
    of_tokens = [step.target for step in steps if isinstance(step.operation, OF_TOKENS)]
    if not of_tokens:
        return None
    inputs = dict.fromkeys((node.name for node in run.reads), False)
    images = images_among(steps)
    if any(len(node.meta["tensor_meta"].shape) != 3 + (node.name in images) for node in run.reads):
        return of_tokens[0]
    for count, step in enumerate(steps, start=1):
        try:
            single_values(steps[:count], inputs)
        except PruningError:
            return step.target
    return misfit(steps, list(inputs))


def _wired(run: Run, steps: Steps) -> tuple[list[Lowered], dict[str, str]]:
    """Return the steps of a run, and of which value each of its nodes is.

    The steps read the values behind what flattens them or does nothing.
    """
    same = {node.name: node.name for node in run.reads}
    joints: dict[tuple[str, ...], str] = {}
    parts: list[Lowered] = []
    for node in run.nodes:
        found = steps[node.name]
        if isinstance(found, str):
            same[node.name] = same[found]
        else:
            step, weights = found
            step = dataclasses.replace(step, reads=tuple(same[name] for name in step.reads))
            if isinstance(step.operation, MapJoin):
                same[node.name] = _join_(parts, joints, step)
                continue
            parts.append((step, weights))
            same[node.name] = node.name
    return parts, same


def _join_(parts: list[Lowered], joints: dict[tuple[str, ...], str], step: SparseStep) -> str:
    """Add joints of two values each, from the first on, and return what the last one makes.

    Those of the first values are there already where a network joins all that it has made so far.
    """
    made = step.reads[0]
    for k in range(2, len(step.reads) + 1):
        reads = step.reads[:k]
        if reads not in joints:
            target = step.target if k == len(step.reads) else f"{step.target}, {k} of them"
            joint = dataclasses.replace(step, reads=(made, reads[-1]), target=target)
            parts.append((joint, Weights()))
            joints[reads] = target
        made = joints[reads]
    return made


def _sparse(run: Run, steps: Steps) -> SparseNetwork:
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
