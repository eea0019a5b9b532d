"""A pruned network whose every step is the kernels', where they know all of its operations."""

from typing import Any

import torch
from torch import nn

from lossprune.channels.calls import Call, same_outputs
from lossprune.channels.compaction import cut_copy, masked_copy
from lossprune.deployment.candidates import understood
from lossprune.deployment.opened import opened
from lossprune.deployment.original import Original
from lossprune.deployment.sparse.parts import in_parts
from lossprune.deployment.traced import TracedNetwork, traced
from lossprune.deployment.ways import Graph
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask


@torch.no_grad()
def all_sparse(model: nn.Module, mask: Mask, example: Any) -> tuple[TracedNetwork, Call]:
    """Return the pruned network with all that the kernels know left to them, and the call.

    Raises:
        PruningError: the mask does not fit the model, the model does not run on ``example``, or its
            graph gives something else.
        UntraceableError: it has no graph.
        NoCompiler: the kernels cannot be built here.
    """
    masked, mask = masked_copy(model, mask)
    call, expected = understood(masked, example)
    small = opened(cut_copy(masked, mask, call.example)[0].eval())
    trace, arguments = traced(small, call.example)
    values = Call(tuple(arguments(call.inputs, call.named)), {})
    graph = Graph(trace.module(small), arguments, values, Original.of(small))
    graph.prepare_()
    network = graph.network(in_parts(graph.module)).eval()
    if not same_outputs(call(network), expected):
        raise PruningError(f"the graph of {type(model).__name__} gives something else than it does")
    return network, call
