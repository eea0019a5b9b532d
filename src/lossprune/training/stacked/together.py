"""All members at once: every product is of all of them; on CUDA a step is one recorded graph."""

from collections.abc import Callable, Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from lossprune.data import Dataset
from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import CHECK_EVERY, Losses, Outcome
from lossprune.training.stacked.epoch import (
    BatchGroup,
    Epoch,
    EvaluationSums,
    Spread,
    in_lockstep,
)
from lossprune.training.stacked.state import StackCache, StackMember
from lossprune.training.stacked.steps import Steps

_EVALUATED = 100  # examples of an evaluation at a time: as much memory as a usual step; ...
# ... on CUDA more where few are stacked, for there a call costs as much as what it computes.  In
# numbers of all inputs: at a time of an evaluation, and of the batches that are made together.
_EVALUATED_NUMBERS, _BATCHED_NUMBERS = 2**23, 2**25
_WARM_UP = 3  # runs before recording, in which libraries choose algorithms and take workspaces


class Together:
    """Networks that take each step at once, in memory of the stack's own.

    They stay there from epoch to epoch while their members are the same, until :meth:`store`.
    """

    how = "at once"

    def __init__(self, members: Sequence[StackMember], steps: Steps) -> None:
        self.members, self.steps = members, steps
        self._cache: StackCache | None = None
        self._recorded: tuple[tuple[object, ...], RecordedStep] | None = None

    def train(self, epoch: Epoch) -> dict[int, Outcome]:
        """Train an epoch, without waiting for the device before its end."""
        chosen = _sorted_members(epoch.groups)
        cache = self._cached(chosen)
        stack = cache.stack
        spread = Spread(epoch.groups, chosen, stack.device, stack.dtype)

        def plain(inputs: Tensor, labels: Tensor) -> None:
            self.steps.step(stack, inputs, labels, epoch.momentum)

        dataset = epoch.groups[0].dataset
        whole = self._record(plain, cache, spread, dataset, epoch)
        cache.read(epoch.optimizers)
        stack.begin([epoch.settings[member] for member in chosen])
        losses, step, size = Losses(), 0, epoch.batch_size
        numbers = spread.rows * size * prod(dataset.shape)
        ahead = max(1, _BATCHED_NUMBERS // numbers) if stack.device.type == "cuda" else 1
        streams = [group.training_batches(ahead * size) for group in epoch.groups]
        for (several,) in in_lockstep(streams, 1):
            batches = (part.split(size, 1) for part in spread(several))
            for inputs, labels in zip(*batches, strict=True):
                (whole if labels.shape[1] == size else plain)(inputs, labels)
                step += 1
                if step % CHECK_EVERY == 0:
                    losses.note(step, stack.totals)
        losses.note(step, stack.totals)
        cache.trained(epoch.optimizers, epoch.momentum)
        return dict(zip(chosen, losses.outcomes(len(dataset.train)), strict=True))

    def evaluate(self, which: str, groups: Sequence[BatchGroup]) -> dict[int, Evaluation]:
        """Evaluate on the scored examples of one split of each member's own data set."""
        chosen = _sorted_members(groups)
        cache = self._cached(chosen)
        cache.read()
        stack = cache.stack
        spread = Spread(groups, chosen, stack.device, stack.dtype)
        size = _EVALUATED
        if stack.device.type == "cuda":
            numbers = len(chosen) * prod(groups[0].dataset.shape)
            size = max(size, _EVALUATED_NUMBERS // numbers)
        streams = [group.dataset.batches(group.dataset.scored[which], size) for group in groups]
        sums = EvaluationSums(stack)
        for (batches,) in in_lockstep(streams, 1):
            inputs, labels = spread(batches)
            sums.add(self.steps.logits(stack, inputs), labels)
        examples = len(groups[0].dataset.scored[which])
        return dict(zip(chosen, sums.evaluations(examples), strict=True))

    def store(self, members: Iterable[int]) -> None:
        """Write what was trained back to networks and optimizers."""
        if self._cache is not None:
            self._cache.store(members)

    def _cached(self, chosen: tuple[int, ...]) -> StackCache:
        """Return the stack of these members; it is kept while they stay the same."""
        if self._cache is None or self._cache.chosen != chosen:
            if self._cache is not None:
                self._cache.store(self._cache.chosen)
            self._cache = self._recorded = None  # their memory first
            self._cache = StackCache(self.members, chosen)
        return self._cache

    def _record(
        self,
        plain: Callable[[Tensor, Tensor], None],
        cache: StackCache,
        spread: Spread,
        dataset: Dataset,
        epoch: Epoch,
    ) -> Callable[[Tensor, Tensor], None]:
        """Return the step of a whole batch: on CUDA as a graph, recorded once."""
        stack = cache.stack
        key = (epoch.batch_size, epoch.momentum, spread.rows)
        if self._recorded is not None and self._recorded[0] != key:
            self._recorded = None  # the memory that it works in may go with other sizes
        if stack.device.type != "cuda" or epoch.batch_size > len(dataset.train):
            return plain
        if self._recorded is None:
            cache.forget()  # recording takes steps
            shape = (spread.rows, epoch.batch_size)
            inputs = torch.zeros((*shape, *dataset.shape), dtype=stack.dtype, device=stack.device)
            labels = torch.zeros(shape, dtype=torch.int64, device=stack.device)
            self._recorded = (key, RecordedStep(plain, inputs, labels))
        return self._recorded[1]


class RecordedStep:
    """A step as a CUDA graph, so that its many small kernels cost one launch.

    It is ``work`` on inputs and labels of fixed shapes, replayed on memory of its own.
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


def _sorted_members(groups: Sequence[BatchGroup]) -> tuple[int, ...]:
    return tuple(sorted(member for group in groups for member in group.members))
