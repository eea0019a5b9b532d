"""One member after the other: some steps of each over the same batches, with its weights cached."""

from collections.abc import Iterable, Sequence

from torch.optim import Optimizer

from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import CHECK_EVERY, Losses, Outcome
from lossprune.training.plain import step_without_gradients
from lossprune.training.stacked.epoch import BatchGroup, Epoch, EvaluationSums, in_lockstep
from lossprune.training.stacked.state import Stack, StackMember
from lossprune.training.stacked.steps import Steps

_AHEAD = 25  # steps of one member before the next has its turn; divides CHECK_EVERY
_EVALUATED = 1000  # examples of an evaluation at a time


class InTurn:
    """Networks that train on their own memory, a few steps each in turn."""

    how = "in turn over the same batches"

    def __init__(self, members: Sequence[StackMember], steps: Steps) -> None:
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

    def _train_group(self, group: BatchGroup, epoch: Epoch) -> dict[int, Outcome]:
        optimizers = epoch.optimizers if epoch.momentum else {}
        stacks = {
            member: Stack.over(self.members[member], optimizers.get(member))
            for member in group.members
        }
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
                running = {
                    member: stack for member, stack in running.items() if stack.totals.isfinite()
                }
        for member, stack in running.items():
            losses[member].note(step, stack.totals)
        examples = len(group.dataset.train)
        return {member: noted.outcomes(examples)[0] for member, noted in losses.items()}

    def evaluate(self, which: str, groups: Sequence[BatchGroup]) -> dict[int, Evaluation]:
        """Evaluate on the scored examples of one split of each member's own data set."""
        found: dict[int, Evaluation] = {}
        for group in groups:
            split = group.dataset.scored[which]
            sums = {
                member: EvaluationSums(Stack.over(self.members[member])) for member in group.members
            }
            for inputs, labels in group.dataset.batches(split, _EVALUATED):
                for own in sums.values():
                    logits = self.steps.logits(own.stack, inputs[None].to(own.stack.dtype))
                    own.add(logits, labels[None])
            found |= {member: own.evaluations(len(split))[0] for member, own in sums.items()}
        return found
