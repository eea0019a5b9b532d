"""A network at θ ⊙ m, evaluated without touching the module it was made from."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError

from lossprune.pruning.curvature.batch import Batch, Forward
from lossprune.pruning.curvature.examples import device_of
from lossprune.pruning.curvature.forms import default_forward
from lossprune.pruning.curvature.layers import LayerCall, Probe
from lossprune.pruning.curvature.losses import FullLoss
from lossprune.pruning.curvature.plainly import ordinary, running_plainly
from lossprune.pruning.curvature.reach import NOTHING, reached
from lossprune.pruning.curvature.running import advice_on_inputs, described, run
from lossprune.pruning.curvature.saving import CHECKPOINTED, Saving
from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import look_up
from lossprune.pruning.prunable import Choices, prunable_weights
from lossprune.pruning.substitution import call_with
from lossprune.pruning.wholeness import check_whole
from lossprune.torch_state import in_mode

_FEW = 4  # examples that a probe looks at


class _Step(nn.Module):
    """A forward function as a module, so that parameters can be put in for its network's."""

    def __init__(self, model: nn.Module, function: Forward) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> tuple[Tensor, Any]:
        return self.function(self.model, batch)


class Network:
    """The function batch → (outputs, targets) of a module whose removed weights are 0.

    Attributes:
        kept: m by parameter name; None where everything is kept.
        weights: θ ⊙ m by parameter name: leaves of a graph, apart from the module's own.
        unreached: names of the weights that no outputs have depended on so far.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mapping[str, Tensor] | None,
        forward: Forward | None = None,
        parameters: Choices | None = None,
        exclude: Choices | None = None,
    ) -> None:
        check_whole(model)
        self.model = model
        self._step = _Step(model, forward or default_forward)
        weights = prunable_weights(model, parameters, exclude)
        self.device = device_of(weights.values())
        mask = None if mask is None else _as_named_in(model, mask)
        self.kept = _checked(mask, weights, self.device)
        self.weights = {
            name: ordinary(_masked(weight.detach(), self.kept, name)).requires_grad_()
            for name, weight in weights.items()
        }
        self.unreached = set(self.weights)
        # Everything else enters as a constant; buffers as copies, in case the network writes them.
        self._constants = {name: ordinary(p.detach()) for name, p in model.named_parameters()}
        self._constants |= {name: b.clone() for name, b in model.named_buffers()}
        for name in (mask or {}).keys() - weights.keys():
            self._constants[name] = _masked_constant(name, self._constants, mask or {}, self.device)

    def __call__(self, batch: Batch) -> tuple[Tensor, Any]:
        """Outputs of the network at θ ⊙ m, (n, ...), and targets."""
        values = {f"model.{name}": v for name, v in (self._constants | self.weights).items()}
        # A copy, in case the network changes its inputs in place.
        given = batch.map(torch.clone).value
        own = self._step.function is not default_forward
        with Saving():
            result = run(
                f"{'forward' if own else 'the network'} could not be run on a batch of "
                f"{described(batch.value)}",
                lambda: call_with(values, self._step, given),
                lambda text: (
                    "it gets the batch as it is, and returns (outputs, targets)"
                    if own
                    else advice_on_inputs(batch.value, self.weights.values(), text)
                ),
            )
        if not (isinstance(result, tuple) and len(result) == 2):
            raise PruningError(
                f"forward must return a pair (outputs, targets), got {type(result).__name__}"
            )
        outputs, targets = result
        if not isinstance(outputs, Tensor) or outputs.ndim == 0:
            raise PruningError(
                f"the network must return a tensor of outputs, got {type(outputs).__name__}"
                + ("" if not isinstance(outputs, Tensor) else " without dimensions")
            )
        if not outputs.is_floating_point():
            raise PruningError(f"the network must return real numbers, got {outputs.dtype}")
        return outputs, targets

    def map(self, function: Callable[[Tensor], Tensor]) -> "Network":
        """Return the network with the function applied to every weight, constant and buffer."""
        network = copy(self)
        network.weights = {
            name: function(weight.detach()).requires_grad_()
            for name, weight in self.weights.items()
        }
        network._constants = {name: function(x) for name, x in self._constants.items()}
        return network

    def zeros(self) -> dict[str, Tensor]:
        """One zero for every prunable weight, to sum in: float32, or wider as the weight is."""
        return {
            name: torch.zeros(
                weight.shape,
                dtype=torch.promote_types(weight.dtype, torch.float32),
                device=weight.device,
            )
            for name, weight in self.weights.items()
        }

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode with gradients on, everything put back afterwards, also on an error."""
        with ExitStack() as stack:
            stack.enter_context(in_mode(self.model, training=False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(running_plainly(self.model))
            if self.device.type == "cuda":
                # TF32 would cost three digits of the curvature, and masks that agree with the CPU.
                stack.enter_context(torch.backends.cudnn.flags(allow_tf32=False))
            try:
                yield
            except RuntimeError as error:
                # Of checkpointing that goes about it by autograd functions of its own.
                if "use_reentrant" in str(error) or isinstance(error, CheckpointError):
                    raise PruningError(CHECKPOINTED) from error
                raise

    def probe(self, batch: Batch, loss: FullLoss, *, curvature: bool) -> "Costs":
        """Run a few examples: what they cost in memory, and whether curvature can be measured.

        Raises:
            PruningError: the outputs do not suit the loss; with ``curvature`` also, a weight
                is used where it cannot be measured, or examples interact.
        """
        if batch.size is not None:
            batch = batch[:_FEW]
        constants = {
            _storage(tensor) for tensor in (*self._constants.values(), *self.weights.values())
        }
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in constants:
                saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
            # Detached, as a node that saves its own output would otherwise keep itself for ever.
            return tensor.detach()

        with (
            saved_tensors_hooks(note, lambda tensor: tensor),
            Probe(self.weights, dict(self.model.named_parameters())) as recorder,
        ):
            outputs, targets = self(batch)
        self.note_reached(outputs, recorder.calls)
        check_outputs(outputs, targets, batch, loss)
        if curvature and outputs.isfinite().all():  # else the loss will be refused for it
            self._check_only_layers(outputs)
            _check_independent(outputs, recorder.calls)
        for call in recorder.calls:
            note(call.inputs)
        column_bytes = sum(math.prod(call.output_shape) for call in recorder.calls)
        if outputs.ndim > 2:  # a column of them is no small thing beside the layers'
            column_bytes += outputs.numel()
        column_bytes *= outputs.element_size()
        return Costs(
            outputs.detach(),
            targets,
            math.ceil(sum(saved.values()) / len(outputs)),
            math.ceil(column_bytes / len(outputs)),
        )

    def note_reached(self, outputs: Tensor, calls: Iterable[LayerCall] = ()) -> None:
        """Take the weights that these outputs depend on from those that none has depended on."""
        if self.unreached:
            self.unreached -= reached(outputs, self.weights, calls)

    def _check_only_layers(self, outputs: Tensor) -> None:
        """Raise if a weight reaches the outputs by a way that was not recorded, and detached."""
        if not outputs.requires_grad:
            raise PruningError(NOTHING)
        elsewhere = torch.autograd.grad(
            outputs.sum(), list(self.weights.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(self.weights, elsewhere, strict=True):
            if gradient is not None:
                raise PruningError(
                    f"{name!r} is also used outside a linear or convolution function, where its "
                    "curvature cannot be measured; prune with MP or LM, which do without it, or "
                    f"leave it out: exclude={name!r}"
                )


@dataclass(frozen=True)
class Costs:
    """What a few examples showed.

    Attributes:
        outputs: of the few, (n, ...).
        targets: of the few.
        graph_bytes: what a forward pass keeps for the backward ones, of one example.
        column_bytes: the gradients at all the layers' outputs, of one example and column.
    """

    outputs: Tensor
    targets: Any
    graph_bytes: int
    column_bytes: int


def _as_named_in(model: nn.Module, mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mask by the names that ``named_parameters`` gives, but for those of no parameter.

    It may have them as they are without a wrapper, and by any of the names of a module.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named: dict[str, Tensor] = {}
    for name, found in look_up(mask, parameters).items():
        own = name if found is None else names[id(parameters[found])]
        named[own] = mask[name] & named[own] if own in named else mask[name]
    return named


def _checked(
    mask: Mapping[str, Tensor] | None, weights: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor] | None:
    if mask is None:
        return None
    for name, weight in weights.items():
        if name not in mask:
            raise PruningError(f"the mask has nothing for the prunable weight {name!r}")
        _check_shape(name, mask[name], weight)
    # In one layout, as a mask made like a weight of another has that one.
    return {name: mask[name].to(device).contiguous() for name in weights}


def _masked_constant(
    name: str, constants: Mapping[str, Tensor], mask: Mapping[str, Tensor], device: torch.device
) -> Tensor:
    """A parameter that is not measured, but that the mask names."""
    if name not in constants:
        raise PruningError(f"the mask names {name!r}, which the network lacks")
    _check_shape(name, mask[name], constants[name])
    return constants[name] * mask[name].to(device)


def _check_shape(name: str, kept: Tensor, weight: Tensor) -> None:
    if kept.shape != weight.shape:
        raise PruningError(
            f"the mask of {name!r} has shape {tuple(kept.shape)}, the weight {tuple(weight.shape)}"
        )


def _masked(weight: Tensor, kept: Mapping[str, Tensor] | None, name: str) -> Tensor:
    return weight if kept is None else weight * kept[name]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def check_outputs(outputs: Tensor, targets: Any, batch: Batch, loss: FullLoss) -> None:
    """Raise unless the loss takes outputs and targets, and there is a row for each example."""
    loss.check(outputs.detach(), targets)
    if batch.size is not None and len(outputs) != batch.size:
        raise PruningError(
            f"the network must return a row of outputs for each example, got {len(outputs)} for "
            f"{batch.size} examples"
        )


def _check_independent(outputs: Tensor, calls: list[LayerCall]) -> None:
    """Raise unless the first dimension of every layer is the examples, and they do not interact.

    It may also be the examples and something else folded together, the rows of an example being
    next to each other.
    """
    examples = len(outputs)
    for call in calls:
        call.check_rows(examples)
    if examples == 1 or not calls:
        return
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
            if _others(gradient.unflatten(0, (examples, -1)), example).count_nonzero():
                raise PruningError(
                    f"the output of one example depends on others through {call.name!r}: the first "
                    "dimension of its input is not the examples, or the network mixes them"
                )


def _others(tensor: Tensor, example: int) -> Tensor:
    return torch.cat([tensor[:example], tensor[example + 1 :]])
