"""Deployment where something is missing: the compiler, or a GPU."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import lossprune
from lossprune.deployment.sparse_layers import CsrConv2d, CsrLinear, is_two_of_four

# Of a float32 sum of a few hundred products, against the same in float64.
RELATIVE = 1e-5


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_linear_layer_in_compressed_rows(batch, density):
    torch.manual_seed(0)
    layer = nn.Linear(30, 20, bias=density < 1)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < density)
    x = torch.randn(batch, 3, 30)
    expected = layer.double()(x.double())
    found = CsrLinear(layer.weight.float(), None if layer.bias is None else layer.bias.float())(x)
    assert torch.allclose(found.double(), expected, rtol=0, atol=RELATIVE)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("padding", "dilation"), [(0, 1), (1, 1), (2, 2)])
def test_convolution_in_compressed_rows(stride, padding, dilation):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, (3, 2), stride, padding, dilation)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.2)
    x = torch.randn(3, 4, 11, 8)
    found = CsrConv2d(layer)(x)
    expected = layer.double()(x.double())
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, rtol=0, atol=RELATIVE)


def test_without_a_compiler_torch_alone_computes_it():
    code = """
import copy, importlib.util, torch, lossprune
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "ziglang" else find(name, *rest)
torch.manual_seed(0)
network = lossprune.networks.NETWORKS["MLP"](shape=(1, 8, 8), hidden=(300,))
mask = lossprune.Mask({"fc1.weight": torch.rand(300, 64) < 0.01})
x = torch.randn(5, 1, 8, 8)
deployed = lossprune.deploy(network, mask, x, seconds=0.01)
expected = mask.apply_(copy.deepcopy(network))(x)
assert torch.allclose(deployed(x), expected, atol=1e-6)
print(deployed.notes[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": "/nowhere"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no C compiler, so torch's CSR products")


def test_two_of_four():
    assert is_two_of_four(torch.tensor([[0.0, 1, 2, 0, 3, 0, 0, 4], [0, 0, 0, 0, 0, 0, 0, 1]]))
    assert not is_two_of_four(torch.tensor([[0.0, 1, 2, 3, 0, 0, 0, 0]]))
    assert not is_two_of_four(torch.ones(2, 3)), "not a multiple of four"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_semi_structured_layers_on_a_gpu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 64)).cuda().half()
    kept = (torch.arange(4096 * 4096, device="cuda") % 4 < 2).reshape(4096, 4096)
    mask = lossprune.Mask({"0.weight": kept})
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.half)
    deployed = lossprune.deploy(model, mask, x)
    with torch.no_grad():
        expected = mask.apply_(model)(x)
        found = deployed(x)
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
    assert "semi-structured" in deployed.notes[0]
