"""Accuracy of a published network after pruning, without fine-tuning, on real MNIST.

The network is the MLPNet (784-40-20-10, no biases) on which one-shot pruning papers report; its
authors publish no licence, so it is read from beside the repository and the tests are skipped where
it is not.  The expected figures were measured with the algorithm of arXiv 2006.12279's published
code: all 60,000 training images to draw 1000 examples from at each stage, exponential stages.
"""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lossprune

MORE = pytest.mark.full("more of the published settings in 140 stages")
ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
MNIST = Path(os.environ.get("LOSSPRUNE_DATA", SHARED / "data")) / "MNIST" / "raw"
CHECKPOINT = (
    Path(os.environ.get("LOSSPRUNE_CHECKPOINTS", SHARED / "checkpoints"))
    / "mlpnet-mnist-93.97.safetensors"
)

pytestmark = [
    pytest.mark.skipif(not CHECKPOINT.is_file(), reason=f"no published network at {CHECKPOINT}"),
    pytest.mark.skipif(not MNIST.is_dir(), reason=f"no MNIST at {MNIST}; set LOSSPRUNE_DATA"),
]


class MLPNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(784, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, 10, bias=False)

    def forward(self, x):
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


def read_idx(name: str) -> torch.Tensor:
    path, packed = MNIST / name, MNIST / f"{name}.gz"
    contents = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    dimensions = contents[3]
    shape = np.frombuffer(contents, ">i4", dimensions, offset=4)
    values = np.frombuffer(contents, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(tuple(shape)).copy())


def images(name: str) -> torch.Tensor:
    return (read_idx(name).float() / 255 - 0.1307) / 0.3081


@pytest.fixture(scope="module")
def training():
    return images("train-images-idx3-ubyte"), read_idx("train-labels-idx1-ubyte").long()


@pytest.fixture(scope="module")
def test_images():
    return images("t10k-images-idx3-ubyte"), read_idx("t10k-labels-idx1-ubyte").long()


class Draws:
    """1000 training images, others at every stage; with seed 0 those of the expected figures."""

    def __init__(self, training, seed: int) -> None:
        self.inputs, self.targets = training
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        chosen = torch.randperm(len(self.targets), generator=self.generator)[:1000]
        yield self.inputs[chosen], self.targets[chosen]


@pytest.fixture
def network():
    model = MLPNet()
    model.load_state_dict(load_file(CHECKPOINT))
    return model


def accuracy(model, test_images, mask=None) -> float:
    """In per cent, to two decimals exactly."""
    inputs, targets = test_images
    if mask is not None:
        mask.apply_(model)
    with torch.no_grad():
        return int((model(inputs).argmax(1) == targets).sum()) / 100


def test_dense(network, test_images):
    assert accuracy(network, test_images) == 93.97


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.5, 93.93), (0.6, 93.78), (0.7, 93.62), (0.8, 92.88), (0.9, 90.28), (0.95, 83.64),
        (0.98, 32.25),
    ],
)  # fmt: skip
def test_magnitude(network, test_images, sparsity, expected):
    mask = lossprune.prune(network, "MP", sparsity=sparsity).mask
    assert mask.removed == round(32_360 * sparsity)
    assert accuracy(network, test_images, mask) == pytest.approx(expected, abs=0.02 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("criterion", "reg", "sparsity", "expected"),
    [
        ("QM", 0.01, 0.98, 82.60),
        pytest.param("QM", 0.01, 0.95, 88.89, marks=MORE),
        pytest.param("QM", 0.0, 0.98, 80.19, marks=MORE),
        pytest.param("LM", 0.0, 0.98, 60.12, marks=MORE),
        ("OBD", 0.0, 0.98, 56.79),
    ],
)
def test_in_140_stages(network, training, test_images, criterion, reg, sparsity, expected):
    result = lossprune.prune(
        network,
        criterion,
        sparsity=sparsity,
        data=Draws(training, seed=0),
        examples=1000,
        stages=140,
        reg=reg,
    )
    assert result.mask.removed == round(32_360 * sparsity)
    reached = accuracy(network, test_images, result.mask)
    # With other examples (seeds 1 to 4) these vary by 1 to 12 points; with the same ones only
    # rounding differs, which may tip a few of 32,360 weights in the course of 140 stages.
    assert reached == pytest.approx(expected, abs=1.0)
