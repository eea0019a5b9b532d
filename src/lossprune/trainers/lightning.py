"""A mask in Lightning's ``Trainer``, of ``pytorch_lightning`` or ``lightning``."""

import warnings
from typing import TYPE_CHECKING, Any

from torch.optim.swa_utils import AveragedModel

from lossprune.pruning.mask import Mask
from lossprune.pruning.stage_record import StageRecord
from lossprune.trainers.gradual import GradualPruning
from lossprune.trainers.holding import HeldMask

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    # Each calls the callbacks of the other too: only the names of the hooks matter to them.
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError:
        from lightning.pytorch import Callback


class MaskCallback(Callback):
    """Hold a mask through a training, in its checkpoints too; or prune on the way.

    Removed weights are exactly 0 after every step, of every optimizer that holds some of them.  The
    mask is in each checkpoint, under ``["callbacks"]["MaskCallback"]``, and ``fit(...,
    ckpt_path=...)`` takes it from there: the callback then needs none.

    Args:
        of: the mask; or when and how to prune; or nothing, to go on with a checkpoint's mask.

    Raises:
        ValueError: ``of`` is none of these.
        PruningError: when training begins: no mask was given or found; the checkpoint has another
            one; or as :meth:`lossprune.Mask.enforce`.
    """

    def __init__(self, of: Mask | GradualPruning | None = None) -> None:
        self._held = HeldMask(of)
        self._restored = False

    @property
    def mask(self) -> Mask | None:
        """The mask that is held; None before the first stage of a pruning on the way."""
        return self._held.mask

    @property
    def records(self) -> tuple[StageRecord, ...]:
        """Records of the stages that were done in this training, since it last went on."""
        return tuple(self._held.records)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Enforce the mask on every optimizer, after a checkpoint's weights are in place."""
        if not (self._restored and trainer.ckpt_path):
            self._held.restart()
            due = self._held.plan is None or self._held.plan.due(trainer.global_step)
            if trainer.ckpt_path and self.mask is not None and due:
                warnings.warn(
                    f"{trainer.ckpt_path} has no mask of this callback: pruning begins here",
                    stacklevel=2,
                )
        self._restored = False
        self._held.begin(pl_module, trainer.optimizers)
        self._zero_averages_(trainer)
        self._prune(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Prune, where it is time to."""
        self._prune(trainer, pl_module)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Let go, so that another fit with the same optimizer is free."""
        self._held.end()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint gets: bool tensors by name, criterion, number of stages."""
        if self.mask is None:
            return {}
        return {
            "mask": dict(self.mask.to("cpu")),
            "criterion": self.mask.criterion,
            "completed": self._held.completed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the mask of a checkpoint.

        Raises:
            PruningError: another one was given.
        """
        self._held.restart()
        mask = Mask(state_dict["mask"], criterion=state_dict["criterion"])
        self._held.restore(mask, "the checkpoint", state_dict["completed"])
        self._restored = True

    def _prune(self, trainer: "Trainer", module: "LightningModule") -> None:
        loader = trainer.train_dataloader
        before = self._held.completed
        self._held.after_step(trainer.global_step, module, trainer.optimizers, loader)
        if self._held.completed > before:
            self._zero_averages_(trainer)

    def _zero_averages_(self, trainer: "Trainer") -> None:
        """Apply the mask to averages that began before it; from then on they keep to it."""
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            for value in vars(callback).values():
                if isinstance(value, AveragedModel) and self.mask is not None:
                    self.mask.apply_(value)
