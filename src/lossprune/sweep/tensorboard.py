"""A run's curves as TensorBoard files (extra ``tensorboard``)."""

import shutil
from dataclasses import asdict
from pathlib import Path

from lossprune.experiment.record import RunRecord
from lossprune.experiment.stage_dict import predicted_change


def write_events(record: RunRecord, folder: Path) -> None:
    """Write losses and errors by epoch, and what each pruning stage did, replacing older files.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard: TensorBoard is not installed; install lossprune[tensorboard]"
        ) from None
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        pruned = [] if record.after_pruning is None else [record.after_pruning]
        for row in sorted([*record.epochs, *pruned], key=lambda row: row.epoch):
            for name, value in asdict(row.scores).items():
                split, what = name.split("_")
                writer.add_scalar(f"{what}/{split}", value, row.epoch)
        for stage in record.stages:
            values = {name: stage[name] for name in ("sparsity", "loss_before", "loss_after")}
            values |= {"predicted_change": predicted_change(stage), "reg": stage.get("reg")}
            for name, value in values.items():
                if value is not None:
                    writer.add_scalar(f"stage/{name}", value, stage["stage"])
