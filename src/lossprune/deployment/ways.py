"""The ways to compute a compacted network: from its graph, or with layers replaced one by one."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from lossprune.channels.calls import Call
from lossprune.channels.costs import weighted_layers
from lossprune.channels.tracing import UntraceableError
from lossprune.deployment.attention import fuse_attention_
from lossprune.deployment.candidates import Candidates
from lossprune.deployment.heads import fold_heads_, left_to_torch
from lossprune.deployment.layer_by_layer import layer_by_layer
from lossprune.deployment.layer_watch import LayerWatch
from lossprune.deployment.opened import opened
from lossprune.deployment.original import Original
from lossprune.deployment.patches import fold_patches_
from lossprune.deployment.plans import DeploymentPlan
from lossprune.deployment.race import LONG, Budget
from lossprune.deployment.sparse.forms import simplify_
from lossprune.deployment.sparse.network import Tuning
from lossprune.deployment.sparse.parts import in_parts, sparse_networks
from lossprune.deployment.sparse.tuning import tune_, tune_alike_
from lossprune.deployment.sparse_layers import MakeLayer, csr_layer, sparse_layer
from lossprune.deployment.traced import GraphInputs, TracedNetwork, traced
from lossprune.kernels.compiler import compiler_available

_TUNING = 0.5  # share of the budget; the rest is for whole networks
_WORTH = 1.1  # times torch's: a layer loses
_GAIN = 0.03  # of all sparse layers' seconds: what the losing ones must save
# Names of ways, and the times of torch's layer from which on a layer is left to it.
_MIXED = {"mixed": 1.0, "mostly sparse": 2.0}
REPLACED: Mapping[str, MakeLayer] = {"layer by layer": sparse_layer, "CSR": csr_layer}


@dataclass(frozen=True)
class Way:
    """A network, and what is known of it.

    Attributes:
        network: computes what the masked one does.
        sparse_seconds: of each of its sparse layers.
        dense: the layers that its graph leaves to torch, though they could be sparse.
    """

    network: nn.Module
    sparse_seconds: Mapping[str, float] = field(default_factory=dict)
    dense: Sequence[str] = ()


@dataclass(frozen=True)
class Graph:
    """The operations of a network, and how it is called."""

    module: fx.GraphModule
    arguments: GraphInputs
    call: Call
    original: Original

    def network(self, parts: nn.Module) -> TracedNetwork:
        """Return what is called as the network is."""
        return TracedNetwork(parts, self.arguments, self.original)

    def prepare_(self, watch: LayerWatch | None = None) -> None:
        """Give values their shapes in the call, and what the kernels know its usual form.

        The call is one that ``watch`` sees.
        """
        with watch or nullcontext():
            ShapeProp(self.module).propagate(*self.call.copied().inputs)
        fuse_attention_(self.module)
        fold_heads_(self.module)
        fold_patches_(self.module)
        simplify_(self.module)

    def hides_layers(self) -> bool:
        """Whether there are layers inside of modules that the graph takes as one operation."""
        called = [node for node in self.module.graph.nodes if node.op == "call_module"]
        modules = [self.module.get_submodule(str(node.target)) for node in called]
        return any(set(weighted_layers(module)) - {""} for module in modules)


def add_sparse_ways(candidates: Candidates, small: nn.Module) -> tuple[dict[str, Way], LayerWatch]:
    """Add ``small`` with sparse layers: from its graph, or where that does not do one by one.

    Return the ways by name, and what torch's layers take.
    """
    ways: dict[str, Way] = {}
    small = opened(small)
    watch = LayerWatch(small)
    if compiler_available():
        graph = _graph(candidates, small)
        if graph is not None:
            watch = LayerWatch(graph.module)
            made = candidates.attempt(
                "sparse", lambda: _from_graph(graph, watch, candidates.budget)
            )
            for name, way in (made or {}).items():
                if candidates.add(name, way.network):
                    ways[name] = way
            if "sparse" in ways:
                candidates.notes += left_to_torch(ways["sparse"].network)
            if made is not None and made.keys() <= ways.keys() and not graph.hides_layers():
                return ways, watch
            watch = LayerWatch(small)
        name = "layer by layer"
    else:
        candidates.notes.append(
            "no C compiler, so torch's CSR products are all there is for sparse layers"
        )
        name = "CSR"
    watch.run(candidates.call, candidates.budget)
    budget = candidates.budget.part(_TUNING)
    found = candidates.attempt(
        name, lambda: layer_by_layer(small, candidates.call, budget, REPLACED[name])
    )
    if found is not None and candidates.add(name, found[0]):
        ways[name] = Way(*found)
    return ways, watch


def _graph(candidates: Candidates, small: nn.Module) -> Graph | None:
    """Return the operations of ``small``; None where it is looked at in another way."""
    if "" in weighted_layers(small):
        return None  # one layer, whose graph is the inside of it
    if small._forward_hooks or small._forward_pre_hooks:
        candidates.notes.append("the network itself has hooks, which its graph would be without")
        return None
    call = candidates.call
    try:
        trace, arguments = traced(small, call.example)
    except UntraceableError as error:
        candidates.notes.append(f"{error}, so its layers are looked at one by one")
        return None
    values = Call(tuple(arguments(call.inputs, call.named)), {})
    return Graph(trace.module(small), arguments, values, Original.of(small))


def _from_graph(graph: Graph, watch: LayerWatch, budget: Budget) -> dict[str, Way]:
    """Return all layers sparse, and those alone that are then faster than torch's."""
    graph.prepare_(watch)
    sparse = in_parts(graph.module)
    if not sparse_networks(sparse):
        return {}
    times = tune_(sparse, graph.call, budget.part(_TUNING))
    if sum(watch.seconds.values()) < LONG:
        watch.run(graph.call, budget.part(0.1))
    ways = {"sparse": Way(graph.network(sparse), times)}
    tried: list[set[str]] = [set(), set(times)]
    for name, share in _MIXED.items():
        dense = {layer: share * watch.seconds.get(layer, 1e9) for layer in times}
        losing = {layer for layer, taken in times.items() if taken > _WORTH * dense[layer]}
        saved = sum(times[layer] - watch.seconds[layer] for layer in losing)
        if losing in tried or saved < _GAIN * sum(times.values()):
            continue
        tried.append(losing)
        mixed = in_parts(graph.module, losing)
        tune_alike_(mixed, sparse)
        left = {layer: taken for layer, taken in times.items() if layer not in losing}
        ways[name] = Way(graph.network(mixed), left, sorted(losing))
    return ways


def remade(candidates: Candidates, small: nn.Module, plan: DeploymentPlan) -> nn.Module | None:
    """Return the network of a plan; None where that cannot be made of ``small``, or differs."""
    name, call = plan.chosen, candidates.call

    def make() -> nn.Module | None:
        written = opened(small)
        if name in REPLACED:
            chosen, make_layer = plan.sparse_seconds.keys(), REPLACED[name]
            found = layer_by_layer(written, call, Budget(0.0), make_layer, chosen)
            return found and _tuned_(found[0], plan.tunings)
        graph = _graph(candidates, written)
        if graph is None:
            return None
        graph.prepare_()
        return graph.network(_tuned_(in_parts(graph.module, plan.dense), plan.tunings))

    if name in candidates.networks:
        return candidates.networks[name]
    network = small if name == "compacted" else candidates.attempt(name, make)
    return network if network is not None and candidates.add(name, network) else None


def _tuned_(network: nn.Module, tunings: Sequence[Tuning]) -> nn.Module:
    for part, tuning in zip(sparse_networks(network), tunings, strict=True):
        part.retune_(tuning)
    return network
