"""The passes that lay a sparse network out, from values to values."""

import itertools

import pytest
import torch

from lossprune.deployment.sparse.layout import laid_out, value_shapes, with_splits
from lossprune.deployment.sparse.steps import (
    MapSplit,
    MapSum,
    SparseConvolution,
    SparseStep,
    Weights,
)

STRIDED = SparseConvolution((4, 4, 3, 3), stride=(2, 2), padding=(1, 1))
PLAIN = SparseConvolution((4, 4, 3, 3), padding=(1, 1))
# Two branches of strided convolutions of one value, added: places are free again one by one.
STEPS = [
    SparseStep("stem", ("x",), "a", PLAIN),
    SparseStep("left", ("a",), "b", STRIDED),
    SparseStep("right", ("a",), "c", STRIDED),
    SparseStep("middle", ("c",), "d", PLAIN),
    SparseStep("sum", ("d", "b"), "e", MapSum()),
    SparseStep("last", ("e",), "f", PLAIN),
]
INPUTS = {"x": (4, 9, 7)}


def layout(blocked):
    weight = torch.rand(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weights = {
        step.target: Weights()
        if isinstance(step.operation, MapSum)
        else Weights.kept(weight * (weight < 0.3), None)
        for step in STEPS
    }
    return laid_out(STEPS, weights, INPUTS, ["f"], blocked=blocked, lanes=8)


def test_shapes_and_splits():
    split = with_splits(STEPS)
    assert [step.operation for step in split if step not in STEPS] == [MapSplit((2, 2))]
    assert split.index(STEPS[1]) == 2, "before the first convolution that reads it"
    shapes = value_shapes(split, INPUTS)
    assert shapes["a by 2x2"] == (16, 5, 4)
    assert {name: shapes[name] for name in "abcdef"} == {"a": (4, 9, 7)} | dict.fromkeys(
        "bcdef", (4, 5, 4)
    )


@pytest.mark.parametrize("blocked", [True, False])
def test_values_that_are_needed_together_lie_apart(blocked):
    found = layout(blocked)
    written = dict.fromkeys(INPUTS, -1) | {s.target: k for k, s in enumerate(found.steps)}
    read = {"f": len(STEPS) + 9}
    for k, step in enumerate(found.steps):
        tapped = [found.taps[step.target].value] if step.target in found.taps else []
        read |= dict.fromkeys([*step.reads, *tapped], k)
    places = {name: range(m.offset, m.offset + m.size) for name, m in found.maps.items()}
    for one, other in itertools.combinations(places, 2):
        together = written[one] <= read[other] and written[other] <= read[one]
        overlap = range(
            max(places[one].start, places[other].start), min(places[one].stop, places[other].stop)
        )
        assert not (together and overlap), (one, other)
    end = max(place.stop for place in places.values())
    assert end <= found.room
    assert end < sum(map(len, places.values())), "places are used again"


@pytest.mark.parametrize("blocked", [True, False])
def test_taps_read_within_the_halo(blocked):
    found = layout(blocked)
    for step in found.steps:
        taps = found.taps.get(step.target)
        if taps is None:
            continue
        source = found.maps[taps.value]
        at = source.origin + taps.dy * source.row + taps.dx
        assert at.min() >= 0
        _, rows, columns = found.shapes[step.target]
        last = (rows - 1) * taps.stride[0] * source.row + (columns - 1) * taps.stride[1]
        assert at.max() + last < source.plane
