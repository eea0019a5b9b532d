"""Second-order compensation: the weights that are left move to where they belong.

At θ ⊙ m, with gradient g and GGN matrix G, a stage that removes the weights R moves the network by
δ: δ_R = −θ_R is given, and of those that are left, S, δ_S is what minimises the damped model
gᵀδ + ½ δᵀ(G + λ I)δ,

    (G_SS + λ I) δ_S = −(g_S + G_SR δ_R),

found by conjugate gradients.  Sources: Hassibi & Stork, "Second order derivatives for network
pruning: Optimal Brain Surgeon", 1993, for the model; Singh & Alistarh, "WoodFisher", 2020, and
Benbaki et al., "Fast as CHITA", 2023, who take the empirical Fisher for G; Levenberg, 1944, and
Marquardt, 1963, for the choice of λ; Martens, "Deep learning via Hessian-free optimization", 2010,
for conjugate gradients with GGN products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lossprune.pruning.apart import Change, change, split
from lossprune.pruning.compensation import Compensation, CompensationRecord
from lossprune.pruning.conjugate_gradients import Solutions, solve
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.curvature.measure import Objective
from lossprune.pruning.curvature.network import MaskedNetwork, PrunableNetwork
from lossprune.pruning.curvature.products import GaussNewton
from lossprune.pruning.curvature.statistics import check_entries
from lossprune.pruning.errors import PruningError

# Conjugate gradients end where the residual is this small beside the right-hand side.
_TOLERANCE = 1e-12
# Backward passes that a preconditioner takes which is not measured anyway.
_DRAWS = 8
# What λ is multiplied by after a stage that kept its weights.
_RAISED = 4.0
# λ stays between these, in units of the mean of diag(G) over the weights that are left: smaller
# ones do not raise the loss apart either where removing alone has raised it much, and fit noise.
_LEAST, _MOST = 0.25, 1e4


@dataclass(frozen=True)
class Step:
    """Where a stage moves the weights, and how that came about.

    Attributes:
        values: by name, in the parameter's type; removed weights are 0.
        record: of it.
    """

    values: dict[str, Tensor]
    record: CompensationRecord


@torch.no_grad()
def compensate(
    objective: Objective,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    diagonal: Mapping[str, Tensor],
    settings: Compensation,
    damping: float | None,
    loss_before: float,
    last: bool,
) -> Step:
    """Return where the weights go that are left of a stage.

    Args:
        objective: the stage's examples, and the network whose θ it is.
        before: the mask at which the stage was measured.
        after: the mask that it ends with.
        diagonal: diag(G) by parameter name, as far as it was measured: for the preconditioner.
        settings: what is asked for.
        damping: λ of the stage before; None: there was none.
        loss_before: at the mask before, over the stage's examples.
        last: whether the mask is the final one.

    Raises:
        PruningError: too few examples to set some apart; a derivative is not finite.
    """
    network = objective.network
    names = moving(network, settings)
    kept = _of_all(network, names, after)
    fit, apart = split(list(objective.batches), settings.examples, "compensate", "damping")
    loss_without = objective.measure(after).loss
    model = _Model(objective, fit, names, _of_all(network, names, before), kept, diagonal)
    start = _bounded(damping, model.scale)
    tried = [_bounded(start * multiple, model.scale) for multiple in settings.dampings]
    found = model.solved(tuple(dict.fromkeys(tried)), settings.iterations)
    trial = replace(objective, batches=apart)
    without, each = trial.measure_each(after)
    changes = [
        change(_losses(trial.at(network.moved_to(model.values(solution.x))), after), each)
        for solution in found.of_each
    ]
    best = choose([s.damping for s in found.of_each], changes, last=last)
    chosen = None if best is None else found.of_each[best]
    return Step(
        model.masked if chosen is None else model.values(chosen.x),
        CompensationRecord(
            moved=chosen is not None,
            damping=chosen.damping if chosen else start * _RAISED,
            iterations=found.iterations,
            residual=found.residual,
            predicted_change=model.removal + (chosen.change if chosen else 0.0),
            predicted_change_without=model.removal,
            loss_without=loss_without,
            realised_change_without=loss_without - loss_before,
            apart=without.examples,
            loss_apart=without.loss + (0.0 if best is None else changes[best].mean),
            loss_apart_without=without.loss,
        ),
    )


def choose(dampings: Sequence[float], changes: Sequence[Change], *, last: bool) -> int | None:
    """Return which λ is taken by the losses on the examples apart; None: none lowers it.

    A stage that others follow takes the smallest λ whose step does not raise that loss.  What a
    long step fits of the examples' noise the next one replaces, on examples of its own, while what
    it gains stays.  With the final mask the λ with the least loss is taken.

    >>> found = [(0.1, 0.01), (-0.1, 0.01), (-0.2, 0.01), (-0.3, 0.5)]
    >>> changes = [Change(mean, error, examples=20) for mean, error in found]
    >>> choose([0.25, 1.0, 4.0, 16.0], changes, last=False)
    1
    >>> choose([0.25, 1.0, 4.0, 16.0], changes, last=True)
    2
    """
    lower = [k for k, found in enumerate(changes) if found.lowers]
    return min(lower, key=lambda k: changes[k].mean if last else dampings[k], default=None)


class _Model:
    """The quadratic model of a stage, over the weights that are left."""

    def __init__(
        self,
        objective: Objective,
        batches: Sequence[Batch],
        names: Sequence[str],
        before: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        diagonal: Mapping[str, Tensor],
    ) -> None:
        network = MaskedNetwork(objective.network.of(names), before)
        self._products = GaussNewton(
            network,
            batches,
            objective.loss,
            memory=objective.memory,
            sharded=objective.sharded,
        )
        self._kept = kept
        self._sizes = [int(where.count_nonzero()) for where in kept.values()]
        theta = {name: weight.detach() for name, weight in network.weights.items()}
        self.masked = {name: weight * kept[name] for name, weight in theta.items()}
        removal = self._products.expansion(
            {name: self.masked[name] - weight for name, weight in theta.items()}
        )
        for name, slope in removal.slope.items():
            check_entries("slope", name, slope)
        self.removal = removal.linear + 0.5 * removal.quadratic
        self._b = -self._gathered(removal.slope)
        if not diagonal.keys() >= set(names):
            sketch = self._products.sketched_diagonal(_DRAWS, objective.generator())
            diagonal = {**sketch, **diagonal}
        self._diagonal = self._gathered(diagonal)
        self.scale = float(self._diagonal.double().mean()) if len(self._diagonal) else 0.0

    def solved(self, dampings: Sequence[float], iterations: int) -> Solutions:
        """δ_S for every λ, the first of which builds the space."""
        return solve(
            lambda vector: self._gathered(self._products.product(self._scattered(vector))),
            self._b,
            lambda damping: self._diagonal + damping,
            dampings,
            iterations=iterations,
            tolerance=_TOLERANCE,
        )

    def values(self, step: Tensor) -> dict[str, Tensor]:
        """θ + δ of a δ_S, 0 where removed."""
        distributed.as_the_first_has_([step])
        moved = self._scattered(step)
        return {
            name: (weight + moved[name]).to(weight.dtype) for name, weight in self.masked.items()
        }

    def _gathered(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The entries that are left, one after the other."""
        return torch.cat([tensors[name][kept] for name, kept in self._kept.items()])

    def _scattered(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split(self._sizes)
        return {
            name: vector.new_zeros(kept.shape).masked_scatter_(kept, part)
            for (name, kept), part in zip(self._kept.items(), parts, strict=True)
        }


def moving(network: PrunableNetwork, settings: Compensation) -> tuple[str, ...]:
    """Return the names of the parameters that move."""
    if settings.parameters == "prunable":
        return network.names
    parameters = network.model.named_parameters()
    return tuple(name for name, value in parameters if value.is_floating_point())


def _of_all(
    network: PrunableNetwork, names: Sequence[str], mask: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The mask with all kept of what it does not name."""
    own = network.of(names).own
    return {
        name: mask[name] if name in mask else torch.ones_like(own[name], dtype=torch.bool)
        for name in names
    }


def _bounded(damping: float | None, scale: float) -> float:
    scale = scale or 1.0  # of a loss without curvature
    return scale if damping is None else min(max(damping, _LEAST * scale), _MOST * scale)


def _losses(objective: Objective, mask: Mapping[str, Tensor]) -> Tensor | None:
    """The loss of each example, None where their mean is not finite: a step may be far too long."""
    try:
        return objective.measure_each(mask)[1]
    except PruningError:  # as the network itself could be measured just before
        return None
