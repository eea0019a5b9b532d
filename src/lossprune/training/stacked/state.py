"""The weights, momentum and masks of several networks, along a leading axis.

Index letters: m member, n example, and the axes of one network's parameter after m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_INTEGERS = {4: torch.int32, 8: torch.int64}  # by bytes a weight


@dataclass(frozen=True)
class Member:
    """A network and, for each parameter that has removed weights, True where one is kept."""

    network: nn.Module
    kept: Mapping[str, Tensor]


class Stack:
    """The state of m networks, updated in place.

    :meth:`over` looks at one network's own tensors, with an axis put before them; :meth:`joined`
    holds copies of several, whose rows :meth:`load` reads and :meth:`store` writes.

    Attributes:
        parameters: (m, *shape) by name.
        buffers: (m, *shape) by name, such as running means.
        velocities: momentum, as the parameters.
        totals: float64 (m,), the sum of the losses of all examples so far.
    """

    def __init__(
        self,
        members: Sequence[Member],
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
    def over(member: Member, optimizer: Optimizer | None = None) -> Stack:
        """Return a stack of one, whose tensors are those of the network and of the optimizer.

        Without an optimizer, or its momentum, velocities are of its own.
        """
        network = member.network
        parameters = {name: it.detach()[None] for name, it in network.named_parameters()}
        buffers = {name: it.detach()[None] for name, it in network.named_buffers()}
        velocities = {
            name: torch.zeros_like(parameter, requires_grad=False)[None]
            if optimizer is None
            else momentum_of(parameter, optimizer)[None]
            for name, parameter in network.named_parameters()
        }
        return Stack((member,), parameters, buffers, velocities)

    @staticmethod
    def joined(members: Sequence[Member]) -> Stack:
        """Return a stack of several with memory of its own, not yet loaded."""

        def room(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: torch.empty((len(members), *it.shape), dtype=it.dtype, device=it.device)
                for name, it in tensors.items()
            }

        first = members[0].network
        parameters = dict(first.named_parameters())
        return Stack(members, room(parameters), room(dict(first.named_buffers())), room(parameters))

    @torch.no_grad()
    def load(self, row: int) -> None:
        """Read parameters and buffers of one network."""
        network = self.members[row].network
        for name, parameter in network.named_parameters():
            self.parameters[name][row].copy_(parameter)
        for name, buffer in network.named_buffers():
            self.buffers[name][row].copy_(buffer)

    @torch.no_grad()
    def load_momentum(self, row: int, optimizer: Optimizer) -> None:
        """Read the momentum of one optimizer; it is 0 where there is none yet."""
        for name, parameter in self.members[row].network.named_parameters():
            buffer = optimizer.state[parameter].get("momentum_buffer")
            own = self.velocities[name][row]
            own.zero_() if buffer is None else own.copy_(buffer)

    @torch.no_grad()
    def store(self, row: int, optimizer: Optimizer, *, momentum: bool) -> None:
        """Write parameters, buffers and momentum back to one network and its optimizer."""
        network = self.members[row].network
        for name, buffer in network.named_buffers():
            buffer.copy_(self.buffers[name][row])
        for name, parameter in network.named_parameters():
            parameter.copy_(self.parameters[name][row])
            if momentum:
                momentum_of(parameter, optimizer).copy_(self.velocities[name][row])

    def begin(self, settings: Sequence[Mapping[str, Any]]) -> None:
        """Begin an epoch with each member's own learning rate and weight decay."""
        self.totals.zero_()
        for own, factor, name in ((self._rates, -1, "lr"), (self._decays, 1, "weight_decay")):
            values = [factor * float(it[name]) for it in settings]
            own.copy_(torch.tensor(values, dtype=torch.float64))

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


def momentum_of(parameter: Tensor, optimizer: Optimizer) -> Tensor:
    """Return the optimizer's momentum of a parameter, made where there is none yet."""
    state = optimizer.state[parameter]
    if state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return state["momentum_buffer"]
