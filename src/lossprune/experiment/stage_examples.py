"""Which examples a pruning reads: of training at each stage, of a split to judge masks by."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lossprune.data import Dataset, Split
from lossprune.training.evaluation import examples_at_a_time

_EXAMPLES_PER_BATCH = 100


class StageExamples:
    """The training examples of each pruning stage, drawn from the seed and the stage alone.

    So a run that resumes at a stage measures on the very examples it would have seen.  Without
    augmentation; all of them where there are fewer; ``stage`` is set by whoever prunes.
    """

    def __init__(self, dataset: Dataset, examples: int, seed: int) -> None:
        self.dataset = dataset
        self.examples = min(examples, len(dataset.train))
        self.seed = seed
        self.stage = 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Seeds that are close together would meet those of the epochs, seed + epoch.
        mixed = (self.seed * 1_000_003 + self.stage * 998_244_353 + 0x5EED) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        train = self.dataset.train
        order = torch.randperm(len(train), generator=generator)[: self.examples]
        return self.dataset.batches(train, _EXAMPLES_PER_BATCH, order=order)


@dataclass(frozen=True)
class SplitBatches:
    """The examples of a split, from the first on each time they are iterated."""

    dataset: Dataset
    split: Split

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.dataset.batches(self.split, examples_at_a_time(self.dataset))
