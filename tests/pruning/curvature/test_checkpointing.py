"""Networks that compute activations again in the backward pass: measured as without, or refused."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lossprune
from lossprune.pruning import PruningError

CLASSES = 3


class Checkpointed(nn.Module):
    """Two checkpointed parts, of convolutions and of linear layers; ``reentrant`` None: none."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.a, self.b = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.c, self.d = nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self._run(lambda x: torch.tanh(self.norm(self.b(torch.relu(x)))), self.a(x))
        return self._run(lambda x: self.d(torch.tanh(self.c(x))), x.mean((2, 3)))

    def _run(self, part, x):
        if self.reentrant is None:
            return part(x)
        return checkpoint(part, x, use_reentrant=self.reentrant)


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Checkpointed(None).double()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(9, 2, 7, 7, dtype=torch.float64, generator=generator)
    return [(inputs, torch.arange(9) % CLASSES)]


def again(plain, reentrant):
    network = copy.deepcopy(plain)
    network.reentrant = reentrant
    return network


@pytest.mark.parametrize("criterion", lossprune.CRITERIA)
def test_masks_are_those_of_the_network_without(plain, data, criterion):
    """Stages after the first measure at masked weights, which recomputation would not see."""
    results = [
        lossprune.prune(network, criterion, sparsity=0.7, data=data, stages=3, seed=1)
        for network in (plain, again(plain, False))
    ]
    assert results[0].mask == results[1].mask
    assert [s.loss_after for s in results[0].stages] == [s.loss_after for s in results[1].stages]


@pytest.mark.parametrize("memory", [1, None])
def test_statistics_are_those_of_autograd_under_a_mask(plain, data, memory, agrees):
    mask = lossprune.prune(plain, "MP", sparsity=0.5).mask
    network = again(plain, False)
    network.norm.bias.grad = torch.ones(4, dtype=torch.float64)

    statistics = lossprune.measure(network, data, mask=mask, memory=memory)

    agrees(statistics, plain, *data[0], mask=mask)
    assert [p.grad is not None for p in network.parameters()].count(True) == 1


@pytest.mark.parametrize("criterion", ["LM", "QM"])
@pytest.mark.parametrize("parameters", [None, "a"])
def test_the_reentrant_kind_is_refused_with_the_way_out(plain, data, criterion, parameters):
    network = again(plain, True)
    with pytest.raises(PruningError, match="use_reentrant") as error:
        lossprune.prune(network, criterion, sparsity=0.5, data=data, parameters=parameters)
    assert "\n" not in str(error.value)


def test_a_function_of_the_networks_own_under_a_checkpoint_is_refused(plain, data):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, slope):
            return 2 * ctx.saved_tensors[0] * slope

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.d = nn.Linear(3, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.d(checkpoint(lambda x: Square.apply(self.a(x)), x, use_reentrant=False))

    data = [(torch.randn(6, 3), torch.arange(6) % CLASSES)]
    with pytest.raises(PruningError, match="activation checkpointing"):
        lossprune.measure(Own(), data)
