"""A pruning that goes on until something holds of its mask, such as that a file is small enough."""

from dataclasses import dataclass, field

import torch

from lossprune.pruning.automatic import Until
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.trial import Attempt, Trial

# The mask is found to so much of all that there is to remove.
_RESOLUTION = 10_000


@dataclass(eq=False)
class Target:
    """Where a pruning ends that goes on until something holds.

    Attributes:
        until: what is to hold; None: the pruning ends elsewhere.
        met: whether it holds.
    """

    until: Until | None
    met: bool = field(default=False, init=False)

    def begin(self, mask: Mask) -> None:
        """Take this mask, of a network as it is, as the one to go on from.

        Raises:
            PruningError: it does not hold of the network without any of the weights.
        """
        if self.until is None:
            return
        self.met = self.until(mask, {})
        none = Mask({name: torch.zeros_like(kept) for name, kept in mask.items()})
        if not self.met and not self.until(none, {}):
            raise PruningError(
                f"{self.until!r} does not hold even where all {mask.total:,} prunable weights are "
                "removed"
            )

    def cut(self, trial: Trial, attempt: Attempt) -> Attempt:
        """Return a stage, or as much of it as is enough."""
        if self.until is None or not self._holds(trial, attempt):
            return attempt
        self.met = True
        low, enough = 0, attempt
        finest = max(1, trial.pruning.selection.whole // _RESOLUTION)
        while enough.amount - low > finest:
            tried = trial.removing((low + enough.amount) // 2)
            if self._holds(trial, tried):
                enough = tried
            else:
                low = tried.amount
        return enough

    def end(self, mask: Mask) -> None:
        """Take this mask as the last one.

        Raises:
            PruningError: what was to hold does not.
        """
        if self.until is not None and not self.met:
            raise PruningError(
                f"{self.until!r} does not hold where {mask.removed:,} of {mask.total:,} weights "
                "are removed, and the pruning can go no further"
            )

    def _holds(self, trial: Trial, attempt: Attempt) -> bool:
        assert self.until is not None
        return self.until(attempt.reached, {**trial.moving.network.moved, **attempt.move.values})
