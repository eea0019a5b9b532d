"""A pruned network whose every step is the kernels', where they know all of its operations."""

from typing import Any

import torch
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp

from lossprune.channels.calls import Call
from lossprune.channels.compaction import compact, masked_copy
from lossprune.deployment.candidates import understood
from lossprune.deployment.original import Original
from lossprune.deployment.sparse.parts import in_parts
from lossprune.deployment.traced import TracedNetwork, traced
from lossprune.pruning.mask import Mask


@torch.no_grad()
def all_sparse(model: nn.Module, mask: Mask, example: Any) -> TracedNetwork:
    """Return the pruned network with all that the kernels know left to them, whatever is fastest.

    Raises:
        PruningError: the mask does not fit the model, or the model does not run on ``example``.
        UntraceableError: it has no graph.
    """
    masked, mask = masked_copy(model, mask)
    call, _ = understood(masked, example)
    small = compact(model, mask, call.example).model.eval()
    trace, arguments = traced(small, call.example)
    graph = trace.module(small)
    values = Call(tuple(arguments(call.inputs, call.named)), {})
    ShapeProp(graph).propagate(*values.copied().inputs)
    return TracedNetwork(in_parts(graph), arguments, Original.of(small))
