"""How much of what is left a stage removes: as asked for, or as far as its model holds.

With a stride of s a stage leaves e^(−s) of what it found.  A model of the loss is exact near the
weights that it was measured at, and what it misses grows with the square of the stride; so the miss
per stride, |realised − predicted| / s, grows with s, and a given number of stages loses least in
all where it is the same for every one (the rule of adaptive integration: the error per unit step,
Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", 1993, section II.4).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lossprune.pruning.stage_record import StageRecord

# Nats of loss, missed by the model, for every halving of what is left times ln 2.
TOLERANCE = 0.1
# A stage leaves 99 % at most, and the first one half.
SHORTEST, FIRST = -math.log(0.99), math.log(2)
# A stride grows and shrinks by these at most, and aims at so much of the tolerance.
_GROWS, _SHRINKS, _AIMS = 2.0, 0.2, 0.8


@dataclass(frozen=True)
class Strides:
    """Strides that follow the model's honesty.

    Attributes:
        tolerance: of the miss per stride.
        stages: the most there may be, by a ceiling on examples; None: no ceiling.
        seconds: ceiling on the time of all stages; None: none.
    """

    tolerance: float = TOLERANCE
    stages: int | None = None
    seconds: float | None = None

    def following(self, began: float, done: Sequence[StageRecord]) -> float:
        """Return the stride of the next stage, by the last one; ``began`` is κ at the start."""
        if not done:
            return FIRST
        last = done[-1]
        before = done[-2].gone if len(done) > 1 else began
        return self.after(stride(before, last.gone), missed(last))

    def after(self, tried: float, miss: float) -> float:
        """Return the stride that should miss what the tolerance is, by one that missed so much."""
        if not math.isfinite(miss):
            factor = _SHRINKS
        elif miss <= 0:
            factor = _GROWS
        else:
            factor = _AIMS * self.tolerance * tried / miss
        return max(SHORTEST, tried * min(_GROWS, max(_SHRINKS, factor)))

    def agrees(self, tried: float, miss: float) -> bool:
        """Whether prediction and realised change agree, for a stride of this length."""
        return tried <= SHORTEST * 1.0001 or miss <= self.tolerance * tried

    def pace(self, left: float, done: Sequence[StageRecord]) -> float:
        """Return the shortest stride that keeps to the ceilings, with a stride of ``left`` to go.

        0 where there is no ceiling; ``left`` where the next stage is the last one.
        """
        stages = [math.inf]
        if self.stages is not None:
            stages.append(self.stages - len(done))
        if self.seconds is not None and done:
            spent = sum(stage.seconds for stage in done)
            stages.append((self.seconds - spent) / max(spent / len(done), 1e-9))
        return left / max(1.0, min(stages))


def stride(before: float, after: float) -> float:
    """Return −ln of the share that is left at one sparsity of what was at another."""
    return math.log1p(-before) - math.log1p(-after)


def missed(stage: StageRecord) -> float:
    """Return |realised − predicted change of the loss|; infinite where one is not finite."""
    assert stage.predicted_change is not None
    assert stage.realised_change is not None
    miss = abs(stage.realised_change - stage.predicted_change)
    return miss if math.isfinite(miss) else math.inf
