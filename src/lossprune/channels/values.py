"""What is known of a tensor inside a network: channel by channel, for every input there is.

Channels that must stay together, such as the two that a residual sum adds, are of one group: either
all of a group are there in the compacted network, or none.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor, along one of its dimensions.

    Attributes:
        groups: int64 (channels,), the group of each (see :class:`ChannelGroups`).
        live: bool (channels,), whether a path of kept weights leads here from the input.
        constant: float64 (channels,), the number that a channel without such a path holds at every
            position of every example; NaN where there is a path, or no such number.
        axis: the dimension, counted from the last: -1 for a linear layer's, -3 for a Conv2d's.
        flattened: a flatten has joined each channel with a number of positions not known yet, the
            channel being the slower index (``"slow"``) or the faster one (``"fast"``).
    """

    groups: Tensor
    live: Tensor
    constant: Tensor
    axis: int
    flattened: Literal["slow", "fast"] | None = None

    def __len__(self) -> int:
        return len(self.groups)

    def mapped(self, constant: Tensor) -> "Channels":
        """The same channels with other constants, NaN where there was none."""
        return replace(self, constant=torch.where(self.constant.isnan(), self.constant, constant))

    def unfolded(self, features: int) -> "Channels | None":
        """As the ``features`` features that a flatten has made of them; None if they cannot be."""
        if self.flattened is None:
            return self if len(self) == features else None
        if features % len(self):
            return None
        spread = Tensor.repeat_interleave if self.flattened == "slow" else Tensor.repeat
        parts = (self.groups, self.live, self.constant)
        return Channels(*(spread(values, features // len(self)) for values in parts), axis=-1)

    def folded(self, features: Tensor) -> Tensor:
        """Which channels have any of the marked ``features``: the way back of :meth:`unfolded`."""
        if self.flattened == "slow":
            return features.reshape(len(self), -1).any(1)
        return features.reshape(-1, len(self)).any(0)


@dataclass(frozen=True)
class Unknown:
    """A tensor of which nothing is known: an input of the network, or what ``reason`` says."""

    reason: str | None = None


Value = Channels | Unknown


class ChannelGroups:
    """A register of groups of channels, some of which have been found to be the same."""

    def __init__(self) -> None:
        self._parents: list[int] = []

    def __len__(self) -> int:
        return len(self._parents)

    def fresh(self, count: int) -> Tensor:
        """Return ``count`` new groups."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def join_(self, first: Tensor, second: Tensor) -> None:
        """Make each group in ``first`` the same as the one beside it in ``second``."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self._parents[self._root(a)] = self._root(b)

    def representatives(self) -> Tensor:
        """Return one representative for each group: equal where they are the same."""
        return torch.tensor([self._root(i) for i in range(len(self))], dtype=torch.int64)

    def _root(self, i: int) -> int:
        while self._parents[i] != i:
            self._parents[i] = i = self._parents[self._parents[i]]
        return i
