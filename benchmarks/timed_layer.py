"""One layer to compute, and the ways to: forward and backward, each timed when it is asked for.

This needs torch alone, since others' environments run it too (``benchmarks.sparseprop_worker``).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

DIRECTIONS = ("forward", "backward")
PADDING = 1  # of all convolutions, whose kernels are 3×3
ENOUGH = 5e-3  # seconds of calls for one measurement


@dataclass(frozen=True)
class Problem:
    """A convolution, or a linear layer, with its kept weights, and what it is computed on.

    Attributes:
        x: (n, channels, height, width), or (n, features).
        weight: with the removed ones at 0.
        mask: True where one is kept.
        gradient: of the outputs.
        first: of a network, so that nothing needs the gradient of the inputs.
    """

    x: Tensor
    weight: Tensor
    mask: Tensor
    gradient: Tensor
    first: bool

    @property
    def linear(self) -> bool:
        return self.x.dim() == 2

    def save(self, path: Path, expected: Sequence[Tensor]) -> None:
        torch.save({"problem": asdict(self), "expected": list(expected)}, path)

    @classmethod
    def load(cls, path: str) -> tuple["Problem", list[Tensor]]:
        saved = torch.load(path, weights_only=True)
        return cls(**saved["problem"]), saved["expected"]


class TimedLayer:
    """A layer in one layout.

    Args:
        layer: computes the outputs.
        weight: what it computes them by; its gradient is one of those computed.
        x, gradient: in the layout of the layer.
        first: without the gradient of the inputs.
        plain: turns outputs and the inputs' gradient into torch's layout.
        kept: takes the kept ones out of the weight's gradient.
    """

    def __init__(
        self,
        layer: Callable[[Tensor], Tensor],
        weight: Tensor,
        x: Tensor,
        gradient: Tensor,
        *,
        first: bool,
        plain: Callable[[Tensor], Tensor] = lambda maps: maps,
        kept: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> None:
        self.layer, self.gradient, self.plain, self.kept = layer, gradient, plain, kept
        self.x = x.detach().requires_grad_(not first)
        self.wanted = (weight,) if first else (weight, self.x)
        self.output = layer(self.x)

    def forward(self) -> Tensor:
        """As a step of training does it: autograd notes what the backward pass needs."""
        return self.layer(self.x)

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.output, self.wanted, self.gradient, retain_graph=True)

    def results(self) -> list[Tensor]:
        """Outputs, gradient of the kept weights and that of the inputs, as torch has them."""
        weight, *inputs = self.backward()
        maps = [self.plain(found.detach()) for found in (self.output, *inputs)]
        return [maps[0], self.kept(weight), *maps[1:]]

    def seconds(self, direction: str, threads: int) -> float:
        """Of the processor for one thread, else of the clock; after a call that is not counted.

        That call lets the caches and the threads of whoever ran before come to rest.  Short calls
        are made several times.
        """
        torch.set_num_threads(threads)
        work = self.forward if direction == "forward" else self.backward
        clock = time.process_time if threads == 1 else time.perf_counter
        began = clock()
        work()
        calls = max(1, min(20, int(ENOUGH / (clock() - began + 1e-9))))
        began = clock()
        for _ in range(calls):
            work()
        return (clock() - began) / calls


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference, in the 2-norm of each tensor."""
    return max(
        float((one - other).norm() / other.norm())
        for one, other in zip(found, expected, strict=True)
    )
