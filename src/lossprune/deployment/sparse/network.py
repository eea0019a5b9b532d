"""A module that runs a list of sparse steps by one call of the compiled kernels."""

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.deployment.sparse.emission import planned
from lossprune.deployment.sparse.inputs import (
    check_input,
    image_shape,
    images_of,
    row_shape,
    rows_of,
    tokens_of,
)
from lossprune.deployment.sparse.plan import ROW_VECTORS, SHARED, SparsePlan, lanes
from lossprune.deployment.sparse.steps import (
    Pair,
    Shape,
    SparseConvolution,
    SparseStep,
    Weights,
    flattened,
)
from lossprune.deployment.sparse.token_steps import OF_TOKENS, check_tokens, images_among
from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import listed

_FIELDS = ("shift", "scale", "positions", "values")
_LOWER = (torch.float16, torch.bfloat16)
_PROXIES = torch._C._TorchDispatchModeKey.PROXY
_TRACED = (
    "a deployed network runs compiled kernels, which torch.jit, torch.export and fx cannot record: "
    "trace or export the network of lossprune.compact instead"
)


@dataclass(frozen=True)
class Tuning:
    """How the kernels run a network, as far as it may differ and give the same.

    Attributes:
        tiles: of convolutions over blocks of images, (rows, columns), by the steps' targets; the
            best guess where there is none.
        few: fewer images than this are run one by one: a batch, or what fills no block of one.
        shared: multiply-adds beyond which threads share the work.
    """

    tiles: Mapping[str, Pair] = field(default_factory=dict)
    few: int = 5
    shared: int = SHARED


