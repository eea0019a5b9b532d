"""Scopes: how many weights each layer loses, of those that a stage removes in all.

Globally, every saliency competes with every other one; per multiply-add, each is divided by those
that its weight takes part in first: the order in which what goes has the least saliency of all that
cost as much (that of the fractional knapsack: Dantzig, "Discrete-variable extremum problems",
1957).  The other scopes fix each layer's quota in
advance, from the layers' shapes alone.  With n_i weights in layer i, a share a_i for its shape and
K weights kept in all, layer i keeps

    k_i = min(n_i, ε a_i),  with the ε for which Σ k_i = K:

a layer that would keep more than it has is dense, and the others share the rest.  As K falls, no
k_i rises, so that stages are nested; quotas are the whole numbers nearest to n_i − k_i that sum to
exactly what the stage removes and are nowhere below what earlier stages removed.

Sources: per layer and uniform as in Gale, Elsen and Hooker, "The State of Sparsity in Deep Neural
Networks", 2019; Erdős–Rényi from Mocanu et al., "Scalable Training of Artificial Neural Networks
with Adaptive Sparse Connectivity", 2018, with kernels from Evci et al., "Rigging the Lottery",
2020.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lossprune.pruning.names import find_in

Shape = tuple[int, ...]
LATENCY = "latency"


@dataclass(frozen=True)
class Scope:
    """How the weights that are kept are shared among the layers.

    Attributes:
        name: what it is called.
        share: a_i of a weight's shape; None where all weights compete.
        keeps_last: whether the network's last layer stays dense.
        price: what saliencies are divided by before they compete; None: by nothing.
        description: one line for help texts and tables.
        by_row: whether the outputs of a layer lose the same share of its quota: each row of a
            weight then lets go of its smallest saliencies, whatever those of other rows are.
        prices: the same in numbers of at least 0, by parameter name, such as what
            :func:`lossprune.latency_scope` measures; None: they are not known beforehand.
        shares: a_i by parameter name, in the place of ``share``, such as what
            :func:`lossprune.outlier_scope` measures; None: the shape alone says it.
    """

    name: str
    share: Callable[[Shape], float] | None = field(repr=False)
    keeps_last: bool = False
    price: str | None = None
    description: str = ""
    by_row: bool = False
    prices: Mapping[str, float] | None = field(default=None, repr=False)
    shares: Mapping[str, float] | None = field(default=None, repr=False)

    @property
    def has_quotas(self) -> bool:
        """Whether each layer has a quota of its own, or all weights compete."""
        return self.share is not None or self.shares is not None


SCOPES: dict[str, Scope] = {
    "global": Scope("global", None, description="all weights compete"),
    "layer": Scope("layer", math.prod, description="every layer at the same sparsity"),
    "row": Scope(
        "row",
        math.prod,
        by_row=True,
        description="every output of every layer at the same sparsity",
    ),
    "uniform": Scope(
        "uniform",
        math.prod,
        keeps_last=True,
        description="every layer at the same sparsity, but the last one dense",
    ),
    "erdos-renyi": Scope(
        "erdos-renyi",
        lambda shape: (shape[0] + shape[1]) * math.prod(shape[2:]),
        description="density in proportion to (outputs + inputs) / (outputs · inputs)",
    ),
    "erdos-renyi-kernel": Scope(
        "erdos-renyi-kernel",
        sum,
        description="the same, with the kernel's sides in sum and product",
    ),
    "multiply-adds": Scope(
        "multiply-adds",
        None,
        price="multiply-adds",
        description="all weights compete by saliency per multiply-add that they take part in",
    ),
}


def find_scope(scope: str | Scope) -> Scope:
    """Return the scope of that name, or the scope given.

    Raises:
        ValueError: a name that is not in :data:`SCOPES`.
    """
    if isinstance(scope, Scope):
        return scope
    if scope == LATENCY:
        raise ValueError(
            "scope 'latency' goes by what is measured on this machine: give "
            "scope=lossprune.latency_scope(model, example)"
        )
    return find_in(SCOPES, scope, "scope")


def quotas(
    sizes: Mapping[str, int],
    shares: Mapping[str, float],
    count: int,
    *,
    removed: Mapping[str, int] | None = None,
    most: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return how many weights each layer has lost when ``count`` are gone in all.

    Args:
        sizes: n_i, weights of each layer.
        shares: a_i > 0, what the layers keep in proportion to.
        count: removed in all; at least the sum of ``removed``, at most that of ``most``.
        removed: how many each layer has lost already; 0 if not given.
        most: how many each may lose; n_i if not given.

    The ideal number lost is n_i − k_i, where k_i is as above, but never outside of these bounds;
    each layer gets it rounded down, and what is then missing goes one each to those with the
    largest remainders, of equal ones the first.

    >>> quotas({"a": 10, "b": 30}, {"a": 10, "b": 30}, 20)
    {'a': 5, 'b': 15}
    >>> quotas({"a": 10, "b": 90}, {"a": 20, "b": 40}, 60)  # a is dense, b keeps the other 30
    {'a': 0, 'b': 60}
    """
    removed = removed or dict.fromkeys(sizes, 0)
    most = most or dict(sizes)
    if not sum(removed.values()) <= count <= sum(most.values()):
        raise ValueError(
            f"count must be between {sum(removed.values())} and {sum(most.values())}, got {count}"
        )
    ideal = _ideal(sizes, shares, count, removed, most)
    quota = {name: max(removed[name], math.floor(ideal[name])) for name in sizes}
    missing = count - sum(quota.values())
    open_ = [name for name in sizes if quota[name] < most[name]]
    for name in sorted(open_, key=lambda name: quota[name] - ideal[name])[:missing]:
        quota[name] += 1
    return quota


def _ideal(
    sizes: Mapping[str, int],
    shares: Mapping[str, float],
    count: int,
    removed: Mapping[str, int],
    most: Mapping[str, int],
) -> dict[str, float]:
    """n_i − k_i, for k_i between n_i − most_i and n_i − removed_i."""
    bounds = {
        name: (float(size - most[name]), float(size - removed[name]))
        for name, size in sizes.items()
    }

    def kept(epsilon: float) -> list[float]:
        return [min(high, max(low, epsilon * shares[name])) for name, (low, high) in bounds.items()]

    target = sum(sizes.values()) - count
    # Σ k_i is linear in ε between the values at which a layer reaches one of its bounds.
    corners = sorted({bound / shares[name] for name, pair in bounds.items() for bound in pair})
    at = bisect_left(corners, target, key=lambda epsilon: sum(kept(epsilon)))
    if at in (0, len(corners)):
        found = kept(corners[min(at, len(corners) - 1)])
    else:
        low, high = kept(corners[at - 1]), kept(corners[at])
        part = (target - sum(low)) / (sum(high) - sum(low))
        found = [below + part * (above - below) for below, above in zip(low, high, strict=True)]
    return {name: size - k for (name, size), k in zip(sizes.items(), found, strict=True)}
