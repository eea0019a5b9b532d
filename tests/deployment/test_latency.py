"""Scopes by measured time, and prunings that end where the deployed network is fast enough."""

import copy

import pytest
import torch
from torch import nn

import lossprune
from lossprune import PruningError
from lossprune.deployment.latency import slope
from lossprune.pruning import Scope


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))


EXAMPLE = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))


def test_the_slope_is_that_of_the_least_relative_squares():
    points = [(100.0, 3e-5), (220.0, 4.1e-5), (410.0, 7.3e-5), (800.0, 1.1e-4)]
    x, y = torch.tensor(points, dtype=torch.float64).T
    wanted = torch.linalg.lstsq(torch.stack([1 / y, x / y], 1), torch.ones(4, 1).double()).solution
    assert slope(points) == pytest.approx(float(wanted[1]), rel=1e-9)
    assert slope([(1.0, 2.0), (4.0, 1.0)]) == 0.25
    assert slope([(5.0, 1.0)]) == 0.2
    assert slope([]) == 0.0


def test_weights_compete_by_saliency_per_price():
    net = network()
    prices = {"0.weight": 1.0, "2.weight": 3.0}
    scope = Scope("latency", None, price="seconds", prices=prices)
    mask = lossprune.prune(net, "MP", sparsity=0.7, scope=scope).mask
    parts = [net.get_parameter(n).detach() ** 2 / 2 / price for n, price in prices.items()]
    flat = torch.cat([part.flatten() for part in parts])
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[: round(0.7 * len(flat))]] = False
    for name, wanted in zip(prices, kept.split([p.numel() for p in parts]), strict=True):
        assert torch.equal(mask[name].flatten(), wanted)


def test_what_saves_no_time_goes_last():
    scope = Scope("latency", None, price="seconds", prices={"0.weight": 1.0, "2.weight": 0.0})
    mask = lossprune.prune(network(), "MP", sparsity=0.9, scope=scope).mask
    assert bool(mask["2.weight"].all())


@pytest.mark.parametrize("price", [None, -1.0, float("inf")])
def test_a_weight_without_a_price(price):
    scope = Scope("latency", None, price="seconds", prices={"0.weight": 1.0, "2.weight": price})
    with pytest.raises(ValueError, match=r"scope.prices must have a number .* for '2.weight'"):
        lossprune.prune(network(), "MP", sparsity=0.5, scope=scope)


def test_the_name_alone_says_how_it_is_measured():
    with pytest.raises(ValueError, match=r"give scope=lossprune.latency_scope\(model, example\)"):
        lossprune.prune(network(), "MP", sparsity=0.5, scope="latency")


@pytest.mark.parametrize("share", [0, 1, -0.5, True, "half", None])
def test_a_share_of_the_time(share):
    with pytest.raises(ValueError, match=r"share must be that of the dense network's time"):
        lossprune.DeployedTime(network(), EXAMPLE, share)


class TestOnThisMachine:
    """Times are the machine's: only what holds of any is asked."""

    @pytest.fixture(autouse=True)
    def one_thread(self):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def test_a_pruning_ends_where_the_network_is_fast_enough(self):
        net = network()
        scope = lossprune.latency_scope(net, EXAMPLE, seconds=0.1)
        assert scope.prices["0.weight"] > 0
        fast_enough = lossprune.DeployedTime(net, EXAMPLE, 0.5, seconds=0.1)
        result = lossprune.prune(net, "MP", scope=scope, until=fast_enough)
        assert 0 < result.mask.removed < result.mask.total
        before = copy.deepcopy(net)
        deployed = lossprune.deploy(net, result.mask, EXAMPLE, seconds=0.1)
        result.apply_(before)
        torch.testing.assert_close(deployed(EXAMPLE), before(EXAMPLE))
        assert fast_enough.measured(result.mask) < 0.8  # of 0.5, whatever else runs here

    def test_moved_weights_are_those_that_are_deployed(self):
        net = network()
        mask = lossprune.prune(net, "MP", sparsity=0.95).mask
        moved = {"0.weight": torch.zeros_like(net[0].weight)}
        share = lossprune.DeployedTime(net, EXAMPLE, 0.5, seconds=0.2)
        assert share.measured(mask, moved) > 0
        assert not torch.equal(net[0].weight, moved["0.weight"])

    def test_a_share_that_no_mask_reaches(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        fast_enough = lossprune.DeployedTime(net, torch.randn(1, 4), 1e-6, seconds=0.1)
        with pytest.raises(PruningError, match=r"DeployedTime\(share=1e-06\) does not hold even"):
            lossprune.prune(net, "MP", until=fast_enough)