class SparseNetwork(nn.Module):
    """Steps of a network whose removed weights are not multiplied with.

    It computes, it does not train, in float32 on the CPU: its parameters, the kept weights, ask for
    no gradients.
    Threads may share it; it may be copied, saved and moved to another process, which lays it out
    anew.  What it computes is out of sight of all that records torch's operations: tracing is
    refused.

    Attributes:
        steps: what is computed.
        tuning: how; see :meth:`retune_`.
    """

    def __init__(
        self,
        steps: Sequence[SparseStep],
        weights: Sequence[Weights],
        inputs: Sequence[str],
        outputs: Sequence[tuple[str, bool]],
        *,
        rows: bool = False,
    ) -> None:
        """Take steps with their weights, the values read, and those written and if flattened.

        With ``rows`` all values are rows of features, (..., features); with steps on tokens among
        them, inputs are (n, tokens, features), or (tokens, n, features) if ``first``.
        """
        super().__init__()
        self.steps, self.rows = tuple(steps), rows
        of_tokens = [step.operation for step in steps if isinstance(step.operation, OF_TOKENS)]
        self.tokens = bool(of_tokens)
        self.images = images_among(steps)
        self.first = any(getattr(operation, "first", False) for operation in of_tokens)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.tuning = Tuning()
        for k, weight in enumerate(weights):
            for name in _FIELDS:
                tensor = getattr(weight, name)
                if tensor.is_floating_point():
                    tensor = nn.Parameter(tensor, requires_grad=False)
                    self.register_parameter(f"{name}_{k}", tensor)
                else:
                    self.register_buffer(f"{name}_{k}", tensor)
        self._plans: dict[tuple[bool | torch.Size, ...], SparsePlan] = {}
        self._laid_out = self._tensors()
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        """Map tensors (n, channels, height, width) or (n, features) to the outputs, in order.

        Where values are rows, tensors are (..., features): any dimensions before the last.

        Raises:
            PruningError: an input is not float32 on the CPU, asks for gradients or does not fit; or
                the call is traced.
        """
        _check_not_traced()
        if torch.compiler.is_compiling():  # its graph breaks here, once, and nothing inside is seen
            return torch.compiler.disable(self._run)(*inputs)  # pyright: ignore[reportArgumentType]
        return self._run(*inputs)

    def _run(self, *inputs: Tensor) -> Any:
        if len(inputs) != len(self.inputs):
            raise PruningError(f"a deployed network of {len(self.inputs)} inputs got {len(inputs)}")
        if torch.is_autocast_enabled("cpu"):  # as for torch's own operations in float32
            inputs = tuple(
                given.float() if isinstance(given, Tensor) and given.dtype in _LOWER else given
                for given in inputs
            )
        for tensor in inputs:
            check_input(tensor, rows=self.rows)
        leading, inputs = self.aligned(inputs)
        if self.tokens:
            check_tokens(self.steps, leading[1])
        plan = self.plan(inputs)
        outputs = self.empty(plan, leading)
        count = inputs[0].shape[0]
        if rest := count % lanes() if plan.vectors == 1 else 0:
            rest = rest if rest < min(self.tuning.few, count) else 0
        if rest:
            whole = count - rest
            plan.run([x[:whole] for x in inputs], [y[:whole] for y in outputs], self.tuning.shared)
            last = [x[whole:] for x in inputs]
            self.plan(last).run(last, [y[whole:] for y in outputs], self.tuning.shared)
        elif 0 not in leading:
            plan.run(inputs, outputs, self.tuning.shared)
        if self.first:
            outputs = [output.transpose(0, 1) for output in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def aligned(self, inputs: Sequence[Tensor]) -> tuple[Sequence[int], tuple[Tensor, ...]]:
        """Return the dimensions of examples, or rows, and inputs in one piece with one such."""
        if self.tokens:
            images = [self.images.get(name) for name in self.inputs]
            return tokens_of(inputs, images, first=self.first)
        return (rows_of if self.rows else images_of)(inputs)

    def empty(self, plan: SparsePlan, leading: Sequence[int]) -> list[Tensor]:
        """Return room for the outputs of a call; what no token gives is not a number."""
        made = []
        for (c, h, w), (name, flat) in zip(plan.outputs, self.outputs, strict=True):
            first = leading[:1] if name in plan.single else leading
            shape = (*first, c * h * w) if flat or self.rows else (*first, c, h, w)
            made.append(torch.full(shape, torch.nan) if 0 in leading else torch.empty(shape))
        return made

    def plan(self, inputs: Sequence[Tensor]) -> SparsePlan:
        """Return the steps laid out for so many inputs of these shapes; made once."""
        many = self.tokens or inputs[0].shape[0] >= self.tuning.few
        key = (many, *[tensor.shape[-1 if self.rows else 1 :] for tensor in inputs])
        tensors = self._tensors()
        if not all(map(operator.is_, tensors, self._laid_out)):
            self._plans, self._laid_out = {}, tensors  # as torch.func.functional_call puts others
        if key not in self._plans:
            self._plans[key] = self.planned(self.shapes(inputs), many=many, lanes=lanes())
        return self._plans[key]

    def shapes(self, inputs: Sequence[Tensor]) -> tuple[Shape, ...]:
        """Return the shape of one image, or row, of each input."""
        one = row_shape if self.rows else image_shape
        return tuple([one(tensor) for tensor in inputs])

    def planned(self, shapes: Sequence[Shape], *, many: bool, lanes: int) -> SparsePlan:
        """Return the steps laid out for inputs of these shapes.

        Args:
            shapes: of one image of each input.
            many: whether images, or rows, are computed in blocks.
            lanes: numbers of a vector.
        """
        read = dict(zip(self.inputs, shapes, strict=True))
        written = [name for name, _ in self.outputs]
        flat = flattened(self.steps, read, written)
        if self.tokens and flat is None:
            raise PruningError("a deployed network has steps on tokens among those on maps")
        return planned(
            self.steps, self.weights(), flat or read, written, self.tuning.tiles,
            vectors=(ROW_VECTORS if flat else 1) if many else 0, lanes=lanes,
        )  # fmt: skip

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return (*self._parameters.values(), *self._buffers.values())

    def weights(self) -> list[Weights]:
        """Return the weights of every step."""
        return [
            Weights(*(getattr(self, f"{name}_{k}") for name in _FIELDS))
            for k in range(len(self.steps))
        ]

    def retune_(self, tuning: Tuning) -> "SparseNetwork":
        """Run as ``tuning`` says from now on."""
        if tuning.tiles != self.tuning.tiles:
            self._plans = {}
        self.tuning = tuning
        return self

    def retuned(self, tuning: Tuning) -> "SparseNetwork":
        """Return a network of the same tensors that runs as ``tuning`` says."""
        return copy.copy(self).retune_(tuning)

    def __prepare_scriptable__(self) -> "SparseNetwork":
        """Refuse ``torch.jit.script``, which asks for this before it compiles a module."""
        raise PruningError(_TRACED)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._plans = {}

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseNetwork":
        check_conversion(fn)
        super()._apply(fn, recurse)
        self._plans = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}, "_laid_out": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._laid_out = self._tensors()

    def extra_repr(self) -> str:
        """Name the layers."""
        kept = sum(weight.values.numel() for weight in self.weights())
        names = [step.name for step in self.steps if isinstance(step.operation, SparseConvolution)]
        return f"{kept:,} kept weights in {listed(names, most=4)}"


def check_conversion(fn: Any) -> None:
    """Refuse a function that ``Module.to`` and the like would apply to float32 weights on the CPU.

    Raises:
        PruningError: another type, another device, or other numbers.
    """
    probe = torch.arange(4.0)
    made = fn(probe.clone())
    if made.dtype != torch.float32 or made.device.type != "cpu":
        raise PruningError(
            "a deployed network computes in float32 on the CPU and cannot be made "
            f"{made.dtype} on {made.device}: convert the network and deploy that"
        )
    if not torch.equal(made, probe):
        raise PruningError("a deployed network cannot be emptied: deploy the network again")


def _check_not_traced() -> None:
    # Whatever records operations would record none, and that the outputs are empty tensors.
    if (
        torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or torch.compiler.is_exporting()
        or torch._C._get_dispatch_mode(_PROXIES) is not None
    ):
        raise PruningError(_TRACED)
