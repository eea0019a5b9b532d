"""A step recorded as a CUDA graph, so that its many small kernels cost one launch."""

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3  # runs before recording, in which libraries choose algorithms and take workspaces


class RecordedStep:
    """``work`` on inputs and labels of fixed shapes, replayed on memory of its own.

    ``work`` runs while it is warmed up, so whatever it updates is to be set afterwards.  It may
    not synchronise, and it may only use memory that stays where it is.
    """

    def __init__(
        self, work: Callable[[Tensor, Tensor], None], inputs: Tensor, labels: Tensor
    ) -> None:
        self.inputs, self.labels = inputs, labels
        with torch.cuda.device(inputs.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    work(inputs, labels)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                work(inputs, labels)

    def __call__(self, inputs: Tensor, labels: Tensor) -> None:
        """Copy a batch of the recorded shapes in, and replay."""
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)
        self._graph.replay()
