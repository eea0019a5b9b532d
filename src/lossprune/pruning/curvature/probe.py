"""A few examples run first: whether curvature can be measured, and how much fits in memory."""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.curvature.estimators import Estimator, check_worthwhile
from lossprune.pruning.curvature.geometry import Lookup
from lossprune.pruning.curvature.layers import LayerCall, LayerCalls, apart
from lossprune.pruning.curvature.losses import FullLoss
from lossprune.pruning.curvature.network import NOTHING, MaskedNetwork
from lossprune.pruning.curvature.one_by_one import check_alone
from lossprune.pruning.errors import PruningError

# Elements of outputs, and of what is computed from them in double precision, at a time.
OUTPUTS = 1 << 22
_FEW = 4  # examples that a probe looks at


@dataclass(frozen=True)
class Costs:
    """What a few examples showed.

    Attributes:
        outputs: of the few, (n, ...).
        targets: of the few.
        graph_bytes: what a forward pass keeps for the backward ones, of one example.
        column_bytes: the gradients at all the layers' outputs, of one example and column.
        unreached: names of the weights that the outputs of the few do not depend on.
        unrecorded: names of those whose curvature takes one example at a time: also used outside
            of linear and convolution functions, or in rows that are not the examples; of what is
            unreached nothing is known.
        elsewhere: names of those that reach the outputs by other functions than linear ones and
            convolutions of the weight as a whole.
        curvature: whether the few also showed that curvature can be measured.
        passing_bytes: the gradients under way in a backward pass, of one example.
        kind: of the batch that they are from.
    """

    outputs: Tensor
    targets: Any
    graph_bytes: int
    column_bytes: int
    passing_bytes: int
    kind: Any
    unreached: frozenset[str]
    unrecorded: frozenset[str]
    elsewhere: frozenset[str]
    curvature: bool

    def columns(
        self, estimator: Estimator | None, loss: FullLoss, *, frugal: bool
    ) -> tuple[int, int]:
        """Return the columns of an example, and how many examples may go together at most.

        Raises:
            PruningError: as the estimator; or, if ``frugal``, it draws labels that take no fewer
                passes than the exact curvature.
        """
        if estimator is None:
            return 0, sys.maxsize
        if frugal:
            check_worthwhile(estimator, self.outputs, self.targets, loss)
        columns = estimator.columns(self.outputs, self.targets, loss, torch.Generator())
        # One example alone does not show whether examples interact, so none go together.
        most = 1 if len(self.outputs) == 1 else sys.maxsize
        if self.outputs.ndim > 2 and estimator.packs:  # its columns are written out in full
            most = min(most, max(1, OUTPUTS // (self.outputs[0].numel() ** 2)))
        return len(columns.keys()), most


def probe(network: MaskedNetwork, batch: Batch, loss: FullLoss, *, curvature: bool) -> Costs:
    """Run a few examples: what they cost in memory, and whether curvature can be measured.

    Raises:
        PruningError: the outputs do not suit the loss; with ``curvature`` also, examples interact.
    """
    if batch.size is not None:
        batch = batch[:_FEW]
    constants = {
        _storage(tensor) for tensor in (*network.constants.values(), *network.weights.values())
    }
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in constants:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        # Detached, as a node that saves its own output would otherwise keep itself for ever.
        return tensor.detach()

    with (
        saved_tensors_hooks(note, lambda tensor: tensor),
        ProbingCalls(network.weights, network.own) as recorder,
    ):
        outputs, targets = network(batch)
    network.note_reached(outputs, recorder.calls)
    check_outputs(outputs, targets, batch, loss)
    unrecorded: set[str] = set()
    if curvature and outputs.isfinite().all():  # else the loss will be refused for it
        unrecorded = used_elsewhere(network.weights, outputs)
        rows = _other_rows(outputs, recorder.calls)
        if rows and batch.size is None:
            raise PruningError(
                f"the layer of {min(rows)!r} gets inputs whose first dimension is not the "
                "examples: it must be, or batches be of tensors with one entry per example"
            )
        unrecorded |= rows
        if unrecorded:
            check_alone(network, batch, outputs, rows or unrecorded)
    for call in recorder.calls:
        note(call.inputs)
    sizes = [math.prod(call.output_shape) for call in recorder.calls]
    column_bytes, passing_bytes = sum(sizes), _UNDER_WAY * max(sizes, default=0)
    if outputs.ndim > 2:  # a column of them is no small thing beside the layers'
        column_bytes += outputs.numel()
    kept = sum(saved.values()) + outputs.nbytes
    examples = len(outputs)
    return Costs(
        outputs.detach(),
        targets,
        math.ceil(kept / examples),
        math.ceil(column_bytes * outputs.element_size() / examples),
        math.ceil(passing_bytes * outputs.element_size() / examples),
        batch.kind if batch.size is not None else object(),  # others are alike to none
        frozenset(network.unreached),
        frozenset(unrecorded | network.unreached),
        # Recorded calls compute with detached weights.
        frozenset(network.reached(outputs) | looked_up(recorder.calls)),
        curvature,
    )


def looked_up(calls: Iterable[LayerCall]) -> set[str]:
    """Return the names of the weights whose rows are looked up, and so in no product."""
    return {call.name for call in calls if isinstance(call.geometry, Lookup)}


def check_outputs(outputs: Tensor, targets: Any, batch: Batch, loss: FullLoss) -> None:
    """Raise unless the loss takes outputs and targets, and there is a row for each example."""
    loss.check(outputs.detach(), targets)
    if batch.size is not None and len(outputs) != batch.size:
        raise PruningError(
            f"the network must return a row of outputs for each example, got {len(outputs)} for "
            f"{batch.size} examples"
        )


class ProbingCalls(LayerCalls):
    """Also shows what a recording alone cannot see.

    Recorded calls compute with a detached weight, so that what the outputs still depend on the
    weight through is exactly the uses that were *not* recorded.  And no function may use a
    module's own parameter where a weight has been put in its place.
    """

    def __init__(self, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self._parameters = {id(parameters[name]): name for name in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in tree_leaves((args, kwargs)):
            if id(argument) in self._parameters:
                raise PruningError(
                    f"the network keeps {self._parameters[id(argument)]!r} elsewhere than in its "
                    "layer and uses it from there, so that masks do not reach it"
                )
        return super().__torch_function__(func, types, args, kwargs)

    def _replacements(self, inputs: Tensor, weight: Tensor) -> dict[int, Tensor]:
        detached = weight.detach()
        if not inputs.is_floating_point():  # rows that are looked up: nothing else has a gradient
            detached.requires_grad_()
        return {**super()._replacements(inputs, weight), id(weight): detached}


def used_elsewhere(weights: Mapping[str, Tensor], outputs: Tensor) -> set[str]:
    """Names of the weights that reach the outputs by a way that was not recorded, and detached."""
    if not outputs.requires_grad:
        raise PruningError(NOTHING)
    elsewhere = torch.autograd.grad(
        outputs.sum(), list(weights.values()), retain_graph=True, allow_unused=True
    )
    return {name for name, found in zip(weights, elsewhere, strict=True) if found is not None}


def _other_rows(outputs: Tensor, calls: list[LayerCall]) -> set[str]:
    """Names of the weights of layers whose first dimension is not the examples, or of two layouts.

    It may also be the examples and something else folded together, the rows of an example being
    next to each other.
    """
    examples = len(outputs)
    names = apart(calls, examples)
    calls = [call for call in calls if call.name not in names]
    if examples == 1 or not calls:
        return names
    # No direction that a network is likely to be blind to, as it may be to the sum of its outputs.
    outputs = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]
    direction = torch.linspace(1, 2, outputs.shape[1], dtype=outputs.dtype).cos().to(outputs.device)
    for example in range(examples):
        found = torch.autograd.grad(
            outputs[example] @ direction,
            [call.output for call in calls],
            retain_graph=True,
            allow_unused=True,
        )
        for call, gradient in zip(calls, found, strict=True):
            if gradient is None:
                continue
            rows = gradient.unflatten(0, (examples, -1))
            if rows.count_nonzero() > rows[example].count_nonzero():
                names.add(call.name)
    return names


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# The default of `memory`: beyond these a measurement of convolutions does not get faster.
MEMORY = {"cpu": 256 << 20, "cuda": 4 << 30}
# Gradients under way at once in a backward pass, of the size of the largest layer's output.
_UNDER_WAY = 2
# What products and convolutions work in: this much, or half of a smaller budget.
_WORK = 32 << 20


@dataclass(frozen=True)
class Budget:
    """Bytes that may be in use at once, and what they go to.

    Attributes:
        memory: the budget.
        graph: what the forward pass of one example keeps.
        column: the gradients at all the layers' outputs, of one example and column.
        passing: those under way in a backward pass, of one example.

    >>> Budget(memory=1000, graph=20, column=10, passing=20).examples(columns=8)
    4
    >>> Budget(memory=1000, graph=20, column=10, passing=20).columns(examples=10)
    1
    """

    memory: int
    graph: int
    column: int
    passing: int = 0

    def examples(self, columns: int) -> int:
        """Return how many examples fit with that many columns each; at least one."""
        example = self.graph + columns * self.column + self.passing
        return max(1, self._free // max(1, example))

    @property
    def _free(self) -> int:
        return self.memory - min(_WORK, self.memory // 2)

    def columns(self, examples: int) -> int:
        """Return how many columns at once fit with that many examples; at least one."""
        free = self._free // examples - self.graph - self.passing
        return max(1, free // max(1, self.column))


def checked_memory(memory: int | None, weights: Mapping[str, Tensor]) -> int:
    """Return the bytes that may be in use at once; None: what suits the weights and their device.

    That is at least what the weights and their gradient take: products of few rows with large
    weights take as long to add up as to compute.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    if memory is None:
        device = next(iter(weights.values())).device.type
        size = sum(weight.nbytes for weight in weights.values())
        memory = max(MEMORY.get(device, MEMORY["cuda"]), 2 * size)
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory must be a whole number of bytes, at least 1, got {memory!r}")
    return memory
