"""One member after the other: some steps of each over the same batches, with its weights cached."""

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import CHECK_EVERY
from lossprune.training.plain import step_without_gradients
from lossprune.training.stacked.batches import Group, in_lockstep
from lossprune.training.stacked.epoch import Epoch, Losses, Outcome, Scores, Steps
from lossprune.training.stacked.state import Member, Stack

_AHEAD = 25  # steps of one member before the next has its turn; divides CHECK_EVERY
_EVALUATED = 1000  # examples of an evaluation at a time


class InTurn:
    """Networks that train on their own memory, a few steps each in turn."""

    how = "in turn over the same batches"

    def __init__(self, members: Sequence[Member], steps: Steps) -> None:
        self.members, self.steps = members, steps
        self._untold: dict[int, Optimizer] = {}

    def train(self, epoch: Epoch) -> dict[int, Outcome]:
        """Train an epoch; a member that diverges stops there."""
        found: dict[int, Outcome] = {}
        for group in epoch.groups:
            found |= self._train_group(group, epoch)
        self._untold |= epoch.optimizers
        return found

    def store(self, members: Iterable[int]) -> None:
        """Let hooks and schedules see a step; networks and optimizers hold the rest already."""
        for member in self._untold.keys() & set(members):
            step_without_gradients(self._untold.pop(member))

    def _train_group(self, group: Group, epoch: Epoch) -> dict[int, Outcome]:
        optimizers = epoch.optimizers if epoch.momentum else {}
        stacks = {it: Stack.over(self.members[it], optimizers.get(it)) for it in group.members}
        losses = {member: Losses() for member in group.members}
        for member, stack in stacks.items():
            stack.begin([epoch.settings[member]])
        step, running = 0, dict(stacks)
        streams = [group.training_batches(epoch.batch_size)]
        for chunk in in_lockstep(streams, _AHEAD):
            for stack in running.values():
                for ((inputs, labels),) in chunk:
                    inputs = inputs[None].to(stack.dtype)
                    self.steps.step(stack, inputs, labels[None], epoch.momentum)
            step += len(chunk)
            if step % CHECK_EVERY == 0:
                for member, stack in running.items():
                    losses[member].note(step, stack.totals)
                running = {it: one for it, one in running.items() if one.totals.isfinite()}
        for member, stack in running.items():
            losses[member].note(step, stack.totals)
        examples = len(group.dataset.train)
        return {member: noted.outcomes(examples)[0] for member, noted in losses.items()}

    def evaluate(self, which: str, groups: Sequence[Group]) -> dict[int, Evaluation]:
        """Evaluate on the scored examples of one split of each member's own data set."""
        found: dict[int, Evaluation] = {}
        for group in groups:
            split = group.dataset.scored[which]
            scores = {it: Scores(Stack.over(self.members[it])) for it in group.members}
            for inputs, labels in group.dataset.batches(split, _EVALUATED):
                self._count(list(scores.values()), inputs[None], labels[None])
            found |= {it: one.evaluations(len(split))[0] for it, one in scores.items()}
        return found

    def _count(self, scores: Sequence[Scores], inputs: Tensor, labels: Tensor) -> None:
        for one in scores:
            one.add(self.steps.logits(one.stack, inputs.to(one.stack.dtype)), labels)
