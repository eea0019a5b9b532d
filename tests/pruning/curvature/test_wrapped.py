"""Compiled, parallel and inference-mode networks: measured as the plain network is, to the bit."""

import contextlib

import pytest
import torch
from torch import nn

import lossprune
from lossprune.pruning.names import without_wrappers

CLASSES = 3


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, CLASSES))


def never(graph, inputs):
    raise AssertionError("nothing is to be compiled for a measurement")


def compiled_in_place() -> nn.Module:
    network = plain()
    network.compile(backend=never)
    return network


def compiled_inside() -> nn.Module:
    """A compiled layer, and a compiled function in forward."""
    network = plain()
    network[0] = torch.compile(network[0], backend=never)
    network.register_forward_hook(
        torch.compile(lambda module, inputs, outputs: outputs * 1, backend=never)
    )
    return network


WRAPPED = {
    "torch.compile": lambda: torch.compile(plain(), backend=never),
    "compile()": compiled_in_place,
    "compiled inside": compiled_inside,
    "DataParallel": lambda: nn.DataParallel(plain()),
    "both": lambda: torch.compile(nn.DataParallel(plain()), backend=never),
    "DataParallel inside": lambda: nn.Sequential(nn.DataParallel(plain())),
}


def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 8, generator=generator), torch.arange(12) % CLASSES)]


def tensors(mask):
    return [kept.tolist() for kept in mask.values()]


@pytest.fixture(scope="module")
def masks():
    """By every criterion, of the plain network."""
    settings = {"sparsity": 0.6, "data": data(), "stages": 2, "seed": 1}
    return {name: lossprune.prune(plain(), name, **settings).mask for name in lossprune.CRITERIA}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_masks_are_those_of_the_plain_network(wrapped, masks):
    network = WRAPPED[wrapped]()
    attributes = [(module, dict(vars(module))) for module in network.modules()]
    for criterion, expected in masks.items():
        found = lossprune.prune(
            network, criterion, sparsity=0.6, data=data(), stages=2, seed=1
        ).mask
        assert tensors(found) == tensors(expected), criterion
        assert set(found) <= {name for name, _ in network.named_parameters()}
    for module, before in attributes:
        assert vars(module) == before
    if wrapped != "DataParallel inside":
        assert {without_wrappers(name) for name in found} == set(expected)


@pytest.mark.parametrize("wrapped", ["torch.compile", "compiled inside", "DataParallel", "both"])
def test_a_mask_of_the_plain_network_is_measured_on_the_wrapped_one(wrapped, masks):
    mask = masks["MP"]
    expected = lossprune.measure(plain(), data(), mask=mask)
    found = lossprune.measure(WRAPPED[wrapped](), data(), mask=mask)
    assert found.loss == expected.loss
    for name, tensor in found.ggn_diagonal.items():
        assert torch.equal(tensor, expected.ggn_diagonal[without_wrappers(name)])


def test_a_mask_by_another_name_of_a_module_is_understood(masks):
    network = plain()
    network.head = network[3]
    network[3] = nn.Identity()
    network.last = network.head
    mask = {"0.weight": masks["MP"]["0.weight"], "last.weight": masks["MP"]["3.weight"]}
    network.forward = lambda x: network.head(network[2](network[1](network[0](x))))
    expected = lossprune.measure(plain(), data(), mask=masks["MP"])
    found = lossprune.measure(network, data(), mask=mask)
    assert found.loss == expected.loss
    assert torch.equal(found.gradient["head.weight"], expected.gradient["3.weight"])


def test_forward_gets_the_wrapper_itself(masks):
    network = nn.DataParallel(plain())
    for forward in (
        lambda model, batch: (model(batch[0]), batch[1]),
        lambda model, batch: (model.module(batch[0]), batch[1]),
    ):
        found = lossprune.measure(network, data(), forward=forward)
        assert found.loss == lossprune.measure(plain(), data()).loss


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("made", [torch.inference_mode, contextlib.nullcontext])
def test_without_gradients_switched_on(mode, made, masks):
    """In the mode, on a network and data that may have been made in inference mode, and outside."""
    with made():
        network, batches = plain(), data()
    for use in (mode, contextlib.nullcontext):
        with use():
            for criterion, expected in masks.items():
                result = lossprune.prune(
                    network, criterion, sparsity=0.6, data=batches, stages=2, seed=1
                )
                assert result.mask == expected, criterion
            statistics = lossprune.measure(network, batches)
            assert torch.is_inference_mode_enabled() == (use is torch.inference_mode)
            assert torch.is_grad_enabled() == (use is contextlib.nullcontext)
        assert not any(it.is_inference() for it in statistics.gradient.values())
        assert not any(it.is_inference() for it in result.mask.values())
