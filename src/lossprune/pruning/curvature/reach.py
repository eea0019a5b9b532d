"""Which weights the outputs of a network depend on: by the graph, not by any value."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import Node

from lossprune.pruning.curvature.layers import LayerCall

# What is raised where a gradient or curvature is asked for.
NOTHING = "the outputs do not depend on any prunable weight, so they say nothing of any"


def reached(
    outputs: Tensor, weights: Mapping[str, Tensor], calls: Iterable[LayerCall] = ()
) -> set[str]:
    """Return the names of the weights, or of the recorded calls, that the outputs come from.

    A layer behind a ReLU that is shut, or one whose gradient is zero, is among them.
    """
    leaves = {id(weight): name for name, weight in weights.items()}
    layers = {call.output.node: call.name for call in calls}
    found: set[str] = set()
    seen: set[Node] = set()
    waiting = [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in layers:
            found.add(layers[node])
        leaf = leaves.get(id(getattr(node, "variable", None)))  # of a node that ends at a tensor
        if leaf is not None:
            found.add(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found


def together(some: Sequence[str], every: Iterable[str]) -> tuple[str, ...]:
    """Return the outermost modules of which every name is among some, and the names left over.

    >>> together(["ema.a.weight", "ema.b.weight"], ["a.weight", "ema.a.weight", "ema.b.weight"])
    ('ema',)
    """
    gone = set(some)
    others = [name for name in every if name not in gone]
    found: dict[str, None] = {}
    for name in some:
        parts = name.split(".")
        heads = [".".join(parts[:count]) for count in range(1, len(parts))]
        alone = [h for h in heads if not any(other.startswith(f"{h}.") for other in others)]
        found[alone[0] if alone else name] = None
    return tuple(found)
