"""What the benchmark of sparse convolutions times is the same layer, and its figures are right."""

from itertools import product

import pytest
import torch
from torch import nn

from benchmarks.convolution_layers import (
    DENSE,
    OURS,
    PEER,
    TURNED,
    Layer,
    measured,
    network_layers,
)
from benchmarks.convolution_tables import means, operations, ratios
from lossprune.kernels.compiler import compiler_available

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")


def small_layers() -> list[Layer]:
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(),
        nn.Linear(80, 5),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    mask = {
        name: torch.rand(weight.shape, generator=generator) < 0.4
        for name, weight in network.named_parameters()
        if name.endswith("weight")
    }
    return network_layers(network, mask, torch.zeros(1, 2, 4, 5))


def test_multiply_adds_are_those_of_kept_weights_within_the_map():
    _, second, linear = small_layers()
    count = 0
    for (_, _, row, column), y, x in product(second.mask.nonzero().tolist(), range(4), range(5)):
        count += 0 <= y + row - 1 < 4 and 0 <= x + column - 1 < 5
    assert second.multiply_adds == count
    assert linear.multiply_adds == linear.mask.sum()


@pytest.fixture
def own_threads():
    """As many as before, whatever number is timed."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("own_threads")
def test_all_engines_compute_the_layer_that_is_timed():
    for layer in small_layers():
        one, two = measured(layer, batch=17, threads=[1, 2], peer=None, rounds=2)
        assert {name.split()[0] for name in one["differences"]} == {DENSE, OURS, TURNED}
        assert max(one["differences"].values()) < 1e-5
        assert [row["threads"] for row in (one, two)] == [1, 2]
        assert operations(one, "backward") == (1 if layer.first else 2) * operations(one, "forward")


def test_ratios_are_to_the_fastest_layout_of_that_direction():
    seconds = {
        OURS: {"forward": [1.0, 2.0], "backward": [1.0, 1.0]},
        f"{PEER} over rows": {"forward": [2.0, 6.0], "backward": [9.0, 9.0]},
        f"{PEER} over batch": {"forward": [5.0, 5.0], "backward": [4.0, 4.0]},
    }
    row = {"seconds": seconds, "linear": False, "chosen": "sparse"}
    assert ratios(row, PEER, "forward") == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert ratios(row, DENSE, "forward") is None
    found = means([row, {**row, "linear": True}], PEER)
    assert found["backward, convolutions"] == {"geometric mean": 4.0, "least": 4.0}
