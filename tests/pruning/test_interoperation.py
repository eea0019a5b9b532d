"""Masks to and from torch's own pruning and parametrisations."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

import lossprune
from lossprune.pruning import (
    MaskParametrization,
    PruningError,
    read_mask,
    remove_masks_,
    write_parametrizations_,
    write_torch_pruning_,
)

WRITERS = [write_torch_pruning_, write_parametrizations_]
writers = pytest.mark.parametrize("write_", WRITERS)


class Tied(nn.Module):
    """Two layers that share a weight, under the name of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


def mask_of(model: nn.Module) -> lossprune.Mask:
    return lossprune.prune(model, "MP", sparsity=0.6).mask


@writers
def test_round_trip_to_the_bit(write_):
    model = network()
    before = copy.deepcopy(model)
    parameters = set(model.parameters())
    mask = mask_of(model)

    assert write_(model, mask) is model
    assert read_mask(model) == mask
    assert read_mask(model.state_dict()) == mask
    assert set(model.parameters()) == parameters  # what an optimizer holds

    expected = mask.apply_(copy.deepcopy(before))
    inputs = torch.randn(5, 2, 6)
    assert torch.equal(model(inputs), expected(inputs))

    assert remove_masks_(model) is model
    assert set(model.parameters()) == parameters
    assert model.state_dict().keys() == before.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    for name, kept in mask.items():
        assert not torch.signbit(model.state_dict()[name][~kept]).any()
    with pytest.raises(PruningError, match="Sequential holds no mask"):
        read_mask(model)


@writers
def test_the_state_dict_carries_weights_and_mask_into_another_copy(write_):
    model, other = network(), network()
    mask = mask_of(model)
    write_(model, mask)
    with torch.no_grad():
        model[3].bias.add_(1)
    write_(other, lossprune.Mask.dense(other))
    other.load_state_dict(model.state_dict())
    assert read_mask(other) == mask
    inputs = torch.randn(5, 2, 6)
    assert torch.equal(model(inputs), other(inputs))


@writers
def test_a_weight_that_layers_share_is_masked_in_all(write_):
    model = Tied()
    mask = mask_of(model)
    assert list(mask) == ["first.weight", "last.weight"]
    inputs = torch.randn(5, 4)
    expected = mask.apply_(copy.deepcopy(model))(inputs)
    shared = model.first.weight

    write_(model, mask)
    assert torch.equal(model(inputs), expected)
    assert len(list(model.parameters())) == 5
    assert read_mask(model) == read_mask(model.state_dict()) == mask

    remove_masks_(model)
    assert model.first.weight is model.second.weight is shared
    assert torch.equal(model(inputs), expected)


@writers
def test_a_layer_of_two_names_counts_once(write_):
    cell = nn.Linear(4, 4)
    model = nn.Sequential(cell, nn.Tanh(), cell)
    mask = mask_of(model)
    assert read_mask(write_(model, mask)) == mask
    assert remove_masks_(model)[2] is cell
    assert int((cell.weight == 0).sum()) == mask.removed


@pytest.mark.parametrize("both", [True, False])
def test_masks_that_differ_in_layers_of_one_weight_are_refused(both):
    model = Tied()
    torch_prune.l1_unstructured(model.first, "weight", amount=4)
    if both:
        torch_prune.random_unstructured(model.second, "weight", amount=8)
    for call in (read_mask, remove_masks_):
        with pytest.raises(
            PruningError, match=r"'first\.weight' and 'second\.weight' are one weight"
        ):
            call(model)


