"""Loss, gradient and GGN diagonal: their sums over the examples read so far, and their means."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.curvature.columns import Columns
from lossprune.pruning.curvature.estimators import Estimator
from lossprune.pruning.curvature.examples import NO_EXAMPLES
from lossprune.pruning.curvature.inputs import InputSquares
from lossprune.pruning.curvature.layers import LayerCall, LayerCalls, apart
from lossprune.pruning.curvature.losses import AnyFunction, FullLoss
from lossprune.pruning.curvature.network import NOTHING, MaskedNetwork
from lossprune.pruning.curvature.one_by_one import add_one_by_one_
from lossprune.pruning.curvature.passes import add_squared_gradients_
from lossprune.pruning.curvature.probe import OUTPUTS, Budget, check_outputs
from lossprune.pruning.errors import PruningError

# Outputs of an example, a language model's, from which on double precision would take as long as
# the network.
_MANY = 1 << 18


@dataclass(frozen=True)
class Statistics:
    """What was measured, over ``examples`` examples.

    Attributes:
        loss: mean loss; over examples, or over what the loss counts (see the loss).
        gradient: ∂L/∂θ by parameter name; empty if not asked for.
        ggn_diagonal: diag(G) by parameter name; empty if not asked for.  What a mask removes is
            measured or not, as it falls: nothing is said of it.
        examples: how many examples the means are over.
        skipped: share of the output Hessian's trace that the estimator left out.
        input_norms: ‖x‖₂ over all examples and positions of the input that each entry of a weight
            is multiplied by, of the weight's shape, by parameter name; empty if not asked for.
        unused: names of the weights that the outputs of no example depend on in evaluation mode,
            by the graph (a layer behind a ReLU that is shut is not among them); none where the
            outputs depend on no weight at all.
    """

    loss: float
    gradient: Mapping[str, Tensor]
    ggn_diagonal: Mapping[str, Tensor]
    examples: int
    skipped: float = 0.0
    unused: tuple[str, ...] = ()
    input_norms: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        measured = {"gradient": self.gradient, "GGN diagonal": self.ggn_diagonal}
        parts = [f"loss {self.loss:.5g}", f"{self.examples:,} examples"]
        parts += [f"{what} of {len(found)} parameters" for what, found in measured.items() if found]
        return f"Statistics({', '.join(parts)})"


class Sums:
    """Running sums of one measurement: what is asked for, over examples added chunk by chunk."""

    def __init__(
        self,
        network: MaskedNetwork,
        loss: FullLoss,
        *,
        gradient: bool,
        estimator: Estimator | None,
        inputs: bool,
        generator: torch.Generator,
    ) -> None:
        if gradient or estimator is not None:
            _check_real(network.weights)
        self.network = network
        self.loss = loss
        self.estimator = estimator
        self.generator = generator
        self.chunks = 0
        # called after each chunk, and after parts of one that takes long
        self.heard: Callable[[float], None] = lambda examples: None
        self._told = 0.0  # of the chunk's examples
        self.unrecorded: Collection[str] = ()  # as the first examples show them
        # loss, examples, trace of the output Hessian, share of it that was skipped, what the
        # examples count
        self.scalars = torch.zeros(5, dtype=torch.float64, device=network.device)
        self._each: list[Tensor] = []
        self.gradient = network.zeros() if gradient else {}
        self.ggn_diagonal = network.zeros() if estimator else {}
        self.inputs = InputSquares(network.weights, network.zeros()) if inputs else None
        # in how many processes the outputs depend on each weight
        self.reached = torch.zeros(len(network.weights), dtype=torch.float64, device=network.device)

    def add(self, batch: Batch, budget: Budget, columns: Columns | None = None) -> None:
        """Add a chunk's examples; their columns are chosen here unless given."""
        # A weight that the first few examples do not need may be one that others do: an expert's.
        looks = bool(self.network.unreached)
        differentiates = looks or bool(self.gradient) or self.estimator is not None
        with (
            torch.set_grad_enabled(differentiates),
            LayerCalls(self._recorded()) as recorder,
            self.inputs or nullcontext(),
        ):
            outputs, targets = self.network(batch)
        if looks:
            self.network.note_reached(outputs)
        for call in recorder.calls:
            call.check()
        logits = outputs.detach()
        check_outputs(logits, targets, batch, self.loss)
        values = self._values(logits, targets).detach()
        amounts = self.loss.amount(logits, targets)
        self._each.append(torch.stack((values, amounts.to(values)), 1))
        self.scalars[0] += values.sum()
        self.scalars[1] += len(logits)
        self.chunks += 1
        self.scalars[4] += amounts.sum()
        if outputs.requires_grad:  # else nothing was asked for, or no layer reaches the outputs
            if self.gradient:
                self._add_gradient(outputs, targets)
            if self.estimator is not None:
                if columns is None:
                    columns = self.estimator.columns(logits, targets, self.loss, self.generator)
                self._add_curvature(batch, outputs, recorder.calls, columns, budget)
        self.heard(len(logits) - self._told)
        self._told = 0.0

    def _tell(self, examples: float) -> None:
        self._told += examples
        self.heard(examples)

    def _recorded(self) -> dict[str, Tensor]:
        """The weights whose curvature can be found from what their layers see and give."""
        weights = self.network.weights if self.estimator is not None else {}
        return {name: weight for name, weight in weights.items() if name not in self.unrecorded}

    def _add_curvature(
        self,
        batch: Batch,
        outputs: Tensor,
        calls: Sequence[LayerCall],
        columns: Columns,
        budget: Budget,
    ) -> None:
        # An expert may get other rows in each chunk.
        alone = apart(calls, len(outputs))
        if self.unrecorded:
            alone |= self.network.reached(outputs) & set(self.unrecorded)
        calls = [call for call in calls if call.name not in alone]
        totals, network = self.ggn_diagonal, self.network
        # Where some weights take one example at a time, that is what takes long.
        tell = (lambda examples: None) if alone else self._tell
        if calls:
            add_squared_gradients_(totals, outputs, calls, columns, budget, network.kept, tell)
        if alone:
            add_one_by_one_(totals, network, batch, outputs, columns, alone, self._tell)

    def add_packed(self, batch: Batch, budget: Budget) -> None:
        """Choose the columns of many examples first, then take those with as many together."""
        assert self.estimator is not None
        if batch.size is None:
            raise PruningError(
                "an estimator that chooses among the columns of many examples needs batches made "
                "of tensors with one entry per example in tuples, lists or dicts"
            )
        size = budget.examples(1)
        with torch.no_grad():
            parts = [self.network(batch[i : i + size]) for i in range(0, len(batch), size)]
        outputs = torch.cat([part for part, _ in parts])
        targets = torch.cat([part for _, part in parts])
        check_outputs(outputs, targets, batch, self.loss)
        columns = self.estimator.columns(outputs, targets, self.loss, self.generator)
        self.scalars[2] += columns.trace
        self.scalars[3] += columns.skipped
        for chosen, count in columns.packed(budget.examples):
            self.add(batch[chosen], budget, Columns(columns.vectors[chosen, :count]))

    @property
    def of_each(self) -> Tensor:
        """ℓ of each example that this process took, and how much it counts: (n, 2)."""
        return torch.cat([self.scalars.new_zeros(0, 2), *self._each])

    def note_reached(self) -> None:
        """Count which weights the examples of this process have depended on, after the last."""
        unreached = self.network.unreached
        if self.inputs is not None:
            self.inputs.check(self.network.weights.keys() - unreached)
        self.reached += self.reached.new_tensor([n not in unreached for n in self.network.weights])

    def join_(self) -> None:
        """Add everybody else's sums, where several processes measure together."""
        sums = [*self.gradient.values(), *self.ggn_diagonal.values()]
        if self.inputs is not None:
            sums += self.inputs.totals.values()
        distributed.sum_over_processes_([self.scalars, self.reached, *sums])

    def means(self) -> Statistics:
        """Return the sums, each divided by the number of examples."""
        loss, examples, trace, skipped, amount = self.scalars.tolist()
        if examples == 0:
            raise PruningError(NO_EXAMPLES)
        if amount == 0:
            raise PruningError("no target counts: all are ignored, or of classes of weight 0")
        for total in (*self.gradient.values(), *self.ggn_diagonal.values()):
            total /= amount
        return Statistics(
            loss / amount,
            self.gradient,
            self.ggn_diagonal,
            int(examples),
            skipped / trace if trace else 0.0,
            self._unused(),
            {} if self.inputs is None else self.inputs.norms(),
        )

    def _unused(self) -> tuple[str, ...]:
        reached = self.reached.tolist()
        if not any(reached):
            if self.gradient or self.estimator is not None:
                raise PruningError(NOTHING)
            return ()
        names = self.network.weights
        return tuple(name for name, times in zip(names, reached, strict=True) if not times)

    def _values(self, logits: Tensor, targets: Any) -> Tensor:
        """The loss of each example, in double precision; of very many outputs, its sums alone."""
        if isinstance(self.loss, AnyFunction):  # which may have numbers of its own in it
            return self.loss.value(logits, targets).double()
        each = max(1, logits[0].numel())
        dtype = torch.float64 if each < _MANY else torch.promote_types(logits.dtype, torch.float32)
        size = max(1, OUTPUTS // each)
        if len(logits) <= size:
            return self.loss.value(logits.to(dtype), targets).double()
        pairs = zip(logits.split(size), targets.split(size), strict=True)
        return torch.cat(
            [self.loss.value(some.to(dtype), wanted).double() for some, wanted in pairs]
        )

    def _add_gradient(self, outputs: Tensor, targets: Any) -> None:
        """Let autograd add to the sums in place, layer by layer."""
        weights = self.network.weights
        for name, total in self.gradient.items():
            if weights[name].dtype == total.dtype and weights[name].stride() == total.stride():
                weights[name].grad = total
        torch.autograd.backward(
            outputs,
            self.loss.gradient(outputs.detach(), targets),
            retain_graph=True,
            inputs=list(weights.values()),
        )
        for name, total in self.gradient.items():
            part = weights[name].grad
            if part is not None and part is not total:
                total += part
            weights[name].grad = None


def check_finite(statistics: Statistics) -> None:
    """Raise unless loss, gradient and curvature are finite; what is not is named."""
    if not math.isfinite(statistics.loss):
        raise PruningError(f"the loss is not finite ({statistics.loss})")
    measured = {"gradient": statistics.gradient, "curvature": statistics.ggn_diagonal}
    measured["norm of the inputs"] = statistics.input_norms
    for what, tensors in measured.items():
        for name, tensor in tensors.items():
            check_entries(what, name, tensor)


def check_entries(what: str, name: str, tensor: Tensor) -> None:
    """Raise unless every entry of what was found of the parameter ``name`` is finite."""
    if tensor.numel() == 0 or all(bound.isfinite() for bound in tensor.aminmax()):
        return
    bad = tensor.numel() - int(tensor.isfinite().count_nonzero())
    if bad:
        raise PruningError(
            f"the {what} of {name!r} is not finite in {bad} of {tensor.numel()} entries"
        )


def _check_real(tensors: Mapping[str, Tensor]) -> None:
    """Raise unless all are real: the models of the loss are of real weights."""
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise PruningError(
                f"{name!r} is complex, of {tensor.dtype}, where the loss has no gradient or "
                f"curvature to prune by: take MP, Wanda or random, or exclude={name!r}"
            )
