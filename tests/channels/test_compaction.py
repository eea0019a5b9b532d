"""Compaction of the paper's networks: equal outputs, exact counts, smaller layers."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import lossprune
from lossprune import Mask, compact
from lossprune.deployment import count_live
from lossprune.networks import NETWORKS

FLOAT32, FLOAT64 = 1e-5, 1e-12  # of the largest output
SHAPES = {"MLP": (1, 28, 28)}
SHARED = Path(__file__).resolve().parents[3] / "shared"
VGG11 = (
    Path(os.environ.get("LOSSPRUNE_CHECKPOINTS", SHARED / "checkpoints"))
    / "vgg11-cifar10jpeg.safetensors"
)


def network(name: str, seed: int = 0) -> nn.Module:
    """With biases and batch-norm statistics as after training: not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    model = NETWORKS[name](generator=generator)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def random_mask(model: nn.Module, sparsity: float, seed: int = 0) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    return Mask(
        {
            name: torch.rand(kept.shape, generator=generator) >= sparsity
            for name, kept in Mask.dense(model).items()
        }
    )


def images(name: str, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *SHAPES.get(name, (3, 32, 32)), generator=generator)


@torch.no_grad()
def difference(model: nn.Module, mask: Mask, small: nn.Module, inputs: torch.Tensor) -> float:
    """Between the masked network and ``small``, as a part of the largest output."""
    masked = mask.apply_(copy.deepcopy(model)).eval()
    expected, got = masked(inputs), small(inputs)
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("sparsity", [0.9, 0.995])
@pytest.mark.parametrize("name", ["MLP", "VGG11", "VGG11BN", "PreActResNet18"])
def test_outputs_equal_the_masked_networks(name, sparsity):
    model = network(name)
    mask = random_mask(model, sparsity)
    compaction = compact(model, mask)
    assert compaction.left_dense == {}
    assert difference(model, mask, compaction.model, images(name)) <= FLOAT32


@pytest.mark.parametrize("name", ["MLP", "VGG11", "PreActResNet18"])
def test_in_double_precision_they_equal_to_its_rounding(name):
    model = network(name).double()
    mask = random_mask(model, 0.995)
    small = compact(model, mask).model
    assert difference(model, mask, small, images(name, 1).double()) <= FLOAT64


def test_a_bottleneck_network_too():
    model = network("PreActResNet50")
    mask = random_mask(model, 0.98)
    small = compact(model, mask).model
    assert difference(model, mask, small, images("")[:, :, ::2, ::2]) <= FLOAT32


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("MLP", "fc1"), ("MLP", "fc2"), ("MLP", "fc3"), ("VGG11", "features.0"),
        ("VGG11", "features.18"), ("VGG11", "classifier.4"), ("VGG11BN", "features.4"),
        ("PreActResNet18", "stem"), ("PreActResNet18", "groups.1.0.conv1"),
        ("PreActResNet18", "groups.1.0.conv2"), ("PreActResNet18", "groups.1.0.shortcut"),
        ("PreActResNet18", "classifier"),
    ],
)  # fmt: skip
def test_a_layer_without_any_weight(name, layer):
    model = network(name)
    mask = dict(random_mask(model, 0.9))
    mask[f"{layer}.weight"] = torch.zeros_like(mask[f"{layer}.weight"])
    compaction = compact(model, Mask(mask))
    assert difference(model, Mask(mask), compaction.model, images(name)) <= FLOAT32
    counts = {counted.name: counted for counted in compaction.layers}[f"{layer}.weight"]
    assert (counts.kept, counts.live, counts.dead_units) == (0, 0, counts.units)
    if name != "PreActResNet18" or layer in ("stem", "classifier"):  # others have a way round
        assert compaction.effective_sparsity == 1.0


def test_a_network_with_no_way_through_is_next_to_nothing():
    model = network("VGG11")
    mask = dict(Mask.dense(model))
    mask["features.8.weight"] = torch.zeros_like(mask["features.8.weight"])
    compaction = compact(model, Mask(mask), images("VGG11", 1))
    assert compaction.effective_sparsity == 1.0
    assert compaction.multiply_adds_after < compaction.multiply_adds_before / 2
    assert difference(model, Mask(mask), compaction.model, images("VGG11")) <= FLOAT32


@pytest.mark.parametrize("name", ["MLP", "VGG11", "PreActResNet18"])
def test_weights_on_a_path_are_those_with_a_gradient(name):
    """In a network of positive numbers without constants, nothing cancels."""
    # Maps of 6×6 before the last pooling, so that every weight of a kernel meets every channel.
    options = {"shape": (3, 96, 96)} if name == "VGG11" else {}
    model = NETWORKS[name](generator=torch.Generator().manual_seed(0), **options).double().eval()
    for module in model.modules():
        for child, layer in module.named_children():
            if isinstance(layer, nn.MaxPool2d):  # has gradients for the largest alone
                setattr(module, child, nn.AvgPool2d(2))
    mask = random_mask(model, 0.995)
    mask.apply_(model)
    for parameter in model.parameters():
        parameter.data.abs_()
    inputs = torch.ones(1, *options.get("shape", images(name).shape[1:]), dtype=torch.float64)
    model(inputs).sum().backward()
    live = {name: model.get_parameter(name).grad.ne(0) & mask[name] for name in mask}
    counts = count_live(model, mask)
    assert [layer.live for layer in counts.layers] == [int(kept.sum()) for kept in live.values()]
    assert [layer.dead_units for layer in counts.layers] == [
        int((~kept.flatten(1).any(1)).sum()) for kept in live.values()
    ]
    removed = mask.total - sum(int(kept.sum()) for kept in live.values())
    assert counts.effective_sparsity == removed / mask.total > counts.nominal_sparsity
    assert counts.nominal_sparsity == mask.sparsity


