"""A module that runs a list of sparse steps by one call of the compiled kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.deployment.sparse_plan import SHARED, Plan, lay_out, library
from lossprune.deployment.sparse_steps import Shape, Step, Weights
from lossprune.pruning.errors import PruningError

_FIELDS = ("shift", "scale", "positions", "values")


class SparseNetwork(nn.Module):
    """Steps of a network whose removed weights are not multiplied with.

    It has buffers and no parameters: it computes, it does not train.  Threads may share it; it may
    be copied, saved and moved to another process, which lays it out anew.

    Attributes:
        steps: what is computed.
        few: batches smaller than this are run image by image.
        shared: multiply-adds beyond which threads share the work.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        weights: Sequence[Weights],
        inputs: Sequence[str],
        outputs: Sequence[tuple[str, bool]],
        *,
        few: int = 5,
    ) -> None:
        """Take steps with their weights, the values read, and those written and if flattened."""
        super().__init__()
        self.steps = tuple(steps)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.few, self.shared = few, SHARED
        for k, weight in enumerate(weights):
            for field in _FIELDS:
                self.register_buffer(f"{field}_{k}", getattr(weight, field))
        self._plans: dict[tuple[bool, tuple[Shape, ...]], Plan] = {}
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        """Map tensors (n, channels, height, width) or (n, features) to the outputs, in order.

        Raises:
            PruningError: an input is not float32 on the CPU, asks for gradients or does not fit.
        """
        for tensor in inputs:
            self._check(tensor)
        images = _images(inputs)
        inputs = tuple(tensor.expand(images, *tensor.shape[1:]).contiguous() for tensor in inputs)
        shapes = tuple([image_shape(tensor) for tensor in inputs])
        plan = self.plan(images >= self.few, shapes)
        outputs = [
            torch.empty(
                (images, c * h * w) if flat else (images, c, h, w)
            )
            for (c, h, w), (_, flat) in zip(plan.outputs, self.outputs, strict=True)
        ]  # fmt: skip
        if images:
            plan.run(inputs, outputs, self.shared)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def plan(self, blocked: bool, shapes: tuple[Shape, ...]) -> Plan:
        """Return the steps laid out for inputs of these shapes; made once."""
        key = (blocked, shapes)
        if key not in self._plans:
            self._plans[key] = lay_out(
                self.steps, self.weights(), dict(zip(self.inputs, shapes, strict=True)),
                [name for name, _ in self.outputs], blocked=blocked,
            )  # fmt: skip
        return self._plans[key]

    def weights(self) -> list[Weights]:
        """Return the weights of every step."""
        return [
            Weights(*(self.get_buffer(f"{field}_{k}") for field in _FIELDS))
            for k in range(len(self.steps))
        ]

    def retile_(self, tiles: Sequence[tuple[int, int] | None]) -> None:
        """Set the tile of every step."""
        self.steps = tuple(
            step.replace(tile=tile) for step, tile in zip(self.steps, tiles, strict=True)
        )
        self._plans = {}

    def _check(self, tensor: Tensor) -> None:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise PruningError(
                "a deployed network takes float32 tensors on the CPU, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise PruningError(
                "a deployed network computes no gradients: detach its input "
                "or call it under torch.no_grad()"
            )
        if tensor.dim() not in (2, 4):
            raise PruningError(
                "a deployed network takes (n, channels, height, width) or (n, features), "
                f"got shape {tuple(tensor.shape)}"
            )

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._plans = {}

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseNetwork":
        super()._apply(fn, recurse)
        self._plans = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    def extra_repr(self) -> str:
        """Name the layers."""
        kept = sum(weight.values.numel() for weight in self.weights())
        names = ", ".join(step.name for step in self.steps if step.kind == "convolution")
        return f"{kept:,} kept weights in {names}"


def _images(inputs: Sequence[Tensor]) -> int:
    """Return how many images there are; one that all of them share, as a parameter is, is one."""
    counts = {tensor.shape[0] for tensor in inputs}
    if len(counts) > 1:
        counts.discard(1)
    if len(counts) > 1:
        raise PruningError(f"the inputs of a deployed network are of {sorted(counts)} examples")
    return counts.pop()


def image_shape(tensor: Tensor) -> Shape:
    """Return (channels, height, width) of one image; features are channels of one position."""
    shape = tensor.shape
    return (shape[1], 1, 1) if len(shape) == 2 else (shape[1], shape[2], shape[3])


def lanes() -> int:
    """Return how many images a block has on this machine."""
    return library().lanes()
