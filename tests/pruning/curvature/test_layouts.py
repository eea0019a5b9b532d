"""How weights, inputs and masks lie in memory changes nothing."""

import copy

import pytest
import torch
from torch import nn

import lossprune

CLASSES = 3


def of_images():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=2), nn.Tanh(), nn.Conv2d(8, 4, 1),
        nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def of_volumes():
    return nn.Sequential(
        nn.Conv3d(2, 4, 3), nn.Tanh(), nn.Conv3d(4, 4, 2), nn.Flatten(), nn.Linear(4, CLASSES)
    )


def of_rows():
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, CLASSES))


def transposed(tensor):
    """The same, its last two dimensions stored the other way round."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def strided(tensor):
    """The same, as every other entry of a larger one."""
    return torch.stack([tensor, tensor + 1], -1)[..., 0]


LAYOUTS = {
    "channels_last": (of_images, (4, 6, 6), lambda x: x.to(memory_format=torch.channels_last)),
    "channels_last_3d": (
        of_volumes,
        (2, 4, 4, 4),
        lambda x: x.to(memory_format=torch.channels_last_3d),
    ),
    "transposed": (of_rows, (8,), transposed),
    "strided": (of_images, (4, 6, 6), strided),
}


@pytest.fixture(params=LAYOUTS)
def laid_out(request):
    """A network and data, the same otherwise laid out, and the layout."""
    build, shape, layout = LAYOUTS[request.param]
    torch.manual_seed(0)
    network = build().double()
    inputs = torch.randn(6, *shape, dtype=torch.float64)
    targets = torch.arange(6) % CLASSES
    other = copy.deepcopy(network)

    def lay_out(tensor):
        return layout(tensor) if tensor.ndim == inputs.ndim else tensor

    for parameter in other.parameters():
        parameter.data = lay_out(parameter.data)
    assert not all(parameter.is_contiguous() for parameter in other.parameters())
    return network, (inputs, targets), other, (lay_out(inputs), targets), lay_out


@pytest.mark.parametrize("criterion", lossprune.CRITERIA)
def test_masks_are_the_same(laid_out, criterion):
    network, batch, other, other_batch, _ = laid_out
    settings = {"sparsity": 0.5, "stages": 2, "seed": 1}
    expected = lossprune.prune(network, criterion, data=[batch], **settings)
    found = lossprune.prune(other, criterion, data=[other_batch], **settings)
    assert found.mask == expected.mask


def test_statistics_under_a_mask_are_those_of_autograd(laid_out, agrees):
    network, batch, other, other_batch, lay_out = laid_out
    mask = lossprune.prune(network, "MP", sparsity=0.5).mask
    for kept in (mask, {name: lay_out(it) for name, it in mask.items()}):
        agrees(lossprune.measure(other, [other_batch], mask=kept), network, *batch, mask=mask)


def test_examples_that_are_one_expanded(agrees):
    torch.manual_seed(0)
    network = of_rows().double()
    inputs = torch.randn(1, 8, dtype=torch.float64).expand(6, 8)
    targets = torch.arange(6) % CLASSES
    agrees(lossprune.measure(network, [(inputs, targets)]), network, inputs, targets)
