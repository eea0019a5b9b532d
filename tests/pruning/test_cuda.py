"""A GPU gives what the CPU gives, from batches on either."""

import pytest
import torch
from torch import nn

import lossprune
from lossprune.pruning.smallest import select_smallest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(24, 4),
    ).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 2, 5, 5, dtype=torch.float64, generator=generator)
    return [(inputs[:12], torch.arange(12) % 4), (inputs[12:], torch.arange(8) % 4)]


@pytest.mark.parametrize("criterion", ["MP", "LM", "QM", "OBD"])
@pytest.mark.parametrize("device_of_data", ["cpu", "cuda"])
def test_masks_are_those_of_the_cpu(criterion, device_of_data):
    settings = {"sparsity": 0.8, "stages": 5, "reg": 1e-3}
    expected = lossprune.prune(network(), criterion, data=batches(), **settings)
    data = [(x.to(device_of_data), t.to(device_of_data)) for x, t in batches()]

    result = lossprune.prune(network().cuda(), criterion, data=data, **settings)

    assert {kept.device.type for kept in result.mask.values()} == {"cuda"}
    assert result.mask == expected.mask
    for ours, theirs in zip(result.stages, expected.stages, strict=True):
        assert ours.loss_after == pytest.approx(theirs.loss_after, rel=1e-9)


@pytest.mark.parametrize(
    "rule",
    [
        {"sparsity": 0.8, "scope": "erdos-renyi-kernel"},
        {"sparsity": 0.5, "scope": "uniform", "exclude": "first"},
        {"pattern": "1:3", "exclude": "first"},
    ],
    ids=["erdos-renyi-kernel", "uniform", "pattern"],
)
def test_scopes_and_patterns_are_those_of_the_cpu(rule):
    expected = lossprune.prune(network(), "QM", data=batches(), stages=3, **rule).mask
    result = lossprune.prune(network().cuda(), "QM", data=batches(), stages=3, **rule).mask
    assert result == expected


def test_random_states_are_left_alone():
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    lossprune.prune(network().cuda(), "QM", sparsity=0.5, data=batches(), stages=2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


@pytest.mark.parametrize("foreach", [False, True])
def test_a_mask_from_a_file_holds_a_network_on_the_gpu(tmp_path, foreach):
    model = network().cuda()
    lossprune.prune(model, "MP", sparsity=0.7).mask.save(tmp_path / "mask")
    mask = lossprune.Mask.load(tmp_path / "mask")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=foreach)
    mask.enforce(model, optimizer)
    for inputs, targets in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs.cuda()), targets.cuda()).backward()
        optimizer.step()
    weights = dict(model.named_parameters())
    assert all((weights[name].cpu()[~kept] == 0).all() for name, kept in mask.items())
    assert mask.to("cuda") == mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_is_that_of_the_cpu(dtype):
    generator = torch.Generator().manual_seed(0)
    saliencies = {
        str(i): torch.randn(300, 70, generator=generator, dtype=dtype).round(decimals=2)
        for i in range(3)
    }
    kept = {name: torch.rand(300, 70, generator=generator) < 0.8 for name in saliencies}
    expected = select_smallest(saliencies, kept, 12_345)
    marked = select_smallest(
        {name: s.cuda() for name, s in saliencies.items()},
        {name: k.cuda() for name, k in kept.items()},
        12_345,
    )
    for name, mark in expected.items():
        assert torch.equal(marked[name].cpu(), mark)
