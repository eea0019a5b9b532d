"""Examples that take no part in a fit and choose between what it gives; losses on them, paired."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.errors import PruningError

# Of so many examples one takes no part in the fit.
_EVERY = 5
# Of fewer examples apart than these a fall of the loss is believed only beyond a standard error.
_FEW = 100


@dataclass(frozen=True)
class Change:
    """By how much the mean loss over so many examples changes, and the standard error of that."""

    mean: float
    error: float
    examples: int

    @property
    def lowers(self) -> bool:
        """Whether it is a fall that can be believed."""
        return self.mean < (-self.error if self.examples < _FEW else 0.0)


def change(losses: Tensor | None, before: Tensor) -> Change:
    """Return the change between losses of the same examples, paired.

    With d_n the difference of the losses of example n and a_n how much it counts, the mean is
    d = Σ d_n / Σ a_n and its standard error, that of a ratio of sums,
    √(N / (N − 1) Σ (d_n − d a_n)²) / Σ a_n.
    Source: Cochran, "Sampling Techniques", 1977, section 6.

    Args:
        losses: (n, 2): ℓ and how much it counts, of this process's n of all N examples; None: not
            finite.
        before: the same.

    >>> one, other = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [4.0, 1.0]])
    >>> change(one, other)
    Change(mean=-3.0, error=1.0, examples=2)
    """
    if losses is None:
        return Change(math.inf, 0.0, 1)
    d, a = losses[:, 0] - before[:, 0], before[:, 1]
    sums = d.new_tensor([len(d), d.sum(), a.sum(), d @ d, d @ a, a @ a])
    n, total, amount, dd, da, aa = distributed.summed(sums).tolist()
    mean = total / amount
    squares = max(dd - 2 * mean * da + mean**2 * aa, 0.0)
    error = math.sqrt(n / (n - 1) * squares) / amount if n > 1 else math.inf
    return Change(mean, error, int(n))


def split(
    batches: Sequence[Batch], examples: int | None, asks: str, choice: str
) -> tuple[list[Batch], list[Batch]]:
    """Return the examples of the fit, and those apart: every fifth one.

    Batches that must be kept whole are on one side or the other.

    Args:
        batches: a stage's examples.
        examples: how many of them to take; None: all.
        asks: the argument that asks for it, and
        choice: what the examples apart choose, for the message.

    Raises:
        PruningError: there are none for one of the sides.
    """
    fit: list[Batch] = []
    apart: list[Batch] = []
    seen = 0
    for batch in batches:
        if batch.size is None:
            seen += 1
            (fit if seen % _EVERY else apart).append(batch)
            continue
        if examples is not None:
            batch = batch[: examples - seen]
        places = torch.arange(seen + 1, seen + len(batch) + 1)
        seen += len(batch)
        for side, chosen in ((fit, places % _EVERY != 0), (apart, places % _EVERY == 0)):
            if chosen.any():
                side.append(batch[chosen.nonzero()[:, 0]])
    if not apart and distributed.processes() == 1:
        raise PruningError(
            f"{asks} sets one of every {_EVERY} examples apart, to choose its {choice}, but a "
            f"stage has only {seen}{'' if fit and fit[0].size is not None else ' batches'}"
        )
    return fit, apart
