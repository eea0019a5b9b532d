"""How many examples and columns go through the network at once, within a budget of memory."""

from dataclasses import dataclass

import torch

# The default of `memory`: beyond these a measurement does not get faster.
MEMORY = {"cpu": 256 << 20, "cuda": 4 << 30}
# What a column needs beside its kept gradients: those under way through the network.
_UNDER_WAY = 2
# What products and convolutions work in: this much, or half of a smaller budget.
_WORK = 32 << 20


@dataclass(frozen=True)
class Budget:
    """Bytes that may be in use at once, and what they go to.

    Attributes:
        memory: the budget.
        graph: what the forward pass of one example keeps.
        column: the gradients at all the layers' outputs, of one example and column.

    >>> Budget(memory=1000, graph=20, column=10).examples(columns=8)
    4
    >>> Budget(memory=1000, graph=20, column=10).columns(examples=10)
    1
    """

    memory: int
    graph: int
    column: int

    def examples(self, columns: int) -> int:
        """Return how many examples fit with that many columns each; at least one."""
        example = self.graph + (columns + _UNDER_WAY) * self.column
        return max(1, self._free // max(1, example))

    @property
    def _free(self) -> int:
        return self.memory - min(_WORK, self.memory // 2)

    def columns(self, examples: int) -> int:
        """Return how many columns at once fit with that many examples; at least one."""
        free = self._free // examples - self.graph
        return max(1, free // max(1, self.column) - _UNDER_WAY)


def checked_memory(memory: int | None, device: torch.device) -> int:
    """Return the bytes that may be in use at once; None: what suits the device.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    if memory is None:
        memory = MEMORY.get(device.type, MEMORY["cuda"])
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory must be a whole number of bytes, at least 1, got {memory!r}")
    return memory
