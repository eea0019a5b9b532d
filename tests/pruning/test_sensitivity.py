"""Each layer alone, at several sparsities, against a loop of plain torch in double precision."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lossprune
from lossprune.pruning import PruningError, SensitivityPoint
from lossprune.pruning.layer_curves import LayerSensitivity

STEPS = (0.3, 0.6, 0.95)


class Shared(nn.Module):
    """A convolution, batch norm that tracks, a layer that runs twice, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.cells = nn.ModuleList([nn.Linear(36, 36)] * 2)
        self.head = nn.Linear(36, 3)
        self.spare = nn.Linear(4, 4)

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv(x))).flatten(1)
        for cell in self.cells:
            x = torch.tanh(cell(x))
        return self.head(x)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = Shared().double()
    network.norm(torch.randn(50, 4, 3, 3, dtype=torch.float64))  # moves its statistics
    return network


def examples():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 2, 5, 5, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(3, (40,), generator=generator)


def batches():
    inputs, targets = examples()
    return list(zip(inputs.split(16), targets.split(16), strict=True))


SALIENCIES = {
    "MP": lambda theta, g, h: theta**2 / 2,
    "LM": lambda theta, g, h: (g * theta).abs(),
    "QM": lambda theta, g, h: (h * theta**2 / 2 - g * theta).abs(),
    "OBD": lambda theta, g, h: h * theta**2 / 2,
}


@pytest.mark.parametrize("criterion", SALIENCIES)
def test_every_point_is_that_of_a_plain_loop(network, by_autograd, criterion):
    reg = 1e-4
    found = lossprune.sensitivity(network, batches(), criterion, sparsities=STEPS, reg=reg)
    inputs, targets = examples()
    dense, gradient, diagonal = by_autograd(network, inputs, targets)
    assert found.loss == pytest.approx(dense, rel=1e-12)
    assert (found.examples, found.unused, found.no_prediction) == (40, ("spare.weight",), "")
    assert list(found) == ["conv.weight", "cells.0.weight", "head.weight", "spare.weight"]
    for name, layer in found.items():
        theta = dict(network.named_parameters())[name].detach()
        g, h = gradient[name], diagonal[name]
        saliency = SALIENCIES[criterion](theta, g, h) + reg / 2 * theta**2
        order = saliency.flatten().sort(stable=True).indices
        change = (-g * theta + h * theta**2 / 2).flatten()
        for sparsity, point in zip(STEPS, layer.points, strict=True):
            removed = round(sparsity * theta.numel())
            assert (point.sparsity, point.removed) == (sparsity, removed)
            pruned = copy.deepcopy(network).eval()
            with torch.no_grad():
                dict(pruned.named_parameters())[name].view(-1)[order[:removed]] = 0
                loss = float(F.cross_entropy(pruned(inputs), targets))
            assert point.loss == pytest.approx(loss, rel=1e-10)
            assert point.realised_change == pytest.approx(loss - dense, abs=1e-10)
            predicted = float(change[order[:removed]].sum())
            assert point.predicted_change == pytest.approx(predicted, rel=1e-8, abs=1e-12)


def test_examples_are_read_once_and_losses_may_be_on_others(network):
    inputs, targets = examples()
    found = lossprune.sensitivity(
        network, iter(batches()), "LM", examples=20, validation=[(inputs[20:], targets[20:])]
    )
    alone = lossprune.sensitivity(network, [(inputs[:20], targets[:20])], "LM")
    assert found.sparsities == alone.sparsities == (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    with torch.no_grad():
        loss = float(F.cross_entropy(network.eval()(inputs[20:]), targets[20:]))
    assert found.loss == pytest.approx(loss, rel=1e-12)
    for name, layer in found.items():
        for point, on_the_same in zip(layer.points, alone[name].points, strict=True):
            assert point.predicted_change == on_the_same.predicted_change
            assert point.realised_change == point.loss - found.loss


def test_a_network_that_guesses_is_asked_whether_it_is_trained(network):
    told = r"before pruning is [\d.]+, and that of guessing among 3 classes 1.099: is it trained"
    with pytest.warns(UserWarning, match=told) as warned:
        lossprune.sensitivity(network, batches(), "LM")
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lossprune.sensitivity(network, batches(), "random", estimator=None)


def test_matrices_that_are_no_layers_by_default_are_told():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.eye(25, dtype=torch.float64))
            self.head = nn.Linear(25, 3).double()

        def forward(self, x):
            return self.head(x[:, 0].flatten(1) @ self.mix)

    settings = {"sparsities": (0.5,), "estimator": None}
    with pytest.warns(UserWarning, match="^mix: matrices that are not pruned .* in parameters="):
        found = lossprune.sensitivity(Mixed(), batches(), "MP", **settings)
    assert (list(found), found.left_out) == (["head.weight"], ("mix",))
    for chosen, names in ((["*", "mix"], ["mix", "head.weight"]), ("*", ["head.weight"])):
        found = lossprune.sensitivity(Mixed(), batches(), "MP", parameters=chosen, **settings)
        assert (list(found), found.left_out) == (names, ())


def test_weights_that_are_zero_go_first_and_cost_nothing(network):
    mask = lossprune.prune(network, "MP", sparsity=0.6, scope="layer").mask
    mask.apply_(network)
    found = lossprune.sensitivity(network, batches(), sparsities=(0.2, 0.59, 0.9))
    for name, layer in found.items():
        assert [point.realised_change for point in layer.points[:2]] == [0.0, 0.0], name
        assert [point.predicted_change for point in layer.points[:2]] == [0.0, 0.0], name
        assert (layer.points[2].realised_change != 0) == (name != "spare.weight")


