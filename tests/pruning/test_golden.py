"""Statistics and masks of the published code, on three networks; see golden/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lossprune

FOLDER = Path(__file__).parent / "golden"


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)
    )  # fmt: skip


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(45, 4),
    )


def batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(6, 3, 1, bias=False),
        nn.Flatten(),
    )


class Golden:
    """One reference file, its network and its data."""

    def __init__(self, build) -> None:
        with np.load(FOLDER / f"{build.__name__}.npz") as file:
            self.values = {key: torch.from_numpy(file[key]) for key in file.files}
        self.model = build().double()
        self.model.load_state_dict(self.part("state"))
        inputs, targets = self.values["inputs"], self.values["targets"]
        self.batches = list(zip(inputs.split(8), targets.split(8), strict=True))

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            key.removeprefix(f"{prefix}/"): value
            for key, value in self.values.items()
            if key.startswith(f"{prefix}/")
        }


@pytest.fixture(scope="module", params=[mlp, conv, batchnorm], ids=lambda build: build.__name__)
def golden(request):
    return Golden(request.param)


def test_statistics_are_the_published_ones(golden):
    statistics = lossprune.measure(golden.model, golden.batches)

    assert statistics.examples == 24
    for ours, theirs in (
        (statistics.gradient, golden.part("gradient")),
        (statistics.ggn_diagonal, golden.part("ggn_diagonal")),
    ):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert ours[name].dtype == torch.float64
            torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("criterion", ["MP", "LM", "QM", "OBD"])
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("stages", [1, 5])
@pytest.mark.parametrize("reg", [0.0, 0.1])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_mask_is_the_published_one(golden, criterion, schedule, stages, reg, sparsity):
    expected = golden.part(f"mask/{criterion}/{schedule}/{stages}/{reg}/{sparsity}")
    assert expected

    result = lossprune.prune(
        golden.model,
        criterion,
        sparsity=sparsity,
        data=golden.batches,
        examples=24,
        stages=stages,
        schedule=schedule,
        reg=reg,
    )

    assert result.mask == lossprune.Mask(expected)
