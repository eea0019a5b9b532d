"""Several processes share the examples and agree on the mask, to the last bit."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.processes import begin, free_port

MEMBER = Path(__file__).with_name("group_member.py")
PROGRAM = "import runpy; runpy.run_path(path)['main'](*arguments)"


MASKS = [
    *("MP", "LM", "QM", "GraSP", "shuffled", "data parallel", "QM, recalibrated"),
    *(f"{criterion} in shares" for criterion in ("QM", "EF-OBD", "GraSP", "SynFlow", "random")),
]


@pytest.fixture(scope="module")
def alone():
    spec = importlib.util.spec_from_file_location("group_member", MEMBER)
    member = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(member)
    return member.outcomes()


@pytest.fixture(
    scope="module",
    params=[pytest.param(2, marks=pytest.mark.full("two processes, beside three")), 3],
)
def group(request, tmp_path_factory):
    """What every process of a group of that size found."""
    folder, world, port = tmp_path_factory.mktemp("group"), request.param, free_port()
    files = [folder / f"{rank}.pt" for rank in range(world)]
    members = [
        begin(PROGRAM, path=str(MEMBER), arguments=(rank, world, port, file))
        for rank, file in enumerate(files)
    ]
    for member in members:
        member.join(120)
    assert [member.exitcode for member in members] == [0] * world
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("what", ["measured", "one example", "in shares"])
def test_statistics_are_those_of_one_process(alone, group, what):
    """19 examples in parts of different sizes, one, and shares that a sampler gave them.

    One is fewer than there are processes.
    """
    expected = alone[what]
    for member in group:
        found = member[what]
        assert found["examples"] == expected["examples"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        for statistic in ("gradient", "ggn_diagonal"):
            assert same(found[statistic], group[0][what][statistic])
            for name, tensor in expected[statistic].items():
                torch.testing.assert_close(found[statistic][name], tensor, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("what", MASKS)
def test_mask_is_that_of_one_process(alone, group, what):
    """Also where every process has a loader that shuffles from another state of its own.

    And where it has a share of its own of the data, from a ``DistributedSampler``.
    """
    for member in group:
        assert same(member[what]["mask"], alone[what]["mask"])
        assert member[what]["losses"] == pytest.approx(alone[what]["losses"], rel=1e-12)


@pytest.mark.parametrize("what", ["recalibrated", "recalibrated in shares"])
def test_recalibrated_statistics_are_those_of_one_process(alone, group, what):
    for member in group:
        assert same(member[what], group[0][what])
        for name, tensor in alone[what].items():
            torch.testing.assert_close(member[what][name], tensor, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("what", ["sensitivity", "sensitivity in shares"])
def test_sensitivity_is_that_of_one_process(alone, group, what):
    expected = alone[what]
    for member in group:
        assert member[what] == group[0][what]
        assert member[what]["examples"] == expected["examples"]
        for found, row in zip(member[what]["rows"], expected["rows"], strict=True):
            assert found["removed"] == row["removed"]
            for value in ("loss", "predicted_change"):
                assert found[value] == pytest.approx(row[value], rel=1e-10)


def test_moved_weights_are_those_of_one_process(alone, group):
    expected = alone["compensated"]
    assert any(expected["moved"])
    for member in group:
        found = member["compensated"]
        assert same(found["weights"], group[0]["compensated"]["weights"])
        for what in ("moved", "apart"):
            assert found[what] == expected[what]
        assert found["dampings"] == pytest.approx(expected["dampings"], rel=1e-8)
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-8, atol=1e-8)


def test_moved_weights_are_the_same_where_each_has_its_share(group):
    """Each sets a fifth of its own examples apart, which are others than those of one process."""
    for member in group:
        found, first = member["compensated in shares"], group[0]["compensated in shares"]
        assert same(found["weights"], first["weights"])
        assert found["dampings"] == first["dampings"]
        assert all(0 < apart < 40 / 5 + len(group) for apart in found["apart"])


def test_each_example_has_draws_of_its_own(alone, group):
    """Six different labels of 1000: two the same, by chance, would be less likely than 2 %."""
    assert alone["drawn"]["labels"] == 6
    for member in group:
        assert member["drawn"]["labels"] == 6
        # The caller's generator has moved alike everywhere, whatever each had to draw.
        assert torch.equal(member["drawn"]["generator"], group[0]["drawn"]["generator"])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
