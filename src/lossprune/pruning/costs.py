"""What weights cost, and what a mask leaves of that: multiply-adds, or whatever is counted."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the flags read what is written here, without torch
    from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """What a mask leaves of what the prunable weights cost.

    Attributes:
        unit: what is counted, such as multiply-adds.
        dense: what all prunable weights cost.
        left: what those that the mask keeps cost.

    >>> Cost("multiply-adds", dense=1600, left=400).told()
    '400 of 1,600 multiply-adds of the prunable weights are left (25.00 %)'
    """

    unit: str
    dense: int
    left: int

    @property
    def share(self) -> float:
        """The share that is left."""
        return self.left / max(1, self.dense)

    def told(self) -> str:
        """Return it in one sentence without its end."""
        return (
            f"{self.left:,} of {self.dense:,} {self.unit} of the prunable weights are left "
            f"({100 * self.share:.2f} %)"
        )


@dataclass(frozen=True)
class WeightCosts:
    """What a weight of each parameter costs: all of one parameter the same.

    Attributes:
        unit: what a cost is a number of.
        each: c ≥ 0, by parameter name.
        prices: what a scope that goes by them divides saliencies by, by name.
    """

    unit: str
    each: Mapping[str, int]
    prices: Mapping[str, float]

    def of(self, kept: "Mapping[str, Tensor]") -> Cost:
        """Return what a mask leaves."""
        dense = sum(self.each[name] * mask.numel() for name, mask in kept.items())
        left = sum(self.each[name] * int(mask.count_nonzero()) for name, mask in kept.items())
        return Cost(self.unit, dense, left)


def share_gone(name: str, left: Any) -> float:
    """Return κ, the share of a cost that is gone, of the share that is left.

    It is the number closest to 1 minus the decimal number that was written: 0.3 of 0.7.

    Raises:
        ValueError: not in (0, 1]; ``name`` is the argument's.

    >>> share_gone("multiply_adds", 0.7), 1 - 0.7
    (0.3, 0.30000000000000004)
    """
    number = isinstance(left, (int, float)) and not isinstance(left, bool)
    gone = float(1 - Fraction(repr(float(left)))) if number and 0 < left <= 1 else 1.0
    if gone == 1:
        raise ValueError(f"{name} must be a share that is left, a number in (0, 1], got {left!r}")
    return gone
