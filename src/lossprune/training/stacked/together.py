"""All members at once: every product is of all of them; on CUDA a step is one recorded graph."""

from collections.abc import Callable, Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from lossprune.data import Dataset
from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import CHECK_EVERY
from lossprune.training.stacked.batches import Group, Spread, in_lockstep
from lossprune.training.stacked.epoch import Epoch, Losses, Outcome, Scores, Steps
from lossprune.training.stacked.graph import RecordedStep
from lossprune.training.stacked.held import Held
from lossprune.training.stacked.state import Member

_EVALUATED = 100  # examples of an evaluation at a time: as much memory as a usual step; ...
# ... on CUDA more where few are stacked, for there a call costs as much as what it computes.  In
# numbers of all inputs: at a time of an evaluation, and of the batches that are made together.
_EVALUATED_NUMBERS, _BATCHED_NUMBERS = 2**23, 2**25


class Together:
    """Networks that take each step at once, in memory of the stack's own.

    They stay there from epoch to epoch while their members are the same, until :meth:`store`.
    """

    how = "at once"

    def __init__(self, members: Sequence[Member], steps: Steps) -> None:
        self.members, self.steps = members, steps
        self._held: Held | None = None
        self._recorded: tuple[tuple[object, ...], RecordedStep] | None = None

    def train(self, epoch: Epoch) -> dict[int, Outcome]:
        """Train an epoch, without waiting for the device before its end."""
        chosen = _sorted_members(epoch.groups)
        held = self._hold(chosen)
        stack = held.stack
        spread = Spread(epoch.groups, chosen, stack.device, stack.dtype)

        def plain(inputs: Tensor, labels: Tensor) -> None:
            self.steps.step(stack, inputs, labels, epoch.momentum)

        dataset = epoch.groups[0].dataset
        whole = self._record(plain, held, spread, dataset, epoch)
        held.read(epoch.optimizers)
        stack.begin([epoch.settings[it] for it in chosen])
        losses, step, size = Losses(), 0, epoch.batch_size
        numbers = spread.rows * size * prod(dataset.shape)
        ahead = max(1, _BATCHED_NUMBERS // numbers) if stack.device.type == "cuda" else 1
        streams = [it.training_batches(ahead * size) for it in epoch.groups]
        for (several,) in in_lockstep(streams, 1):
            batches = (it.split(size, 1) for it in spread(several))
            for inputs, labels in zip(*batches, strict=True):
                (whole if labels.shape[1] == size else plain)(inputs, labels)
                step += 1
                if step % CHECK_EVERY == 0:
                    losses.note(step, stack.totals)
        losses.note(step, stack.totals)
        held.trained(epoch.optimizers, epoch.momentum)
        return dict(zip(chosen, losses.outcomes(len(dataset.train)), strict=True))

    def evaluate(self, which: str, groups: Sequence[Group]) -> dict[int, Evaluation]:
        """Evaluate on the scored examples of one split of each member's own data set."""
        chosen = _sorted_members(groups)
        held = self._hold(chosen)
        held.read()
        stack = held.stack
        spread = Spread(groups, chosen, stack.device, stack.dtype)
        size = _EVALUATED
        if stack.device.type == "cuda":
            numbers = len(chosen) * prod(groups[0].dataset.shape)
            size = max(size, _EVALUATED_NUMBERS // numbers)
        streams = [it.dataset.batches(it.dataset.scored[which], size) for it in groups]
        scores = Scores(stack)
        for (batches,) in in_lockstep(streams, 1):
            inputs, labels = spread(batches)
            scores.add(self.steps.logits(stack, inputs), labels)
        examples = len(groups[0].dataset.scored[which])
        return dict(zip(chosen, scores.evaluations(examples), strict=True))

    def store(self, members: Iterable[int]) -> None:
        """Write what was trained back to networks and optimizers."""
        if self._held is not None:
            self._held.store(members)

    def _hold(self, chosen: tuple[int, ...]) -> Held:
        """Return the stack of these members; it is kept while they stay the same."""
        if self._held is None or self._held.chosen != chosen:
            if self._held is not None:
                self._held.store(self._held.chosen)
            self._held = self._recorded = None  # their memory first
            self._held = Held(self.members, chosen)
        return self._held

    def _record(
        self,
        plain: Callable[[Tensor, Tensor], None],
        held: Held,
        spread: Spread,
        dataset: Dataset,
        epoch: Epoch,
    ) -> Callable[[Tensor, Tensor], None]:
        """Return the step of a whole batch: on CUDA as a graph, recorded once."""
        stack = held.stack
        key = (epoch.batch_size, epoch.momentum, spread.rows)
        if self._recorded is not None and self._recorded[0] != key:
            self._recorded = None  # the memory that it works in may go with other sizes
        if stack.device.type != "cuda" or epoch.batch_size > len(dataset.train):
            return plain
        if self._recorded is None:
            held.forget()  # recording takes steps
            shape = (spread.rows, epoch.batch_size)
            inputs = torch.zeros((*shape, *dataset.shape), dtype=stack.dtype, device=stack.device)
            labels = torch.zeros(shape, dtype=torch.int64, device=stack.device)
            self._recorded = (key, RecordedStep(plain, inputs, labels))
        return self._recorded[1]


def _sorted_members(groups: Sequence[Group]) -> tuple[int, ...]:
    return tuple(sorted(member for group in groups for member in group.members))
