"""ONNX files, against torch."""

import pytest
import torch
from torch import nn

import lossprune
from lossprune import PruningError, export_onnx
from lossprune.deployment.onnx import OnnxNetwork


@pytest.fixture(scope="module", params=["mlp", "convolutional"])
def masked(request) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(2)
    if request.param == "mlp":
        network, shape = (
            nn.Sequential(nn.Flatten(), nn.Linear(48, 30), nn.Tanh(), nn.Linear(30, 4)),
            (3, 4, 4),
        )
    else:
        network, shape = (
            nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(32, 4),
            ),
            (3, 4, 4),
        )
    lossprune.prune(network, "MP", sparsity=0.9).mask.apply_(network)
    return network, torch.randn(6, *shape)


def test_a_masked_network_runs_in_onnxruntime_as_in_torch(masked, tmp_path):
    network, inputs = masked
    network.train()
    state = torch.get_rng_state()
    assert export_onnx(network, tmp_path / "network.onnx", inputs) <= 1e-4
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == [tmp_path / "network.onnx"]
    exported = OnnxNetwork(tmp_path / "network.onnx", threads=1)
    oracle = network.double().eval()
    for batch in (1, 2, 6, 17):
        fresh = torch.randn(batch, *inputs.shape[1:])
        torch.testing.assert_close(
            exported(fresh).double(), oracle(fresh.double()), rtol=1e-4, atol=1e-4
        )
    network.float()


def test_a_compacted_network_gives_in_onnxruntime_what_the_masked_one_gives_in_torch(tmp_path):
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 5)
    )
    mask = lossprune.prune(network, "MP", sparsity=0.5).mask
    mask["0.weight"][::2] = False
    mask = lossprune.Mask(dict(mask))
    inputs = torch.randn(4, 2, 4, 4)
    export_onnx(lossprune.compact(network, mask).model, tmp_path / "small.onnx", inputs)
    export_onnx(mask.apply_(network), tmp_path / "masked.onnx", inputs)
    small, masked = (tmp_path / f"{name}.onnx" for name in ("small", "masked"))
    assert small.stat().st_size < masked.stat().st_size
    fresh = torch.randn(7, 2, 4, 4)
    expected = network.double()(fresh.double())
    for path in (small, masked):
        given = OnnxNetwork(path, threads=1)(fresh).double()
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_one_sentence_and_no_file(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x.sum(1) if x.sum() > 0 else x.mean(1)

    class Two(nn.Module):
        def forward(self, x):
            return x, x

    path = tmp_path / "network.onnx"
    with pytest.raises(PruningError, match=r"export this Branch as ONNX: \w+: \w"):
        export_onnx(Branch(), path, torch.randn(2, 3))
    with pytest.raises(PruningError, match="one real tensor, this Two returns tuple"):
        export_onnx(Two(), path, torch.randn(2, 3))
    complex_ = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(PruningError, match="needs real numbers, 'weight' of this"):
        export_onnx(complex_, path, torch.randn(2, 3))
    with pytest.raises(PruningError, match="cannot load the exported Linear: NotImplemented"):
        export_onnx(nn.Linear(3, 2).bfloat16(), path, torch.randn(2, 3).bfloat16())
    with pytest.raises(ValueError, match=r"at least two inputs.*got shape \(1, 3\)"):
        export_onnx(nn.Linear(3, 2), path, torch.randn(1, 3))
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        export_onnx(nn.Linear(3, 2), tmp_path / "none" / "x.onnx", torch.randn(2, 3))
    assert list(tmp_path.iterdir()) == []


class Passes(nn.Module):
    """Hands on whatever it is called with, as what wraps a network does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_network_that_hands_on_its_arguments(tmp_path):
    network, example = Passes(), torch.randn(4, 4)
    assert export_onnx(network, tmp_path / "network.onnx", example) <= 1e-4
    with pytest.raises(ValueError, match=r"example must be one tensor.* got dict"):
        export_onnx(network, tmp_path / "other.onnx", {"input": example})


def test_outputs_that_differ_are_refused(tmp_path):
    class Drifting(nn.Module):
        """Another function at every call: what is exported is not what is compared."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.layer(x) * float(self.calls)

    with pytest.raises(PruningError, match="differs from torch's by"):
        export_onnx(Drifting(), tmp_path / "x.onnx", torch.randn(4, 3))
    assert list(tmp_path.iterdir()) == []
