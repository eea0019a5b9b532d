"""Parts of tensors, and the copies of them that are trained in their place.

Whoever trains a network elsewhere, as over its surviving weights alone, mirrors its tensors there:
reads them, and the optimizer's momentum, before an epoch, and writes both back after it, so that
network and optimizer stay ordinary ones.

>>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
>>> mirrors = [Mirror(weight, torch.tensor([0, 3]), torch.empty(2))]
>>> read_(mirrors)
>>> mirrors[0].part.mul_(10)
tensor([10., 40.])
>>> write_(mirrors)
>>> weight
tensor([[10.,  2.],
        [ 3., 40.]])
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossprune.channels.narrowing import Index

MOMENTUM = "momentum_buffer"  # as torch.optim.SGD calls it


@dataclass(frozen=True, eq=False)
class Mirror:
    """A part of one tensor, and its copy.

    Attributes:
        whole: a parameter or a buffer of a network.
        index: which part of it, as in ``whole[index]``; int64 (n,): positions in it, flattened.
        part: the copy, of that part's shape.
        velocity: a copy of the same part of the momentum, where one is kept.
    """

    whole: Tensor
    index: Index | Tensor
    part: Tensor
    velocity: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor of ``whole``'s shape."""
        return self._indexed(tensor)[self.index]

    def put_(self, tensor: Tensor, part: Tensor) -> None:
        """Write ``part`` to its place in a tensor of ``whole``'s shape."""
        self._indexed(tensor)[self.index] = part

    def _indexed(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1) if isinstance(self.index, Tensor) else tensor


@torch.no_grad()
def read_(mirrors: Iterable[Mirror]) -> None:
    """Copy the tensors' parts."""
    for mirror in mirrors:
        mirror.part.copy_(mirror.of(mirror.whole))


@torch.no_grad()
def write_(mirrors: Iterable[Mirror]) -> None:
    """Write the copies back to the tensors."""
    for mirror in mirrors:
        mirror.put_(mirror.whole, mirror.part)


def read_momentum_(mirrors: Iterable[Mirror], optimizer: Optimizer) -> None:
    """Copy the momentum where a copy is kept; it is 0 where the optimizer has none yet."""
    for mirror in mirrors:
        if mirror.velocity is not None:
            momentum = optimizer.state[mirror.whole].get(MOMENTUM)
            if momentum is None:
                mirror.velocity.zero_()
            else:
                mirror.velocity.copy_(mirror.of(momentum))


def write_momentum_(mirrors: Iterable[Mirror], optimizer: Optimizer) -> None:
    """Write the copies of the momentum, where there are any, back to the optimizer."""
    for mirror in mirrors:
        if mirror.velocity is not None:
            mirror.put_(momentum_of(mirror.whole, optimizer), mirror.velocity)


def momentum_of(parameter: Tensor, optimizer: Optimizer) -> Tensor:
    """Return the optimizer's momentum of a parameter, made where there is none yet."""
    state = optimizer.state[parameter]
    if state.get(MOMENTUM) is None:
        state[MOMENTUM] = torch.zeros_like(parameter, requires_grad=False)
    return state[MOMENTUM]
