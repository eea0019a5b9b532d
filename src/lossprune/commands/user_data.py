"""What a network of one's own is pruned, tested and timed on: a user's batches, or a data set."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lossprune.data import load
from lossprune.experiment.stage_examples import SplitBatches, StageExamples
from lossprune.user_code import Batches, find_function


@dataclass(frozen=True)
class UsersData:
    """What flags of ``lossprune prune`` and ``lossprune sensitivity`` name.

    Attributes:
        train: batches to prune on, if any.
        test: batches to test on, if any.
        validation: batches to judge masks on, if any.
        offered: what the function that builds the network may ask for, by name.
    """

    train: Iterable[Any] | None
    test: Iterable[Any] | None
    validation: Iterable[Any] | None = None
    offered: Mapping[str, Any] = field(default_factory=dict)

    @property
    def drawn(self) -> int | None:
        """How many examples of a data set each stage has; None: the data are the user's batches."""
        return self.train.examples if isinstance(self.train, StageExamples) else None

    @classmethod
    def of(cls, settings: Mapping[str, Any], data_path: Path) -> "UsersData":
        """Return what ``--data``, ``--test`` or ``--dataset`` names; nothing is asked for yet.

        A command need not have ``--test``.

        Raises:
            ValueError, FileNotFoundError: there is no such function or data set.
        """
        if (name := settings["dataset"]) is None:
            train, test, validation = (
                batches_of(settings.get(flag), f"--{flag}")
                for flag in ("data", "test", "validation")
            )
            return cls(train, test, validation)
        seed = settings["seed"]
        dataset = load(name, data_path, seed=seed)
        return cls(
            StageExamples(dataset, settings["examples"] or len(dataset.train), seed),
            SplitBatches(dataset, dataset.test),
            SplitBatches(dataset, dataset.valid),
            {
                "shape": dataset.shape,
                "classes": len(dataset.classes),
                "generator": torch.Generator().manual_seed(seed),
            },
        )


def batches_of(named: str | None, what: str) -> Batches | None:
    """Return the batches of the function that a flag names."""
    return None if named is None else Batches(find_function(named, what), named, what)
