"""Lightning's and Hugging Face's loops train a sparse model as any other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lossprune
from lossprune.kernels.compiler import compiler_available
from tests.training.convolution.oracle import random_mask

pytestmark = [
    pytest.mark.skipif(not compiler_available(), reason="no C compiler here"),
    pytest.mark.filterwarnings("ignore"),  # of the trainers' own
    pytest.mark.full("a sparse model in Lightning's and Hugging Face's loops"),
]


class Scored(nn.Module):
    """Named arguments and a loss among the outputs, as Hugging Face has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(pixels)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def digits() -> tuple[Tensor, Tensor]:
    data = lossprune.data.load("digits", seed=1111)
    return data.inputs(data.train.images)[:400], data.train.labels[:400]


@pytest.fixture
def network() -> Scored:
    torch.manual_seed(0)
    return Scored()


@pytest.fixture
def mask(network):
    return random_mask(network, 0.3)


def trained(network: nn.Module, mask, digits, steps: int, lr: float) -> nn.Module:
    """The masked dense network after plain steps of SGD, without momentum."""
    dense = lossprune.Mask(mask).apply_(copy.deepcopy(network)).train()
    pixels, labels = digits
    optimizer = torch.optim.SGD(dense.parameters(), lr=lr)
    for step in range(steps):
        rows = slice(step * 50 % 400, step * 50 % 400 + 50)
        optimizer.zero_grad()
        dense(pixels[rows], labels[rows])["loss"].backward()
        optimizer.step()
        lossprune.Mask(mask).apply_(dense)
    return dense


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_lightning(network, mask, digits, tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    class Digits(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = lossprune.sparse(network, mask, tuple(part[:2] for part in digits))

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return self.model(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    expected = trained(network, mask, digits, 16, 0.05)
    module = Digits()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*digits), batch_size=50))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    again = Digits()
    again.load_state_dict(state)
    assert_close(again.model.write_back_(), expected)
    assert_close(module.model.write_back_(), expected)


def test_transformers(network, mask, digits, tmp_path):
    transformers = pytest.importorskip("transformers")
    pixels, labels = digits
    rows = [{"pixels": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    example = {"pixels": pixels[:2], "labels": labels[:2]}
    model = lossprune.sparse(network, mask, example)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=50, learning_rate=0.05,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[],
        save_steps=8, train_sampling_strategy="sequential",
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    expected = trained(network, mask, digits, 8, 0.05)
    assert_close(model.write_back_(), expected)
