"""Fine-tune in Lightning's Trainer, with the mask in its checkpoints."""

import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lossprune


class EnforceMask(pl.Callback):
    """Hold a mask during training; write it into checkpoints and read it from them."""

    def __init__(self, mask: lossprune.Mask | None = None) -> None:
        self.mask = mask

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Enforce the mask on every optimizer, after a checkpoint's weights are in place."""
        self.running = [self.mask.enforce(module, optimizer) for optimizer in trainer.optimizers]

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Let go, so that another fit with the same optimizer is free."""
        for enforcement in self.running:
            enforcement.remove()

    def state_dict(self) -> dict[str, Any]:
        """Put into a checkpoint."""
        return {"mask": dict(self.mask), "criterion": self.mask.criterion}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take from a checkpoint."""
        self.mask = lossprune.Mask(state["mask"], criterion=state["criterion"])


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


def trainer(folder: Path, callback: EnforceMask, epochs: int) -> pl.Trainer:
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
        first = trainer(Path(folder), EnforceMask(mask), epochs=5)
        first.fit(model, loader)
        first.save_checkpoint(checkpoint)

        resumed = Digits()
        held = EnforceMask()  # gets its mask from the checkpoint
        trainer(Path(folder), held, epochs=10).fit(
            resumed, loader, ckpt_path=checkpoint, weights_only=True
        )
    weights = (resumed.network[1].weight, resumed.network[3].weight)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    print(f"{zeros} weights are exactly 0, {held.mask.removed} were removed")


if __name__ == "__main__":
    main()
