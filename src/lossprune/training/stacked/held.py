"""Networks held in the memory of a stack: read when they change, written back when asked for."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lossprune.training.plain import step_without_gradients
from lossprune.training.stacked.state import Member, Stack

# Tensors, and how often each had been changed in place when it was read or written.
_Seen = list[tuple[Tensor | None, int]]


class Held:
    """Some members of a stack, and what of them their networks and optimizers do not hold yet.

    That a network or an optimizer was changed by somebody else is seen by torch's count of changes
    in place, which ``parameter.data`` alone goes around.

    Attributes:
        chosen: the members, by position.
        stack: their memory, a row each in this order.
    """

    def __init__(self, members: Sequence[Member], chosen: tuple[int, ...]) -> None:
        self.chosen = chosen
        self.stack = Stack.joined([members[it] for it in chosen])
        self._parameters = [list(members[it].network.parameters()) for it in chosen]
        self._buffers = [list(members[it].network.buffers()) for it in chosen]
        self._weights: list[_Seen] = [[] for _ in chosen]
        self._momentum: list[_Seen] = [[] for _ in chosen]
        self._untold: dict[int, tuple[Optimizer, bool]] = {}  # by row, since the last epoch

    def read(self, optimizers: Mapping[int, Optimizer] | None = None) -> None:
        """Read the networks that were changed, and momentum, if optimizers are given."""
        for row, member in enumerate(self.chosen):
            if not _same(self._weights[row], now := self._weights_of(row)):
                self.stack.load(row)
                self._weights[row] = now
            if optimizers is None:
                continue
            optimizer = optimizers[member]
            if not _same(self._momentum[row], now := self._momentum_of(row, optimizer)):
                self.stack.load_momentum(row, optimizer)
                self._momentum[row] = now

    def trained(self, optimizers: Mapping[int, Optimizer], momentum: float) -> None:
        """Take note that the stack is an epoch ahead of networks and optimizers."""
        self._untold = {row: (optimizers[it], bool(momentum)) for row, it in enumerate(self.chosen)}

    def store(self, members: Iterable[int]) -> None:
        """Write what was trained back to the networks and optimizers of these members."""
        wanted = set(members)
        for row in [row for row in self._untold if self.chosen[row] in wanted]:
            optimizer, momentum = self._untold.pop(row)
            self.stack.store(row, optimizer, momentum=momentum)
            step_without_gradients(optimizer)
            self._weights[row] = self._weights_of(row)
            self._momentum[row] = self._momentum_of(row, optimizer)

    def forget(self) -> None:
        """Take the stack's own memory as lost, after storing what it held."""
        self.store(self.chosen)
        self._weights = [[] for _ in self.chosen]
        self._momentum = [[] for _ in self.chosen]

    def _weights_of(self, row: int) -> _Seen:
        return [(it, it._version) for it in (*self._parameters[row], *self._buffers[row])]

    def _momentum_of(self, row: int, optimizer: Optimizer) -> _Seen:
        found = [
            optimizer.state[it].get("momentum_buffer") if it in optimizer.state else None
            for it in self._parameters[row]
        ]
        return [(it, 0 if it is None else it._version) for it in found]


def _same(seen: _Seen, now: _Seen) -> bool:
    return len(seen) == len(now) and all(
        one is other and count == later
        for (one, count), (other, later) in zip(seen, now, strict=True)
    )