def test_no_more_units_stay_than_are_on_a_path():
    """Without biases every constant is 0, so nothing needs to stand for one."""
    model = NETWORKS["VGG11"](generator=torch.Generator().manual_seed(0))
    compaction = compact(model, random_mask(model, 0.998))
    layers = [m for m in compaction.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    widths = [layer.weight.shape[0] for layer in layers]
    live = [layer.units - layer.dead_units for layer in compaction.layers]
    assert min(live[:-1]) > 0
    assert widths == [*live[:-1], 10]
    assert any(layer.dead_units for layer in compaction.layers)


def test_counts_and_costs():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    mask = dict(Mask.dense(model))
    mask["0.weight"][0] = False  # this unit has no input, the next no output
    mask["2.weight"][:, 1] = False
    compaction = compact(model, Mask(mask), torch.zeros(5, 3))
    assert [(c.name, c.total, c.kept, c.removed, c.live) for c in compaction.layers] == [
        ("0.weight", 12, 9, 3, 6),
        ("2.weight", 8, 6, 2, 4),
    ]
    assert [(c.units, c.dead_units) for c in compaction.layers] == [(4, 2), (2, 0)]
    assert (compaction.nominal_sparsity, compaction.effective_sparsity) == (0.25, 0.5)
    assert (compaction.parameters_before, compaction.parameters_after) == (26, 14)
    assert (compaction.multiply_adds_before, compaction.multiply_adds_after) == (100, 50)
    inputs = torch.randn(7, 3)
    assert difference(model, Mask(mask), compaction.model, inputs) <= FLOAT32


def test_the_network_is_an_ordinary_one():
    model = network("PreActResNet18")
    before = copy.deepcopy(model.state_dict())
    mask = random_mask(model, 0.995)
    state = torch.get_rng_state()
    compaction = compact(model, mask)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training  # the given network is as it was
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    small = compaction.model
    assert type(small) is type(model)
    assert not small.training
    assert before.keys() <= small.state_dict().keys()  # a bias may have come
    again = copy.deepcopy(small)
    again.load_state_dict(small.state_dict())
    inputs = images("")
    with torch.no_grad():
        assert torch.equal(again(inputs), small(inputs))
        assert torch.equal(torch.fx.symbolic_trace(small)(inputs), small(inputs))


def test_the_mask_is_that_of_the_small_network():
    model = network("VGG11")
    compaction = compact(model, random_mask(model, 0.99))
    small = copy.deepcopy(compaction.model)
    assert list(compaction.mask) == list(Mask.dense(small))
    compaction.mask.apply_(small)  # changes nothing: these weights are 0 already
    expected = compaction.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in small.state_dict().items())
    again = compact(compaction.model, compaction.mask)
    assert again.parameters_after == compaction.parameters_after


def test_a_network_whose_hooks_have_left_computed_weights_in_it():
    network = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))
    inputs = torch.randn(5, 4)
    network(inputs)
    mask = Mask({"2.weight": torch.rand(3, 6) < 0.5})
    small = compact(network, mask).model
    with torch.no_grad():
        network[2].weight *= mask["2.weight"]
    torch.testing.assert_close(small(inputs), network(inputs))


def test_a_mask_of_another_network_is_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(lossprune.PruningError, match=r"names '1.weight', which Sequential lacks"):
        compact(model, Mask({"1.weight": torch.ones(2, 3, dtype=torch.bool)}))


@pytest.mark.parametrize(
    "name", ["MLP", pytest.param("PreActResNet18", marks=pytest.mark.full("PreActResNet18"))]
)
def test_real_masks(name):
    model = network(name)
    batches = [(images(name, 2), torch.arange(2))]
    mask = lossprune.prune(model, "LM", sparsity=0.99, data=batches).mask
    compaction = compact(model, mask)
    assert compaction.effective_sparsity > mask.sparsity
    assert difference(model, mask, compaction.model, images(name)) <= FLOAT32


@pytest.mark.skipif(not VGG11.is_file(), reason=f"no trained VGG11 at {VGG11}")
def test_a_trained_vgg11():
    from safetensors.torch import load_file

    model = NETWORKS["VGG11"]()
    model.load_state_dict(load_file(VGG11))
    mask = lossprune.prune(model, "MP", sparsity=0.98).mask
    compaction = compact(model, mask, images("VGG11", 1))
    assert compaction.parameters_after < 0.6 * compaction.parameters_before
    assert difference(model, mask, compaction.model, images("VGG11")) <= FLOAT32
