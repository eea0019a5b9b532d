"""Time as what weights cost, and as the end of a pruning: of the network as it is deployed here."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.channels.calls import Call
from lossprune.channels.costs import weighted_layers
from lossprune.deployment.deployed import Deployed
from lossprune.deployment.fastest import deploy
from lossprune.deployment.timing import clock, interleaved
from lossprune.pruning.choices import Choices
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.prunable import prunable_weights
from lossprune.pruning.scopes import LATENCY, Scope
from lossprune.pruning.wholeness import unwrapped

# Shares that are kept where layers are sparse, and far enough apart for a slope.
_DENSITIES = (0.03, 0.06, 0.12, 0.24)
_ROUNDS = 7

Points = list[tuple[float, float]]


def latency_scope(
    model: nn.Module,
    example: Any,
    *,
    seconds: float = 5.0,
    parameters: Choices | None = None,
    exclude: Choices | None = None,
) -> Scope:
    """Measure what a kept weight of each layer costs in time, as a scope of a pruning.

    The network is deployed under random masks of four densities.  The price of a layer's weight is
    the slope b of the line a + b · kept that fits the seconds of its sparse kernel with the least
    squares of relative errors; where it is not above 0, the seconds of a weight at the highest
    density.  A layer that is torch's dense one at each density costs what it costs, whatever it
    keeps: its weights have the price 0, and go last.

    Args:
        model: left as it is.
        example: a batch as it will come, as for :func:`lossprune.deploy`.
        seconds: what the comparisons of one of the four deployments may take.
        parameters: which weights are pruned, as in :func:`lossprune.prune`.
        exclude: which of them not.

    Raises:
        ValueError: there are no such weights.
        PruningError: the network does not run on ``example``; none of its layers is faster sparse.

    >>> network = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    >>> scope = latency_scope(network, torch.randn(1, 1024), seconds=0.1)
    >>> sorted(scope.prices)
    ['0.weight', '2.weight']
    """
    weights = prunable_weights(model, parameters, exclude=exclude)
    generator = torch.Generator().manual_seed(0)
    points: dict[str, Points] = defaultdict(list)
    for density in _DENSITIES:
        drawn = {
            name: torch.rand(weight.shape, generator=generator) < density
            for name, weight in weights.items()
        }
        mask = Mask({name: kept.to(weights[name].device) for name, kept in drawn.items()})
        for layer in deploy(model, mask, example, seconds=seconds).layers:
            if layer.kind == "sparse" and layer.sparse_seconds:
                points[layer.name].append((float(layer.kept), layer.sparse_seconds))
    if not points:
        raise PruningError(
            f"no layer of {type(model).__name__} is faster sparse here, so its weights cost no time"
        )
    layers = {layer.weight: name for name, layer in weighted_layers(unwrapped(model)).items()}
    prices = {name: slope(points.get(layers.get(w, ""), [])) for name, w in weights.items()}
    return Scope(LATENCY, None, price="seconds", prices=prices)


class DeployedTime:
    """Whether the network, deployed on this machine, takes at most a share of the dense one's time.

    As ``until`` of :func:`lossprune.prune` it ends a pruning with the first mask on its way that is
    fast enough.  Each mask that is asked about is deployed and timed beside the dense network, in
    turn: the medians of both are compared.  So a time is one of this machine, with torch's threads
    as they are, and differs from measurement to measurement by a few per cent.

    Args:
        model: the network that is pruned.
        example: a batch as it will come, as for :func:`lossprune.deploy`.
        share: of the dense network's time, in (0, 1).
        seconds: what the comparisons of one deployment may take.

    Raises:
        ValueError: ``share`` is not such a number.
    """

    def __init__(
        self, model: nn.Module, example: Any, share: float, *, seconds: float = 2.0
    ) -> None:
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not (number and 0 < share < 1):
            raise ValueError(
                f"share must be that of the dense network's time, a number in (0, 1), got {share!r}"
            )
        self._model, self._example, self._seconds = unwrapped(model), example, seconds
        self.share = float(share)

    def __repr__(self) -> str:
        return f"DeployedTime(share={self.share})"

    def __call__(self, mask: Mask, moved: Mapping[str, Tensor] | None = None) -> bool:
        """Whether the network at the mask is fast enough, with tensors that were moved, by name."""
        return self.measured(mask, moved) <= self.share

    @torch.no_grad()
    def measured(self, mask: Mask, moved: Mapping[str, Tensor] | None = None) -> float:
        """Return the share of the dense network's time that the deployed one takes."""
        call = Call.of(self._example).copied()
        if call.on_gpu:  # its calls return before they are done
            raise PruningError("DeployedTime times networks on a CPU, and the example is on a GPU")
        dense = copy.deepcopy(self._model).eval()
        own = dict((*dense.named_parameters(), *dense.named_buffers()))
        for name, value in (moved or {}).items():
            own[name].copy_(value)
        fast: Deployed = deploy(dense, mask, self._example, seconds=self._seconds)
        # As it is called by its users: a call of Call's also seeds.
        ways = [lambda n=network: n(*call.inputs, **call.named) for network in (fast, dense)]
        times = interleaved(ways, seconds=self._seconds / 4, least=_ROUNDS, now=clock())
        return times[0].median / times[1].median


def slope(points: Points) -> float:
    """Return b of the line a + b x that fits y > 0 with the least Σ ((a + b x − y) / y)².

    Where that is not above 0, y / x of the largest x; 0 of no points.

    >>> slope([(1.0, 3.0), (2.0, 5.0), (4.0, 9.0)])
    2.0
    """
    if not points:
        return 0.0
    weight = sum(y**-2 for _, y in points)
    middle = sum(x * y**-2 for x, y in points) / weight
    height = sum(y**-1 for _, y in points) / weight
    spread = sum((x - middle) ** 2 * y**-2 for x, y in points)
    found = sum((x - middle) * (y - height) * y**-2 for x, y in points) / spread if spread else 0.0
    x, y = max(points)
    return round(found, 18) if found > 0 else y / x
