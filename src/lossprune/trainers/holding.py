"""A mask through a training, whoever runs it: given, read from a checkpoint or found on the way."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lossprune.pruning.enforcement import Enforcement
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.matching import match, warn_of_adapters
from lossprune.pruning.stage_record import StageRecord
from lossprune.trainers.gradual import GradualPruning


class HeldMask:
    """What the callbacks of all trainers do: begin, go on after each step, end.

    Attributes:
        mask: that is enforced; None before the first stage of a pruning on the way.
        completed: how many stages of such a pruning are done.
        records: of the stages that were done here.
    """

    def __init__(self, of: Mask | GradualPruning | None) -> None:
        if not (of is None or isinstance(of, (Mask, GradualPruning))):
            raise ValueError(
                "the callback takes a lossprune.Mask, a GradualPruning, or nothing where the mask "
                f"is in a checkpoint, got {type(of).__name__}"
            )
        self.plan = of if isinstance(of, GradualPruning) else None
        self.mask = of if isinstance(of, Mask) else None
        self.completed = 0
        self.records: list[StageRecord] = []
        self._enforcements: list[Enforcement] = []

    def restart(self) -> None:
        """Forget what an earlier training of the same callback has pruned on its way."""
        if self.plan is not None:
            self.mask, self.completed, self.records = None, 0, []

    def restore(self, mask: Mask, where: str, completed: int) -> None:
        """Take the mask that a checkpoint has.

        Raises:
            PruningError: another one was given.
        """
        if self.plan is None and self.mask is not None and self.mask != mask:
            raise PruningError(
                f"the callback was given {self.mask!r}, but {where} has {mask!r}, another one: "
                "give none to go on with the checkpoint's"
            )
        self.mask, self.completed = mask, completed

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Enforce the mask, if there is one yet, on every optimizer that holds some of it.

        Where all that it masks is frozen, as under adapters, nothing moves it: it is applied.

        Raises:
            PruningError: there is none and none will be found, or as :meth:`Mask.enforce`.
        """
        self.end()
        if self.mask is None:
            if self.plan is None:
                raise PruningError(
                    "the callback has no mask: give MaskCallback(mask), or go on from a checkpoint "
                    "that one was saved with"
                )
            return
        masked = {id(parameter): parameter for parameter, _ in self.mask.removed_of(model)}
        if not any(parameter.requires_grad for parameter in masked.values()):
            self.mask.apply_(model)
            warn_of_adapters(match(self.mask, model, sharded=True).values(), stacklevel=2)
            return
        holding = [o for o in optimizers if masked.keys() & {id(p) for p in _parameters_of(o)}]
        # One that holds none is asked as well where nobody does, and says what is wrong.
        for optimizer in holding or optimizers[:1]:
            self._enforcements.append(self.mask.enforce(model, optimizer))

    def after_step(
        self, step: int, model: nn.Module, optimizers: Sequence[Optimizer], loader: Any
    ) -> None:
        """Do the stages that are due by the end of a step."""
        if self.plan is None:
            return
        while self.completed < self.plan.due(step):
            self.mask, record = self.plan.stage(model, self.mask, self.completed, loader)
            self.completed += 1
            self.records.append(record)
            self.begin(model, optimizers)

    def end(self) -> None:
        """Let the removed weights train again."""
        for enforcement in self._enforcements:
            enforcement.remove()
        self._enforcements = []


def _parameters_of(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