class ReadsWeights(nn.Module):
    """Attention, which never calls its output projection, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return nn.functional.linear(self.attention(x, x, x)[0], self.head.weight)


@writers
def test_weights_of_layers_that_are_never_called(write_):
    model, inputs = ReadsWeights(), torch.randn(2, 5, 4)
    mask = mask_of(model)
    hooks = [list(module._forward_pre_hooks.values()) for module in model.modules()]
    expected = mask.apply_(copy.deepcopy(model))(inputs)
    write_(model, mask)
    other = write_(ReadsWeights(), mask)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs), expected)

    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        other(inputs).square().sum().backward()
        optimizer.step()
    assert not torch.equal(other(inputs), expected)
    assert other.double()(inputs.double()).dtype == torch.float64
    remove_masks_(model)
    assert [list(module._forward_pre_hooks.values()) for module in model.modules()] == hooks
    assert torch.equal(model(inputs), expected)


@writers
def test_training_keeps_removed_weights_out(write_):
    model = network()
    mask = mask_of(model)
    write_(model, mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    start = model[3].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(6, 2, 6)), torch.arange(6) % 3).backward()
        optimizer.step()
    model(torch.randn(6, 2, 6))
    assert (model[3].weight[~mask["3.weight"]] == 0).all()
    assert (model[3].weight != start)[mask["3.weight"]].all()


def test_a_parametrisation_fills_and_has_no_gradient_where_it_does():
    parametrisation = MaskParametrization(torch.tensor([True, False]))
    weight = torch.tensor([2.0, torch.nan], requires_grad=True)
    masked = parametrisation(weight)
    assert masked.tolist() == [2.0, 0.0]
    masked.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [4.0, 0.0]


def test_assigning_to_a_parametrised_weight_keeps_the_mask():
    layer = nn.Linear(2, 1, bias=False)
    write_parametrizations_(layer, lossprune.Mask({"weight": torch.tensor([[False, True]])}))
    layer.weight = torch.tensor([[3.0, 4.0]])
    assert layer.weight.tolist() == [[0.0, 4.0]]
    assert dict(layer.named_parameters())["parametrizations.weight.original"].tolist() == [[3, 4]]


def test_reads_any_of_torchs_methods_biases_and_pruning_twice():
    model = network()
    torch_prune.l1_unstructured(model[0], "weight", amount=5)
    torch_prune.ln_structured(model[3], "weight", amount=1, n=2, dim=0)
    torch_prune.random_unstructured(model[3], "bias", amount=2)
    torch_prune.l1_unstructured(model[0], "weight", amount=3)
    mask = read_mask(model)
    assert {layer.name: layer.removed for layer in mask.layers()} == {
        "0.weight": 8,
        "3.weight": 16,
        "3.bias": 2,
    }
    for name, kept in mask.items():
        assert torch.equal(kept, model.get_buffer(f"{name}_mask").bool())
    plain = mask.apply_(network())  # by name, onto another copy
    assert int((plain[3].bias == 0).sum()) == 2


def test_reads_the_masks_of_torch_ao():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1))
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    mask = read_mask(model)
    assert list(mask) == ["0.weight"]
    assert torch.equal(mask["0.weight"], model[0].weight != 0)
    assert mask.removed > 0


def test_a_layer_itself():
    layer = nn.Linear(3, 2)
    mask = mask_of(layer)
    for write_ in WRITERS:
        write_(layer, mask)
        assert read_mask(layer) == mask
        remove_masks_(layer)
    assert isinstance(layer.weight, nn.Parameter)


def test_masks_that_are_not_of_zeros_and_ones_are_refused():
    layer = torch_prune.identity(nn.Linear(2, 2), "weight")
    layer.get_buffer("weight_mask").mul_(0.5)
    with pytest.raises(PruningError, match="'weight_mask' has other values than 0 and 1"):
        read_mask(layer)


def test_nothing_to_read():
    with pytest.raises(PruningError, match="Linear holds no mask"):
        read_mask(nn.Linear(2, 2))
    with pytest.raises(PruningError, match="the state dict holds no mask"):
        read_mask({"conv_mask": torch.ones(2)})  # with no conv_orig beside it
    with pytest.raises(PruningError, match="holds no mask"):
        remove_masks_(parametrizations.weight_norm(nn.Linear(2, 2)))


def test_a_parametrisation_of_another_kind_beside_the_mask_is_not_removed():
    layer = nn.Linear(2, 2)
    mask = mask_of(layer)
    write_parametrizations_(layer, mask)
    parametrize.register_parametrization(layer, "weight", nn.Tanh(), unsafe=True)
    with pytest.raises(PruningError, match=r"Linear\.weight has parametrisations beside its mask"):
        remove_masks_(layer)
    assert read_mask(layer) == mask


@writers
@pytest.mark.parametrize("again_", [lossprune.Mask.apply_, *WRITERS])
def test_a_network_that_carries_a_mask_already_says_how_to_go_on(write_, again_):
    model = network()
    mask = mask_of(model)
    write_(model, mask)
    with pytest.raises(PruningError, match=r"'0\.weight', which .* computed from .*remove_masks_"):
        again_(mask, model) if again_ is lossprune.Mask.apply_ else again_(model, mask)
    with pytest.raises(PruningError, match=r"'0\.weight' is computed .*remove_masks_"):
        lossprune.prune(model, "MP", sparsity=0.8)

    kept = read_mask(model)
    further = lossprune.prune(remove_masks_(model), "MP", sparsity=0.8).mask
    assert not any((further[name] & ~kept[name]).any() for name in kept)
