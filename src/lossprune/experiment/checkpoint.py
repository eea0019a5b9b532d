"""The state of an unfinished run, in one small file."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossprune.experiment.pt_file import check_seal, sealed
from lossprune.experiment.record import RunRecord
from lossprune.pruning import Mask

_FORMAT = "lossprune checkpoint 1"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped.

    The best network is in it only where it would be lost otherwise: where it is the current one it
    is in ``network``, and where it is older it has usually been in ``best_model.pt`` since before
    this checkpoint was written.  Random states are not in it: every epoch and every stage draws
    from a generator seeded for it alone.

    Attributes:
        record: as of the last whole epoch or stage.
        network: parameters and buffers; while pruning, the network that is pruned.
        optimizer: state of the optimizer.
        schedule: state of the learning rate's schedule.
        mask: while pruning, the mask after the last whole stage; from the first epoch after it on
            the mask is in its file alone.
        best: the best network, where it is of an epoch after the checkpoint before this one.
    """

    record: RunRecord
    network: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    mask: Mask | None = None
    best: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the contents of ``checkpoint.pt``."""
        contents = {
            "format": _FORMAT,
            "record": self.record.to_dict(),
            "network": dict(self.network),
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "mask": dict(self.mask or {}),
            "best": dict(self.best),
        }
        return sealed(contents)

    @classmethod
    def from_bytes(cls, file: bytes, path: Path, device: torch.device) -> "Checkpoint":
        """Return what a ``checkpoint.pt`` holds; messages name it ``path``.

        Raises:
            ValueError: it is damaged, which no interruption of a run causes.
        """
        check_seal(file, path)
        try:
            contents = torch.load(io.BytesIO(file), map_location=device, weights_only=True)
            if contents.pop("format") != _FORMAT:
                raise ValueError("of another format")
            record = RunRecord.from_dict(contents.pop("record"))
            kept = contents.pop("mask")
            mask = Mask(kept, criterion=record.config["pm"]) if kept else None
            return cls(record=record, mask=mask, **contents)
        except Exception as error:  # torch raises half a dozen kinds
            raise ValueError(f"{path} cannot be read ({type(error).__name__})") from error
