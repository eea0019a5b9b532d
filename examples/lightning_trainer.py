"""Fine-tune in Lightning's Trainer, with the mask in its checkpoints."""

import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lossprune
from lossprune.trainers.lightning import MaskCallback


class Digits(pl.LightningModule):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.network(images)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def trainer(folder: Path, callback: MaskCallback, epochs: int) -> pl.Trainer:
    """Return a quiet trainer on one CPU."""
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    """Prune, fine-tune, save; then go on from the checkpoint in new objects."""
    pl.seed_everything(0)
    digits = lossprune.data.load("digits", seed=1111)
    images = TensorDataset(digits.inputs(digits.train.images), digits.train.labels)
    loader = DataLoader(images, batch_size=100, shuffle=True)
    model = Digits()
    mask = lossprune.prune(model, "QM", sparsity=0.8, data=loader, stages=14).mask
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "last.ckpt"
        first = trainer(Path(folder), MaskCallback(mask), epochs=5)
        first.fit(model, loader)
        first.save_checkpoint(checkpoint)

        resumed = Digits()
        held = MaskCallback()  # gets its mask from the checkpoint
        trainer(Path(folder), held, epochs=10).fit(
            resumed, loader, ckpt_path=checkpoint, weights_only=True
        )
    weights = (resumed.network[1].weight, resumed.network[3].weight)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    print(f"{zeros} weights are exactly 0, {held.mask.removed} were removed")


if __name__ == "__main__":
    main()
