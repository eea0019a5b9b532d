"""Several processes train as one: the same steps to rounding, each other's equals to the bit."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from lossprune.training.batch_norm import SharedBatchNorm, share_batch_norm_
from tests.processes import begin, free_port

MEMBER = Path(__file__).with_name("group_member.py")
PROGRAM = "import runpy; runpy.run_path(path)['main'](*arguments)"

# Of sums in another order, through a few steps of a network in double precision; and through 26 of
# the MLP, which is in single precision, as is the sum of the losses on the way.
ROUNDING, SINGLE = 1e-9, 1e-5
# A batch norm in single precision of inputs around 4096: it rounds their mean by up to 2.4e-4. The
# difference of E[x²] and E[x]² would be off by 1, where the variance is 9.
FAR = 1e-3


@pytest.fixture(scope="module")
def alone():
    spec = importlib.util.spec_from_file_location("training_group_member", MEMBER)
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


TRAININGS = ["masked mlp", "fewer examples than processes", "augmented", "batch norm", "vgg"]


@pytest.mark.parametrize("what", TRAININGS)
def test_training_is_that_of_one_process(alone, group, what):
    """Weights, running statistics, losses on the way and evaluations."""
    expected = alone[what]
    for member in group:
        found = member[what]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            single = what == "masked mlp" or name == "losses"
            assert_close(found[name], value, name, SINGLE if single else ROUNDING)


@pytest.mark.parametrize("what", TRAININGS)
def test_the_processes_agree_to_the_last_bit(group, what):
    for member in group[1:]:
        for name, value in group[0][what].items():
            assert torch.equal(member[what][name], value), name


def test_removed_weights_stay_at_zero(group):
    for member in group:
        found = member["masked mlp"]
        for name in ("fc1.weight", "fc2.weight", "fc3.weight"):
            assert torch.equal(found[name] != 0, found[f"mask.{name}"])


@pytest.mark.parametrize("norm", ["2d", "1d", "average", "plain", "untracked", "two", "far"])
def test_batch_norm_is_that_of_the_whole_batch(alone, group, norm):
    """Outputs, gradients in the inputs, and both statistics; gradients in γ and β as shares."""
    expected = alone["norms"][norm]
    found = [member["norms"][norm] for member in group]
    tolerance = FAR if norm == "far" else ROUNDING
    for name, value in expected.items():
        if name.startswith("share."):
            assert_close(torch.cat([it[name] for it in found]), value, name, tolerance)
        elif name.startswith("grad."):
            assert_close(sum(it[name] for it in found), value, name, tolerance)
        else:
            for it in found:
                assert_close(it[name], value, name, tolerance)


def test_a_batch_norm_of_several_names_is_replaced_under_all():
    norm = nn.BatchNorm1d(4)
    network = nn.ModuleDict({"twice": nn.Sequential(norm, nn.ReLU(), norm), "again": norm})
    share_batch_norm_(network)
    assert isinstance(network["again"], SharedBatchNorm)
    assert network["twice"][0] is network["twice"][2] is network["again"]


def assert_close(found, expected, name, tolerance):
    assert found.dtype == expected.dtype, name
    if not expected.is_floating_point():
        assert torch.equal(found, expected), name
        return
    # Relative to the largest: small entries are differences of large ones.
    allowed = tolerance * max(float(expected.abs().max()), 1e-3)
    assert float((found - expected).abs().max()) <= allowed, name
