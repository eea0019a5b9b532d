"""What a mask leaves of a network's connections, from the input onwards and from the output back.

A channel is *live* if a path of kept weights leads to it from the network's input, and *useful* if
one leads from it to an output.  A weight is on a path if it is kept, its input is live and its
output useful.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from lossprune.channels.calls import Fixed
from lossprune.channels.interpretation import interpret, size_query
from lossprune.channels.layers import Connected, Depthwise, WeightedOperation
from lossprune.channels.operations import Operation, UnknownEffectError, only
from lossprune.channels.tracing import Trace, overwritten, trace, untouchable
from lossprune.channels.values import ChannelGroups, Channels, Unknown, Value


@dataclass(frozen=True)
class Analysis:
    """The graph of a network, and what is known of the tensors in it.

    Attributes:
        trace: its operations.
        constants: whether channels without inputs are known by the constant that they hold.
        operations: those that are known, by node.
        values: what is known of each node's output.
        useful: bool (channels,) for the nodes whose value is :class:`Channels`.
        required: nodes that all channels are needed of, and why (None: they leave the network).
        refused: why an operation is not known, by node.
        groups: of channels that stay together.
    """

    trace: Trace
    constants: bool = True
    operations: dict[fx.Node, Operation] = field(default_factory=dict)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    useful: dict[fx.Node, Tensor] = field(default_factory=dict)
    required: list[tuple[fx.Node, str | None]] = field(default_factory=list)
    refused: dict[fx.Node, str] = field(default_factory=dict)
    groups: ChannelGroups = field(default_factory=ChannelGroups)

    @property
    def graph(self) -> fx.Graph:
        """The graph of ``trace``."""
        return self.trace.graph

    def inputs(self, node: fx.Node) -> list[Value]:
        """Return what is known of the inputs of ``node``, in order."""
        return [self.values[source] for source in sources(node)]

    def channels(self, node: fx.Node) -> Channels:
        """Return what is known of the output of a node whose operation is known."""
        return only([self.values[node]])

    def layers(self) -> dict[str, tuple[fx.Node, WeightedOperation]]:
        """Return the linear and convolution layers whose channels are known, by module name."""
        return {
            operation.name: (node, operation)
            for node, operation in self.operations.items()
            if isinstance(operation, WeightedOperation)
        }

    def on_path(self, node: fx.Node, operation: WeightedOperation) -> Tensor:
        """Return which weights of a layer are on a path from input to output, (o, i, t) bool."""
        useful = self.useful[node][:, None, None]
        if isinstance(operation, Connected):
            live = operation.entering(self.inputs(node)).live[:, None]
        else:
            live = only(self.inputs(node)).live[:, None, None]
        return operation.kept & live & useful


def analyse(
    model: nn.Module, mask: Mapping[str, Tensor], fixed: Fixed, *, constants: bool = True
) -> Analysis:
    """Follow the channels of ``model``, with these arguments fixed, forward and back in its graph.

    ``model`` is in evaluation mode, and its weights are zero where ``mask`` removes them.  Without
    ``constants`` no channel is known to hold one, as where biases are still trained.

    Raises:
        UntraceableError: the network has no graph.
    """
    analysis = Analysis(trace(model, fixed), constants)
    locked = untouchable(model, analysis.graph)
    changed = overwritten(model, analysis.graph)
    for node in analysis.graph.nodes:
        if node in changed:
            value = _refuse(analysis, node, "its output is changed in place and used elsewhere")
        else:
            value = _forward(analysis, model, node, mask, locked)
        analysis.values[node] = value
    _backward(analysis)
    return analysis


def sources(node: fx.Node) -> list[fx.Node]:
    """Return the tensors among the arguments of ``node``, as often as they occur."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return [source for source in found if not size_query(source)]


def _forward(
    analysis: Analysis,
    model: nn.Module,
    node: fx.Node,
    mask: Mapping[str, Tensor],
    locked: Mapping[str, str],
) -> Value:
    if node.op == "placeholder" or size_query(node):
        return Unknown()
    if node.op == "output":
        analysis.required.extend((source, None) for source in sources(node))
        return Unknown()
    operation = interpret(model, node, mask, locked, analysis.operations)
    if isinstance(operation, str):
        return _refuse(analysis, node, operation)
    try:
        return _operate(analysis, node, operation)
    except UnknownEffectError as error:
        return _refuse(analysis, node, f"channels are not followed through {error}")


def _operate(analysis: Analysis, node: fx.Node, operation: Operation) -> Value:
    inputs = analysis.inputs(node)
    unknown = [value for value in inputs if isinstance(value, Unknown)]
    if len(unknown) == len(inputs) and not isinstance(operation, Connected):
        if isinstance(operation, Depthwise):
            raise UnknownEffectError("channels that are not known before it")
        return next((value for value in unknown if value.reason), Unknown())
    value = operation.forward(inputs, analysis.groups)
    if not analysis.constants and isinstance(value, Channels):
        value = replace(value, constant=torch.full_like(value.constant, math.nan))
    analysis.operations[node] = operation
    return value


def _refuse(analysis: Analysis, node: fx.Node, reason: str) -> Unknown:
    analysis.refused[node] = reason
    analysis.required.extend((source, reason) for source in sources(node))
    return Unknown(reason)


def _backward(analysis: Analysis) -> None:
    useful = analysis.useful
    for node, value in analysis.values.items():
        if isinstance(value, Channels):
            useful[node] = torch.zeros(len(value), dtype=torch.bool)
    for node, _ in analysis.required:
        if node in useful:
            useful[node][:] = True
    for node in reversed(list(analysis.operations)):
        read = analysis.operations[node].backward(useful[node], analysis.inputs(node))
        for source, reads in zip(sources(node), read, strict=True):
            if source in useful:
                useful[source] |= reads
