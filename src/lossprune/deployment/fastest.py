"""Sparse inference: a pruned network as fast as this machine computes it.

The network is compacted, then every layer is either torch's dense one or the project's sparse
kernel, whichever is faster here for a batch like the example.  Consecutive sparse layers run by one
call, in one layout; see ``sparse/sparse_network.c``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from lossprune.channels.calls import Call
from lossprune.channels.compaction import compact, masked_copy
from lossprune.channels.costs import count_outputs, weighted_layers
from lossprune.channels.tracing import UntraceableError
from lossprune.deployment.candidates import Candidates, dense_seconds
from lossprune.deployment.deployed import Deployed, LayerChoice
from lossprune.deployment.layer_by_layer import (
    layer_by_layer,
    replaced_layers,
    with_semi_structured,
)
from lossprune.deployment.original import Original
from lossprune.deployment.sparse.parts import in_parts, sparse_networks
from lossprune.deployment.sparse.tuning import sparse_seconds, tune_
from lossprune.deployment.sparse_layers import csr_layer, sparse_layer
from lossprune.deployment.traced import TracedNetwork, traced
from lossprune.kernels.compiler import compiler_available
from lossprune.pruning.mask import Mask


@torch.no_grad()
def deploy(model: nn.Module, mask: Mask, example: Any, *, seconds: float = 0.3) -> Deployed:
    """Return the pruned network, as fast as this machine computes it.

    The result takes what ``model`` takes, in batches of any size, and gives what the masked model
    gives in evaluation mode, to rounding; it computes no gradients.  ``model`` is left as it is.
    On a GPU, linear layers with 2:4 masks become PyTorch's semi-structured ones.

    Args:
        model: any network; what cannot be traced by ``torch.fx`` is replaced layer by layer.
        mask: which weights are kept.
        example: a batch as it will come: its size decides what is fastest.  A tuple or list holds
            the network's arguments, a mapping those by name; or it is itself the argument of a
            network that takes such a thing.  Arguments that are left out, None, True or False
            here are to be so whenever the result is called.
        seconds: how long each comparison may take.

    Raises:
        PruningError: the mask does not fit the model, or the model does not run on ``example``.

    >>> import lossprune
    >>> network = lossprune.networks.NETWORKS["MLP"](shape=(1, 8, 8), hidden=(32,))
    >>> mask = Mask({"fc1.weight": torch.rand(32, 64) < 0.05})
    >>> deployed = deploy(network, mask, torch.randn(1, 1, 8, 8), seconds=0.01)
    >>> deployed(torch.randn(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """
    masked, mask = masked_copy(model, mask)
    candidates = Candidates(masked, example)
    if candidates.call.on_gpu:
        return _on_gpu(candidates, masked, seconds)
    compaction = candidates.attempt(
        "compacted", lambda: compact(model, mask, candidates.call.example)
    )
    if compaction is not None:
        candidates.add("compacted", compaction.model.eval())
    small = candidates.networks.get("compacted", masked)
    _add_sparse(candidates, small, seconds)
    return _fastest(candidates, small, seconds)


def _on_gpu(candidates: Candidates, masked: nn.Module, seconds: float) -> Deployed:
    """Return the masked network with semi-structured products where masks and types allow."""
    made = candidates.attempt(
        "semi-structured", lambda: with_semi_structured(masked, candidates.call, seconds)
    )
    network, changed = made or (masked, set())
    candidates.add("semi-structured", network)
    if "semi-structured" not in candidates.networks:
        network, changed = masked, set()
    layers = _choices(masked, candidates.call, dict.fromkeys(changed, "2:4"), {}, {})
    note = f"{len(changed)} of {len(layers)} layers run as PyTorch's semi-structured products"
    return Deployed(network, layers, {}, [note, *candidates.notes])


def _add_sparse(candidates: Candidates, small: nn.Module, seconds: float) -> None:
    """Add ``small`` with sparse layers: from its graph, or where that does not do one by one."""
    name, make = "layer by layer", sparse_layer
    if not compiler_available():
        candidates.notes.append(
            "no C compiler, so torch's CSR products are all there is for sparse layers"
        )
        name, make = "CSR", csr_layer
    elif _add_from_graph(candidates, small, seconds):
        return
    made = candidates.attempt(name, lambda: layer_by_layer(small, candidates.call, seconds, make))
    if made is not None:
        candidates.add(name, made)


def _add_from_graph(candidates: Candidates, small: nn.Module, seconds: float) -> bool:
    """Add what is made from the graph of ``small``; say whether that does for all its layers."""
    call = candidates.call
    if "" in weighted_layers(small):
        return False  # one layer, whose graph is the inside of it
    if small._forward_hooks or small._forward_pre_hooks:
        candidates.notes.append("the network itself has hooks, which its graph would be without")
        return False
    try:
        trace, arguments = traced(small, call.example)
    except UntraceableError as error:
        candidates.notes.append(f"{error}, so its layers are looked at one by one")
        return False
    graph = trace.module(small)
    values = Call(tuple(arguments(call.inputs, call.named)), {})
    made = candidates.attempt("sparse", lambda: _sparse(graph, values, small, call, seconds))
    for name, network in (made or {}).items():
        candidates.add(name, TracedNetwork(network, arguments, Original.of(small)))
    working = made is not None and made.keys() <= candidates.networks.keys()
    return working and not _hides_layers(graph)


def _sparse(
    graph: fx.GraphModule, values: Call, small: nn.Module, call: Call, seconds: float
) -> dict[str, nn.Module]:
    """Return all layers sparse, and those alone that are then faster than torch's."""
    ShapeProp(graph).propagate(*values.copied().inputs)
    sparse = in_parts(graph)
    if not sparse_networks(sparse):
        return {}
    tune_(sparse, values, seconds)
    times = sparse_seconds(sparse, values, seconds)
    dense = dense_seconds(small, call, seconds)
    found = {"sparse": sparse}
    for name, share in (("mixed", 1.0), ("mostly sparse", 2.0)):
        losing = {layer for layer, time in times.items() if time > share * dense.get(layer, 1e9)}
        if losing and losing != set(times):
            mixed = in_parts(graph, losing)
            tune_(mixed, values, seconds)
            found[name] = mixed
    return found


def _hides_layers(graph: fx.GraphModule) -> bool:
    """Whether there are layers inside of modules that the graph takes as one operation."""
    called = [node for node in graph.graph.nodes if node.op == "call_module"]
    modules = [graph.get_submodule(str(node.target)) for node in called]
    return any(set(weighted_layers(module)) - {""} for module in modules)


def _fastest(candidates: Candidates, small: nn.Module, seconds: float) -> Deployed:
    """Return the candidate that is fastest on the whole network."""
    call = candidates.call
    taken = candidates.seconds(seconds)
    best = min(taken, key=lambda name: taken[name])
    network = candidates.networks[best]
    times = sparse_seconds(network, call, seconds)
    sparse = {*times, *replaced_layers(network)}
    dense = dense_seconds(small, call, seconds)
    layers = _choices(small, call, dict.fromkeys(sparse, "sparse"), times, dense)
    note = f"torch's dense layers are fastest here, all through ({best})"
    if sparse:
        note = f"{len(sparse)} of {len(layers)} layers are sparse, which is fastest here ({best})"
    return Deployed(network, layers, taken, [*candidates.notes, note])


def _choices(
    network: nn.Module,
    call: Call,
    kinds: Mapping[str, str],
    sparse: Mapping[str, float],
    dense: Mapping[str, float],
) -> list[LayerChoice]:
    """Return how each layer is computed, dense where not in ``kinds``, and its seconds."""
    layers = weighted_layers(network)
    numbers = count_outputs(network, layers, call)
    choices = []
    for name, layer in layers.items():
        weight: Any = layer.weight  # which a parametrisation may compute
        kept, positions = int(torch.count_nonzero(weight)), numbers[name] // len(weight)
        choices.append(
            LayerChoice(
                name, kinds.get(name, "dense"), kept, weight.numel(), kept * positions,
                sparse.get(name), dense.get(name, 0.0),
            )
        )  # fmt: skip
    return choices
