"""Shares of layers by their outliers, against the definition."""

import pytest
import torch
from torch import nn

import lossprune
from lossprune.pruning import Scope, prune_by_stage

N = 40


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 4)
    ).double()
    with torch.no_grad():
        model[0].weight[::3, 2] *= 30
        model[2].weight[0, :4] *= 20
    return model


X = torch.randn(N, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
DATA = [(X[:25], torch.arange(25) % 4), (X[25:], torch.arange(15) % 4)]


def outliers(model, times):
    """The share of each layer's scores that are above so many times their mean."""
    found, x = {}, X
    for index, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            score = layer.weight.detach().abs() * x.norm(dim=0)
            found[f"{index}.weight"] = float((score > times * score.mean()).double().mean())
        x = layer(x).detach()
    return found


@pytest.mark.parametrize(("sparsity", "spread", "times"), [(0.5, 0.08, 5.0), (0.7, 0.2, 3.0)])
def test_layers_that_stand_out_keep_more(sparsity, spread, times):
    model = network()
    share = outliers(model, times)
    sizes = {name: model.get_parameter(name).numel() for name in share}
    middle = sum(share[name] * sizes[name] for name in sizes) / sum(sizes.values())
    off = {name: share[name] - middle for name in sizes}
    most = max(map(abs, off.values()))
    scope = lossprune.outlier_scope(model, DATA, sparsity, outlier=times, spread=spread)
    mask = lossprune.prune(model, "Wanda", sparsity=sparsity, data=DATA, scope=scope).mask
    assert mask.removed == round(sparsity * mask.total)
    for layer in mask.layers():
        density = 1 - sparsity + spread * off[layer.name] / most
        assert abs(layer.kept - density * layer.total) < 1
        lost = (~mask[layer.name]).sum(1)
        assert lost.max() - lost.min() <= 1
    assert len({round(layer.sparsity, 3) for layer in mask.layers()}) > 1


def test_stages_are_nested_and_exact():
    model = network()
    scope = lossprune.outlier_scope(model, DATA, 0.8)
    before = lossprune.Mask.dense(model)
    for mask, record in prune_by_stage(model, "MP", sparsity=0.8, stages=5, scope=scope):
        target = lossprune.sparsities("exponential", 0.8, 5)[record.stage - 1]
        assert mask.removed == round(target * mask.total)
        assert not any((mask[name] & ~before[name]).any() for name in mask)
        before = mask


def test_without_outliers_all_layers_lose_alike():
    model = network()
    scope = lossprune.outlier_scope(model, DATA, 0.5, outlier=1e9)
    one = lossprune.prune(model, "Wanda", sparsity=0.5, data=DATA, scope=scope).mask
    assert one == lossprune.prune(model, "Wanda", sparsity=0.5, data=DATA).mask


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be a number above 0 and below 1, got 1\.0"),
        ({"spread": 0.6}, r"spread must be a number at least 0 and below 0\.5, got 0\.6"),
        ({"spread": -0.1}, r"spread must be a number at least 0 and below 0\.5, got -0\.1"),
        ({"outlier": 0}, "outlier must be a number above 0 and below inf, got 0"),
    ],
)
def test_numbers_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        lossprune.outlier_scope(network(), DATA, **{"sparsity": 0.5, **settings})


def test_a_scope_with_shares_names_every_weight():
    scope = Scope("mine", None, shares={"0.weight": 1.0, "2.weight": 2.0})
    with pytest.raises(ValueError, match=r"scope.shares must have a number.*None for '4\.weight'"):
        lossprune.prune(network(), "MP", sparsity=0.5, scope=scope)
    mask = lossprune.prune(network(), "MP", sparsity=0.5, scope=scope, exclude="4").mask
    assert [layer.kept for layer in mask.layers()] == [160, 320]
