"""Which layers stay dense, and why, is said."""

import pytest
import torch
from torch import nn

import lossprune
from lossprune.deployment.reasons import obstacle
from lossprune.kernels.compiler import compiler_available

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")


class Own(nn.Linear):
    """Of a class that may compute anything."""


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.usual, self.own, self.unused = nn.Linear(256, 256), Own(256, 256), nn.Linear(256, 256)
        self.hooked, self.full = nn.Linear(256, 256), nn.Linear(256, 256)
        self.hooked.register_forward_hook(lambda *_: None)

    def forward(self, x):
        return self.full(self.hooked(self.own(self.usual(x))))


def test_layers_and_notes_say_why():
    torch.manual_seed(0)
    model = Mixed().eval()
    kept = {name: torch.rand(256, 256) < 0.01 for name in ("usual.weight", "own.weight")}
    deployed = lossprune.deploy(model, lossprune.Mask(kept), torch.randn(64, 256), seconds=0.05)
    why = {layer.name: layer.reason for layer in deployed.layers}
    assert why["hooked"] == "it has hooks"
    assert why["own"] == "the kernels take nn.Linear and nn.Conv2d, and it is of the class Own"
    assert why["unused"] == "the network does not call it on the example"
    assert [layer.kind for layer in deployed.layers if not layer.reason] == [
        layer.kind for layer in deployed.layers if layer.kind == "sparse"
    ]
    lines = [note for note in deployed.notes if note.startswith("dense: ")]
    assert "dense: hooked, as it has hooks" in lines
    assert all(any(layer.reason in line for line in lines) for layer in deployed.layers)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "it pads with 'reflect'"),
        (nn.Conv2d(1, 1, 2, padding="same"), "pad both sides alike"),
        (nn.Linear(2, 2).bfloat16(), "its weights are bfloat16"),
    ],
)
def test_what_no_kernel_takes(layer, said):
    assert said in (obstacle(layer, 1) or "")
    assert obstacle(nn.Conv2d(1, 1, 3, padding=1), 1) is None
