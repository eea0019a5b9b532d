"""The sparsities that a pruning passes through: as a schedule has them, or found on the way."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lossprune.pruning.stage_record import StageRecord
from lossprune.pruning.strides import SHORTEST, Strides, stride


@dataclass(frozen=True)
class Path:
    """Where the next stage ends.

    Attributes:
        steps: the sparsity after each stage; None: it is found on the way.
        began: κ₀, before the first stage.
        final: κ after the last stage; None: as far as the pruning goes.
        strides: how far a stage goes by what came of the one before; None: each as far as ``even``.
        even: the stride of every stage, where neither steps nor strides say it.
    """

    steps: tuple[float, ...] | None
    began: float
    final: float | None
    strides: Strides | None = None
    even: float = 0.0

    @property
    def total(self) -> int | None:
        """How many stages there are; None: it is not known before."""
        return None if self.steps is None else len(self.steps)

    def aim(self, now: float, completed: int, done: Sequence[StageRecord]) -> float | None:
        """Return κ after the next stage; None: there is none.

        Args:
            now: κ after those completed.
            completed: how many these are.
            done: their records, where steps are found on the way.
        """
        if self.steps is not None:
            return self.steps[completed] if completed < len(self.steps) else None
        if (self.final is not None and now >= self.final) or (
            self.final is None and self._over(done)
        ):
            return None
        wished = self.even if self.strides is None else self.strides.following(self.began, done)
        return self.ahead(now, max(wished, self.pace(now, done)))

    def ahead(self, now: float, wished: float) -> float:
        """Return κ a stride from ``now`` on, or the final one where hardly more is left."""
        if self.final is not None and stride(now, self.final) - wished < SHORTEST:
            return self.final
        return 1 - (1 - now) * math.exp(-wished)

    def pace(self, now: float, done: Sequence[StageRecord]) -> float:
        """Return the shortest stride that keeps to the ceilings; 0: any does."""
        if self.strides is None or self.final is None or now >= self.final:
            return 0.0
        return self.strides.pace(stride(now, self.final), done)

    def _over(self, done: Sequence[StageRecord]) -> bool:
        """Whether a ceiling is reached."""
        if self.strides is None:
            return False
        spent = sum(stage.seconds for stage in done)
        stages, seconds = self.strides.stages, self.strides.seconds
        return (stages is not None and len(done) >= stages) or (
            seconds is not None and spent >= seconds
        )
