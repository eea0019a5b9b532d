"""Which runs are trained together."""

from itertools import pairwise
from math import ceil

from lossprune.experiment.config import RunConfig
from lossprune.sweep.plan import PlannedRun

Kind = tuple[object, ...]


def kind_of(config: RunConfig) -> Kind:
    """Return what runs have in common that can be trained together.

    Whether they are pruned is part of it: the others need not wait for prunings to be done.
    """
    return (
        *(config.arch, config.dataset_name, config.image_size, config.batch_size),
        *(config.train, config.device, config.threads, config.prune_epoch),
    )


class Gathering:
    """Runs whose next epoch is due, until nobody can join them any more.

    Args:
        order: of the runs; those that are near in it share data.
        most: runs of a group; None: no limit.
    """

    def __init__(self, order: dict[PlannedRun, int], most: int | None) -> None:
        self._order = order
        self._most = most
        self._due: dict[Kind, list[PlannedRun]] = {}
        self.gpus: dict[Kind, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._due.values()))

    def add(self, run: PlannedRun) -> None:
        """Let a run wait for others."""
        self._due.setdefault(kind_of(run.config), []).append(run)

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of which there are runs here."""
        return list(self._due)

    def take(self, kind: Kind, places: int) -> list[tuple[PlannedRun, ...]]:
        """Return groups of nearly the same size, one for each place, or more."""
        due = sorted(self._due.pop(kind), key=self._order.__getitem__)
        groups = max(min(places, len(due)), ceil(len(due) / (self._most or len(due))))
        ends = [len(due) * group // groups for group in range(groups + 1)]
        return [tuple(due[a:b]) for a, b in pairwise(ends)]
