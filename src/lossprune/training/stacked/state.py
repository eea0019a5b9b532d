"""The weights, momentum and masks of several networks, along a leading axis.

Index letters: m member, n example, and the axes of one network's parameter after m.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossprune.training.mirror import (
    MOMENTUM,
    Mirror,
    momentum_of,
    read_,
    read_momentum_,
    write_,
    write_momentum_,
)
from lossprune.training.plain import step_without_gradients

# Tensors, and how often each had been changed in place when it was read or written.
_Seen = list[tuple[Tensor | None, int]]
_INTEGERS = {4: torch.int32, 8: torch.int64}  # by bytes a weight


@dataclass(frozen=True)
class StackMember:
    """A network and, for each parameter that has removed weights, True where one is kept."""

    network: nn.Module
    kept: Mapping[str, Tensor]


class Stack:
    """The state of m networks, updated in place.

    :meth:`over` looks at one network's own tensors, with an axis put before them; :meth:`joined`
    holds copies of several, a row each.

    Attributes:
        parameters: (m, *shape) by name.
        buffers: (m, *shape) by name, such as running means.
        velocities: momentum, as the parameters.
        totals: float64 (m,), the sum of the losses of all examples so far.
    """

    def __init__(
        self,
        members: Sequence[StackMember],
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        velocities: dict[str, Tensor],
    ) -> None:
        self.members = members
        self.parameters, self.buffers, self.velocities = parameters, buffers, velocities
        some = next(iter(parameters.values()))
        self.dtype, self.device = some.dtype, some.device
        count = len(members)
        self.totals = torch.zeros(count, dtype=torch.float64, device=some.device)
        self._rates = torch.zeros(count, dtype=some.dtype, device=some.device)
        self._decays = torch.zeros_like(self._rates)
        self._rows = {name: self._row(name) for name in parameters}

    def __len__(self) -> int:
        return len(self.members)

    @staticmethod
    def over(member: StackMember, optimizer: Optimizer | None = None) -> Stack:
        """Return a stack of one, whose tensors are those of the network and of the optimizer.

        Without an optimizer, or its momentum, velocities are of its own.
        """
        network = member.network
        parameters, buffers = (
            {name: tensor.detach()[None] for name, tensor in tensors}
            for tensors in (network.named_parameters(), network.named_buffers())
        )
        velocities = {
            name: torch.zeros_like(parameter, requires_grad=False)[None]
            if optimizer is None
            else momentum_of(parameter, optimizer)[None]
            for name, parameter in network.named_parameters()
        }
        return Stack((member,), parameters, buffers, velocities)

    @staticmethod
    def joined(members: Sequence[StackMember]) -> Stack:
        """Return a stack of several with memory of its own, not yet loaded."""

        def room(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: torch.empty((len(members), *one.shape), dtype=one.dtype, device=one.device)
                for name, one in tensors.items()
            }

        first = members[0].network
        parameters = dict(first.named_parameters())
        return Stack(members, room(parameters), room(dict(first.named_buffers())), room(parameters))

    def mirrors(self, row: int) -> list[Mirror]:
        """Return the parameters and buffers of one network, and its row of them."""
        network = self.members[row].network
        return [
            *(
                Mirror(parameter, ..., self.parameters[name][row], self.velocities[name][row])
                for name, parameter in network.named_parameters()
            ),
            *(
                Mirror(buffer, ..., self.buffers[name][row])
                for name, buffer in network.named_buffers()
            ),
        ]

    def begin(self, settings: Sequence[Mapping[str, Any]]) -> None:
        """Begin an epoch with each member's own learning rate and weight decay."""
        self.totals.zero_()
        for rates, factor, name in ((self._rates, -1, "lr"), (self._decays, 1, "weight_decay")):
            values = [factor * float(own[name]) for own in settings]
            rates.copy_(torch.tensor(values, dtype=torch.float64))

    def step_(self, name: str) -> None:
        """Take a parameter's step of SGD: v ← v + λθ, θ ← θ − ηv, and 0 where it is removed.

        v is to hold momentum · v + gradient already.
        """
        parameter, velocity, rate, decay, bits, kept = self._rows[name]
        velocity.addcmul_(parameter, decay)
        parameter.addcmul_(velocity, rate)
        if bits is not None and kept is not None:
            # And-ing bits leaves +0.0 whatever was there, with vector instructions.
            bits.bitwise_and_(kept)

    def _row(
        self, name: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        parameter = self.parameters[name]
        shape = (-1, *(1 for _ in parameter.shape[1:]))
        bits = kept = None
        if any(name in member.kept for member in self.members):
            integers = _INTEGERS[parameter.element_size()]
            bits = parameter.view(integers)
            kept = torch.full_like(bits, -1)
            for row, member in zip(kept, self.members, strict=True):
                if name in member.kept:
                    row.copy_(member.kept[name]).neg_()
        rates, decays = self._rates.view(shape), self._decays.view(shape)
        return parameter, self.velocities[name], rates, decays, bits, kept


class StackCache:
    """Some members in the memory of a stack: read when they change, written back when asked for.

    That a network or an optimizer was changed by somebody else is seen by torch's count of changes
    in place, which ``parameter.data`` alone goes around.

    Attributes:
        chosen: the members, by position.
        stack: their memory, a row each in this order.
    """

    def __init__(self, members: Sequence[StackMember], chosen: tuple[int, ...]) -> None:
        self.chosen = chosen
        self.stack = Stack.joined([members[member] for member in chosen])
        self._parameters = [list(members[member].network.parameters()) for member in chosen]
        self._buffers = [list(members[member].network.buffers()) for member in chosen]
        self._weights: list[_Seen] = [[] for _ in chosen]
        self._momentum: list[_Seen] = [[] for _ in chosen]
        self._untold: dict[int, tuple[Optimizer, bool]] = {}  # by row, since the last epoch

    def read(self, optimizers: Mapping[int, Optimizer] | None = None) -> None:
        """Read the networks that were changed, and momentum, if optimizers are given."""
        for row, member in enumerate(self.chosen):
            if not _same(self._weights[row], now := self._weights_of(row)):
                read_(self.stack.mirrors(row))
                self._weights[row] = now
            if optimizers is None:
                continue
            optimizer = optimizers[member]
            if not _same(self._momentum[row], now := self._momentum_of(row, optimizer)):
                read_momentum_(self.stack.mirrors(row), optimizer)
                self._momentum[row] = now

    def trained(self, optimizers: Mapping[int, Optimizer], momentum: float) -> None:
        """Take note that the stack is an epoch ahead of networks and optimizers."""
        self._untold = {
            row: (optimizers[member], bool(momentum)) for row, member in enumerate(self.chosen)
        }

    def store(self, members: Iterable[int]) -> None:
        """Write what was trained back to the networks and optimizers of these members."""
        wanted = set(members)
        for row in [row for row in self._untold if self.chosen[row] in wanted]:
            optimizer, momentum = self._untold.pop(row)
            write_(mirrors := self.stack.mirrors(row))
            if momentum:
                write_momentum_(mirrors, optimizer)
            step_without_gradients(optimizer)
            self._weights[row] = self._weights_of(row)
            self._momentum[row] = self._momentum_of(row, optimizer)

    def forget(self) -> None:
        """Take the stack's own memory as lost, after storing what it held."""
        self.store(self.chosen)
        self._weights = [[] for _ in self.chosen]
        self._momentum = [[] for _ in self.chosen]

    def _weights_of(self, row: int) -> _Seen:
        tensors = (*self._parameters[row], *self._buffers[row])
        return [(tensor, tensor._version) for tensor in tensors]

    def _momentum_of(self, row: int, optimizer: Optimizer) -> _Seen:
        found = [
            optimizer.state[parameter].get(MOMENTUM) if parameter in optimizer.state else None
            for parameter in self._parameters[row]
        ]
        return [(momentum, 0 if momentum is None else momentum._version) for momentum in found]


def _same(seen: _Seen, now: _Seen) -> bool:
    return len(seen) == len(now) and all(
        one is other and count == later
        for (one, count), (other, later) in zip(seen, now, strict=True)
    )