def test_a_pattern_has_one_sparsity(network):
    found = lossprune.sensitivity(network, batches(), "MP", pattern="1:2", exclude="spare")
    assert found.sparsities == (0.5,)
    expected = lossprune.prune(network, "MP", data=batches(), pattern="1:2", parameters="head")
    point = found["head.weight"].points[0]
    assert point.loss == pytest.approx(expected.stages[0].loss_after, rel=1e-14)


@pytest.mark.parametrize("criterion", ["MP", "LM", "EF-OBD", "random"])
def test_nothing_is_predicted_for_a_loss_without_curvature(network, criterion):
    def quartic(outputs, targets):
        return (outputs**4).mean(1)

    found = lossprune.sensitivity(network, batches(), criterion, sparsities=(0.5,), loss=quartic)
    assert "quartic, a plain function, is not known" in found.no_prediction
    assert {point["predicted_change"] for point in found.rows()} == {None}
    assert found.no_prediction in str(found)
    with pytest.raises(PruningError, match="Hessian in the outputs is not known"):
        lossprune.sensitivity(network, batches(), "QM", loss=quartic)
    fisher = lossprune.sensitivity(
        network, batches(), criterion, loss=quartic, estimator="empirical-fisher"
    )
    assert fisher.no_prediction == ""


def test_without_curvature_nothing_is_predicted(network):
    found = lossprune.sensitivity(network, batches(), "MP", estimator=None)
    with_it = lossprune.sensitivity(network, batches(), "MP")
    assert found.no_prediction == "no curvature was asked for"
    for one, other in zip(found.rows(), with_it.rows(), strict=True):
        assert other["predicted_change"] is not None
        assert one == {**other, "predicted_change": None}


def test_complex_weights_are_pruned_by_magnitude_and_not_predicted():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(25, 4, bias=False, dtype=torch.complex128)
            self.head = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.head(self.mix(x[:, 0].flatten(1).cdouble()).abs())

    torch.manual_seed(0)
    network = Complex()
    with pytest.raises(PruningError, match=r"'mix.weight' is complex.* estimator=None, or exclude"):
        lossprune.sensitivity(network, batches(), "MP")
    found = lossprune.sensitivity(network, batches(), "MP", estimator=None)
    assert found["mix.weight"].points[-1].removed == 98


def test_a_loss_that_is_not_finite_is_of_a_layer_and_a_sparsity(network):
    class Reciprocal(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Linear(1, 8, bias=False)
            self.network = network

        def forward(self, x):
            return self.network(x) / self.scale.weight.count_nonzero().sub(4).clamp(min=0)

    model = Reciprocal().double()
    with pytest.raises(
        PruningError, match=r"'scale.weight' at sparsity 0.8: the loss is not finite \((nan|inf)\)"
    ):
        lossprune.sensitivity(model, batches(), "MP", estimator=None, sparsities=(0.2, 0.8))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": None}, "sensitivity needs data: an iterable"),
        ({"criterion": "QMM"}, "unknown criterion 'QMM'.*did you mean 'QM'"),
        ({"sparsities": ()}, "sparsities must be rising numbers between 0 and 1"),
        ({"sparsities": 0.5}, r"such as \(0.5, 0.9\), got 0.5"),
        ({"sparsities": (0.9, 0.5)}, r"rising numbers .*, got \(0.9, 0.5\)"),
        ({"sparsities": (0.5, 1)}, r"between 0 and 1.*, got \(0.5, 1\)"),
        ({"sparsities": (0.5, float("nan"))}, "between 0 and 1"),
        ({"pattern": "1:2", "sparsities": (0.9,)}, r"that of pattern '1:2' alone, \(0.5,\), or"),
        ({"estimator": None}, "'QM' needs the curvature, which estimator=None leaves out"),
        ({"estimator": "exakt"}, "unknown estimator 'exakt'"),
        ({"examples": 0}, "examples must be a whole number of at least 1"),
        ({"reg": -1.0}, "reg must be a number of at least 0"),
        ({"memory": 0}, "memory must be a whole number of bytes"),
        ({"progress": "yes"}, "progress must be True, False or None"),
        ({"exclude": "nothing"}, "'nothing'"),
        ({"validation": 3}, "validation: data must be an iterable of batches, got int"),
        ({"validation": []}, "validation: the data has no examples"),
    ],
)
def test_wrong_arguments_are_refused(network, settings, said):
    with pytest.raises(ValueError, match=said):
        lossprune.sensitivity(network, **{"data": batches(), **settings})


def test_layers_are_ranked_and_cut_where_they_cost_too_much():
    def layer(name, *changes):
        points = tuple(
            SensitivityPoint(sparsity, 1, 1 + change, change, None)
            for sparsity, change in zip((0.5, 0.9), changes, strict=True)
        )
        return LayerSensitivity(name, (2, 2), points)

    found = lossprune.Sensitivity(
        "MP", 1.0, 10, (layer("a", 0.3, 0.1), layer("b", -0.1, 0.2), layer("c", 0.05, 4.0))
    )
    assert found.ranked() == ("c", "b", "a")
    assert found.ranked(0.5) == ("a", "c", "b")
    assert found.within(0.2) == {"a": 0.0, "b": 0.9, "c": 0.5}
    with pytest.raises(ValueError, match=r"sparsity must be one of those measured, 0.5, 0.9, got"):
        found.ranked(0.7)
    with pytest.raises(ValueError, match=r"max_loss_increase must be .* at least 0, got -1"):
        found.within(-1)
    with pytest.raises(KeyError, match="did you mean"):
        found["aa"]
    assert json.loads(json.dumps(found.to_dict()))["layers"][1]["points"][1] == {
        "sparsity": 0.9,
        "removed": 1,
        "loss": 1.2,
        "realised_change": 0.2,
        "predicted_change": None,
    }
