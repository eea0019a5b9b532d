"""A mask in Hugging Face's ``Trainer``."""

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.names import counted
from lossprune.pruning.shards import local
from lossprune.pruning.stage_record import StageRecord
from lossprune.trainers.gradual import GradualPruning
from lossprune.trainers.holding import HeldMask

FILE = "mask.safetensors"  # in each checkpoint's folder


class MaskCallback(TrainerCallback):
    """Hold a mask through a training, in its checkpoints too; or prune on the way.

    Removed weights are exactly 0 after every step.  Each ``checkpoint-N`` gets the mask as
    ``mask.safetensors``, and ``train(resume_from_checkpoint=...)`` takes it from there: the
    callback then needs none.  A checkpoint outside the trainer's ``output_dir`` must be named in
    ``TrainingArguments(resume_from_checkpoint=...)`` too, as a callback is not told.

    Args:
        of: the mask; or when and how to prune; or nothing, to go on with a checkpoint's mask.

    Raises:
        ValueError: ``of`` is none of these.
        PruningError: when training begins: no mask was given or found; the checkpoint has another
            one, or its mask is not that of the weights; or as :meth:`lossprune.Mask.enforce`.
    """

    def __init__(self, of: Mask | GradualPruning | None = None) -> None:
        self._held = HeldMask(of)

    @property
    def mask(self) -> Mask | None:
        """The mask that is held; None before the first stage of a pruning on the way."""
        return self._held.mask

    @property
    def records(self) -> tuple[StageRecord, ...]:
        """Records of the stages that were done in this training, since it last went on."""
        return tuple(self._held.records)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        """Enforce the mask, after a checkpoint's weights are in place."""
        self._held.restart()
        if state.global_step > 0:
            self._restore(args, state, objects["model"])
        self._held.begin(objects["model"], [objects["optimizer"]])
        self.on_step_end(args, state, control, **objects)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        """Prune, where it is time to."""
        model, loader = objects["model"], objects["train_dataloader"]
        self._held.after_step(state.global_step, model, [objects["optimizer"]], loader)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        """Write the mask beside the weights of a checkpoint."""
        if args.should_save and self.mask is not None:
            self.mask.save(_folder(args, state) / FILE)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        """Let go; of a best checkpoint that was loaded, have the mask."""
        self._held.end()
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and (Path(best) / FILE).is_file():
            self._held.mask = Mask.load(Path(best) / FILE)

    def _restore(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Take the mask of the checkpoint that the training goes on from."""
        folders = [_folder(args, state)]
        if args.resume_from_checkpoint is not None:
            folders.insert(0, Path(args.resume_from_checkpoint))
        found = [folder / FILE for folder in folders if (folder / FILE).is_file()]
        if found:
            mask, plan = Mask.load(found[0]), self._held.plan
            _check_zeros(mask, model, found[0])
            due = 0 if plan is None else plan.due(state.global_step)
            self._held.restore(mask, str(found[0]), due)
        elif self._held.plan is None and self.mask is None:
            raise PruningError(
                f"the callback has no mask, and there is no {folders[0] / FILE}: give "
                "MaskCallback(mask), or name the checkpoint in "
                "TrainingArguments(resume_from_checkpoint=...)"
            )
        elif self._held.plan is None or self._held.plan.due(state.global_step):
            warnings.warn(
                f"the checkpoint of step {state.global_step} has no mask beside it "
                f"({folders[0] / FILE}): pruning begins here",
                stacklevel=2,
            )


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _check_zeros(mask: Mask, model: nn.Module, path: Path) -> None:
    """Raise unless the weights that a mask removes are 0 in the weights of its checkpoint.

    Frozen ones may come from elsewhere: a checkpoint of adapters has the adapters alone.
    """
    trained = [pair for pair in mask.removed_of(model) if pair[0].requires_grad]
    left = sum(int(local(weight)[where].count_nonzero()) for weight, where in trained)
    if left:
        raise PruningError(
            f"{path} is not the mask of the weights that the training goes on with: "
            f"{counted(left, 'weight')} that it removes are not 0; name the checkpoint in "
            "TrainingArguments(resume_from_checkpoint=...) if it is in another folder"
        )
