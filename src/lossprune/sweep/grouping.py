"""Which runs are trained together."""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from typing import TypeVar

from lossprune.experiment.config import RunConfig

T = TypeVar("T")

Kind = tuple[object, ...]
"""What runs have in common that can be trained together."""


def kind_of(config: RunConfig) -> Kind:
    """Return the kind of a run.

    Whether it is pruned is part of it: the others need not wait for prunings to be done.
    """
    return (
        *(config.arch, config.dataset_name, config.image_size, config.batch_size),
        *(config.train, config.device, config.threads, config.prune_epoch),
    )


def split_evenly(runs: Sequence[T], places: int, most: int | None) -> list[tuple[T, ...]]:
    """Return groups of nearly the same size, in order: one for each place, or more.

    Those that are near in the order share data.

    Args:
        runs: of one kind.
        places: where groups train side by side.
        most: runs of a group; None: no limit.

    >>> split_evenly("abcdefg", 3, None)
    [('a', 'b'), ('c', 'd'), ('e', 'f', 'g')]
    """
    groups = max(min(places, len(runs)), ceil(len(runs) / (most or len(runs))))
    ends = [len(runs) * group // groups for group in range(groups + 1)]
    return [tuple(runs[begin:end]) for begin, end in pairwise(ends)]
