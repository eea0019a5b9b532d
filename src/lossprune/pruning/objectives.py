"""The loss of a network over the examples that a stage is given."""

from collections.abc import Callable

import torch

from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.examples import take
from lossprune.pruning.curvature.losses import find_loss
from lossprune.pruning.curvature.measure import Objective
from lossprune.pruning.curvature.network import PrunableNetwork
from lossprune.pruning.curvature.probe import Costs, checked_memory
from lossprune.pruning.settings import Pruning


def objective_of(
    pruning: Pruning,
    network: PrunableNetwork,
    stage: int,
    heard: Callable[[float, int], None],
    earlier: Costs | None = None,
) -> Objective:
    """Return the loss of ``network`` over the examples of a stage: none where there is no data.

    ``heard`` and ``earlier`` are as in :class:`Objective`.
    """
    batches = []
    if pruning.data is not None:
        with distributed.together(network.device):
            batches = list(
                take(pruning.data, pruning.examples, pruning.forward, sharded=pruning.sharded)
            )
    return Objective(
        network,
        batches,
        find_loss(pruning.loss),
        memory=checked_memory(pruning.memory, network.weights),
        generator=lambda: _generator(pruning.seed, stage),
        sharded=pruning.sharded,
        heard=heard,
        earlier=earlier,
        frugal=True,
    )


def _generator(seed: int | None, stage: int) -> torch.Generator:
    """What a stage draws from: torch's global generator, or one of the stage's own."""
    if seed is None:
        return torch.default_generator
    # A seed far from those of other stages and of seeds close by.
    return torch.Generator().manual_seed((int(seed) * 1_000_003 + stage * 998_244_353) % 2**63)
