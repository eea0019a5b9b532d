"""The losses: what is measured of the dense network, and the loss with one layer pruned."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lossprune.progress import Progress
from lossprune.pruning.criteria import CRITERIA, find_criterion
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.estimators import find_estimator
from lossprune.pruning.curvature.measure import Objective
from lossprune.pruning.curvature.statistics import Statistics
from lossprune.pruning.errors import PruningError
from lossprune.pruning.guessing import told_guess
from lossprune.pruning.layer_curves import LayerSensitivity, SensitivityPoint
from lossprune.pruning.objectives import objective_of
from lossprune.pruning.pace import Pace
from lossprune.pruning.scoring import Scoring
from lossprune.pruning.settings import Pruning
from lossprune.pruning.terms import term_of

_PREDICTING = CRITERIA["QM"]  # whose change of the loss is that of the quadratic diagonal model


@dataclass(frozen=True)
class LayerLosses:
    """What is known of the dense network, and the loss at any other.

    Attributes:
        pruning: what is asked for.
        statistics: at the dense network.
        term: what the criterion ranks by instead of the curvature, if anything.
        objective: the loss over the examples of every point.
        dense: that of the dense network.
        predicts: whether gradient and curvature are known.
    """

    pruning: Pruning
    statistics: Statistics
    term: Mapping[str, Tensor] | None
    objective: Objective
    dense: Statistics
    predicts: bool

    def told_guess(self) -> str | None:
        """Return what to tell of a network that knows no more than chance."""
        before_training = find_criterion(self.pruning.criterion).before_training
        return None if before_training else told_guess(self.dense.loss, self.objective.chance)

    def layers(self, sparsities: Sequence[float], told: Progress) -> Iterator[LayerSensitivity]:
        """Prune every layer alone to all sparsities."""
        names = self.pruning.network.names
        told.advance("layer", 0, len(names))
        for done, name in enumerate(names, start=1):
            layer = self._layer(name, sparsities)
            last = layer.points[-1]
            text = f"loss {last.realised_change:+.3g} at {last.sparsity:g}, {name}"
            told.advance("layer", done, len(names), text)
            yield layer

    @torch.no_grad()
    def _layer(self, name: str, sparsities: Sequence[float]) -> LayerSensitivity:
        pruning, weight = self.pruning, self.pruning.network.weights[name]
        criterion = find_criterion(pruning.criterion)
        scoring = Scoring(criterion, {name: weight}, self.statistics, self.term)
        assert pruning.penalty is not None  # a ladder is for stages, and refused
        saliencies = scoring.saliencies(pruning.penalty)
        predicting = Scoring(_PREDICTING, {name: weight}, self.statistics, None)
        selection = replace(pruning.selection, shapes={name: weight.shape})
        everything = {name: torch.ones_like(weight, dtype=torch.bool)}
        alone = self.objective.at(self.objective.network.of([name]))
        points = []
        for sparsity in sparsities:
            marked = selection.mark(saliencies, everything, selection.amount(sparsity))
            with naming(f"{name!r} at sparsity {sparsity:g}"):
                loss = alone.measure({name: ~marked[name]}).loss
            points.append(
                SensitivityPoint(
                    sparsity=sparsity,
                    removed=int(marked[name].count_nonzero()),
                    loss=loss,
                    realised_change=loss - self.dense.loss,
                    predicted_change=predicting.predicted_change(marked) if self.predicts else None,
                )
            )
        return LayerSensitivity(name, tuple(weight.shape), tuple(points))


def measure_layers(
    pruning: Pruning, held: Pruning | None, pace: Pace, *, predicts: bool
) -> LayerLosses:
    """Measure what the criterion and the prediction need, once; the loss is that of ``held``."""
    criterion = find_criterion(pruning.criterion)
    objective = objective_of(pruning, pruning.network, 1, pace)
    pace.begin(distributed.own_examples(objective.batches, sharded=pruning.sharded))
    weights = pruning.network.weights
    mask = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    term = term_of(criterion, objective, mask)
    curvature = criterion.curvature or predicts
    statistics = objective.measure(
        mask,
        gradient=criterion.gradient or predicts,
        estimator=find_estimator(pruning.estimator) if curvature else None,
    )
    if held is not None:
        with naming("validation"):
            objective = objective_of(held, held.network, 1, pace)
        pace.begin(distributed.own_examples(objective.batches, sharded=pruning.sharded))
    # Measured as every point is, so that where nothing changes the change is 0 to the bit.
    dense = objective.measure(mask)
    pace.end()
    return LayerLosses(pruning, statistics, term, objective, dense, predicts)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say of what was wrong that it is wrong of this."""
    try:
        yield
    except ValueError as error:
        raise PruningError(f"{what}: {error}") from error
