"""What each layer costs alone: the loss against the sparsity of one layer, the others dense."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lossprune.pruning.names import counted, did_you_mean, listed

_CELL = 11  # signs of a column of the table
_MOST_NAMED = 4


@dataclass(frozen=True)
class SensitivityPoint:
    """One layer at one sparsity.

    Attributes:
        sparsity: as asked for.
        removed: how many of the layer's weights are gone: round(κ · n) of n.
        loss: with these removed and all other layers dense.
        realised_change: ``loss`` less that of the dense network, over the same examples.
        predicted_change: Σ −g θ + ½ h θ² over the removed weights; None where no curvature was
            measured.
    """

    sparsity: float
    removed: int
    loss: float
    realised_change: float
    predicted_change: float | None


@dataclass(frozen=True)
class LayerSensitivity:
    """The points of one layer, in rising sparsity.

    Attributes:
        name: of its weight.
        shape: of its weight.
        points: one for each sparsity.
    """

    name: str
    shape: tuple[int, ...]
    points: tuple[SensitivityPoint, ...]

    @property
    def total(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    def within(self, max_loss_increase: float) -> float:
        """Return the largest sparsity up to which no point costs more; 0 where the first does.

        Args:
            max_loss_increase: what the loss may rise by, a number of at least 0.
        """
        if not max_loss_increase >= 0:
            raise ValueError(
                f"max_loss_increase must be a number of at least 0, got {max_loss_increase!r}"
            )
        reached = 0.0
        for point in self.points:
            if point.realised_change > max_loss_increase:
                break
            reached = point.sparsity
        return reached


@dataclass(frozen=True, eq=False)
class Sensitivity(Mapping[str, LayerSensitivity]):
    """The loss against the sparsity of each layer alone, by the name of its weight.

    Attributes:
        criterion: by which weights were removed.
        loss: of the dense network, over the examples of every point.
        examples: how many these are.
        layers: in the network's order.
        unused: names of the weights that the outputs do not depend on, as in
            :class:`PruningResult`: their removal changes nothing.
        no_prediction: why no point has a predicted change; empty where they have.
        left_out: names of matrices that are no layers here, as they are not pruned by default;
            empty where they are few, or which weights are layers was asked for.

    >>> point = SensitivityPoint(0.5, 2, 1.3, 0.1, 0.08)
    >>> found = Sensitivity("QM", 1.2, 100, (LayerSensitivity("fc.weight", (2, 2), (point,)),))
    >>> found
    Sensitivity(QM, 1 layer at 1 sparsity, loss 1.2, 100 examples)
    >>> print(found)
    change of the loss, 1.2 over 100 examples, by QM in one layer at a time; below it the predicted
    weight             0.5
    fc.weight         +0.1
      predicted      +0.08
    >>> found["fc.weight"].within(0.05), found.within(0.2)
    (0.0, {'fc.weight': 0.5})
    """

    criterion: str
    loss: float
    examples: int
    layers: tuple[LayerSensitivity, ...]
    unused: tuple[str, ...] = ()
    no_prediction: str = ""
    left_out: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LayerSensitivity:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"{name}{did_you_mean(name, self)}")

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Those of every layer, rising."""
        return tuple(point.sparsity for point in self.layers[0].points)

    def ranked(self, sparsity: float | None = None) -> tuple[str, ...]:
        """Return the names, first of those whose pruning raises the loss most.

        Args:
            sparsity: at which; one of :attr:`sparsities`, the largest if not given.
        """
        sparsity = self.sparsities[-1] if sparsity is None else sparsity
        if sparsity not in self.sparsities:
            raise ValueError(
                f"sparsity must be one of those measured, {', '.join(map(str, self.sparsities))}, "
                f"got {sparsity!r}"
            )
        place = self.sparsities.index(sparsity)
        order = sorted(self.layers, key=lambda layer: -layer.points[place].realised_change)
        return tuple(layer.name for layer in order)

    def within(self, max_loss_increase: float) -> dict[str, float]:
        """Return the largest sparsity of each layer alone that costs at most so much, by name.

        What several layers cost together is more than that of each, and is not in it.
        """
        return {layer.name: layer.within(max_loss_increase) for layer in self.layers}

    def told_left_out(self) -> str:
        """Return what to tell of the matrices left out, in one sentence without its end."""
        named = listed(self.left_out, most=_MOST_NAMED)
        return f"{named}: matrices that are not pruned by default, and no layers here"

    def rows(self) -> list[dict[str, Any]]:
        """Return all points, each with its layer and the number of weights there: for a frame."""
        return [
            {"layer": layer.name, "weights": layer.total, **asdict(point)}
            for layer in self.layers
            for point in layer.points
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return it in lists, dicts, numbers and texts, for a record."""
        return asdict(self)

    def __repr__(self) -> str:
        sparsities = counted(len(self.sparsities), "sparsity", "sparsities")
        return (
            f"Sensitivity({self.criterion}, {counted(len(self), 'layer')} at {sparsities}, "
            f"loss {self.loss:.5g}, {counted(self.examples, 'example')})"
        )

    def __str__(self) -> str:
        told = f"change of the loss, {self.loss:.5g} over {counted(self.examples, 'example')}, "
        told += f"by {self.criterion} in one layer at a time; "
        told += (
            f"no prediction: {self.no_prediction}"
            if self.no_prediction
            else ("below it the predicted")
        )
        width = max(len("  predicted"), *map(len, self))
        lines = [told, _line("weight", width, [f"{kappa:g}" for kappa in self.sparsities])]
        for layer in self.layers:
            realised = [f"{point.realised_change:+.3g}" for point in layer.points]
            lines.append(_line(layer.name, width, realised))
            if not self.no_prediction:
                predicted = [f"{point.predicted_change:+.3g}" for point in layer.points]
                lines.append(_line("  predicted", width, predicted))
        return "\n".join(lines)


def _line(name: str, width: int, cells: list[str]) -> str:
    return name.ljust(width) + "".join(cell.rjust(_CELL) for cell in cells)
