"""Which weights count, under which names, and what cannot be pruned."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import lossprune
from lossprune.pruning import PruningError


def names(model: nn.Module) -> list[str]:
    return list(lossprune.Mask.dense(model))


def test_weights_of_linear_and_convolution_layers_only():
    model = nn.Sequential(
        nn.Embedding(5, 4),
        nn.Conv1d(1, 2, 3),
        nn.Conv2d(1, 2, 3),
        nn.Conv3d(1, 2, 3),
        nn.ConvTranspose2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.LayerNorm(4),
        nn.PReLU(),
        nn.Linear(4, 2),
        nn.Bilinear(2, 2, 2),
        nn.LSTM(2, 2),
    )
    assert names(model) == ["1.weight", "2.weight", "3.weight", "8.weight"]


def test_a_layer_itself():
    assert names(nn.Linear(2, 3)) == ["weight"]


def test_subclasses_of_layers_count():
    class Scaled(nn.Linear):
        pass

    assert names(nn.Sequential(Scaled(2, 2))) == ["0.weight"]


def test_shared_weights_appear_once_under_their_first_name():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.a = nn.Linear(3, 4)
            self.b = self.a
            self.c = nn.Linear(3, 4)
            self.c.weight = self.embed.weight

    model = Shared()
    assert sorted(names(model)) == ["a.weight", "embed.weight"]
    assert set(names(model)) <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.ReLU()), nn.Sequential(nn.LayerNorm(4), nn.Embedding(3, 4)), nn.Module()],
)
def test_network_without_prunable_layers(model):
    for call in (
        lambda: lossprune.prune(model, "MP", sparsity=0.5),
        lambda: lossprune.measure(model, [(torch.zeros(1, 4), torch.zeros(1).long())]),
        lambda: lossprune.Mask.dense(model),
    ):
        with pytest.raises(PruningError, match=f"{type(model).__name__} has nothing to prune"):
            call()


@pytest.mark.parametrize(
    "parametrise",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: torch_prune.l1_unstructured(layer, "weight", 2),
        nn.utils.spectral_norm,
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "torch's pruning", "old spectral_norm"],
)
@pytest.mark.parametrize("criterion", ["MP", "QM"])
def test_weights_computed_from_other_parameters(parametrise, criterion):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    parametrise(model[1])
    batch = (torch.randn(4, 3), torch.arange(4) % 3)
    with pytest.raises(PruningError, match=r"'1\.weight' is computed from other parameters"):
        lossprune.prune(model, criterion, sparsity=0.5, data=[batch])


def test_lazy_layers_wait_for_their_first_batch():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(PruningError, match=r"'0\.weight' is not initialised"):
        lossprune.prune(model, "MP", sparsity=0.5)
    model(torch.zeros(1, 2))
    assert lossprune.prune(model, "MP", sparsity=0.5).mask.removed == 3


def test_parameters_on_several_devices():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    with pytest.raises(PruningError, match="one device, got cpu, meta"):
        lossprune.prune(model, "MP", sparsity=0.5)
