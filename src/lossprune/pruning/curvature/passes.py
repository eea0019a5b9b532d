"""The backward passes of a chunk of examples, and what becomes of them layer by layer."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lossprune.pruning.curvature.budget import Budget
from lossprune.pruning.curvature.layers import LayerCall
from lossprune.pruning.curvature.squares import add_squares_


class _Use:
    """One use of a weight: what the layer saw, and the gradients at its output, as they come."""

    def __init__(self, call: LayerCall, columns: int, dtype: torch.dtype) -> None:
        self.call = call
        examples, *rest = call.output_shape
        self.gradients = call.inputs.new_empty(examples, columns, *rest, dtype=dtype)

    def patches(self, examples: slice) -> Tensor:
        inputs = self.call.inputs[examples].to(self.gradients.dtype)
        return self.call.geometry.patches(inputs)

    def columns(self, examples: slice) -> Tensor:
        return self.call.geometry.columns(self.gradients[examples])


def add_squared_gradients_(
    totals: Mapping[str, Tensor],
    outputs: Tensor,
    calls: Sequence[LayerCall],
    columns: Tensor,
    budget: Budget,
) -> None:
    """Add Σ_n Σ_k (∂(z_n · S_nk)/∂θ)² to the total of every weight.

    Args:
        totals: by parameter name, of the weight's shape; added to in place.
        outputs: z, (n, c), with its graph, which is kept.
        calls: the uses of the weights in that graph.
        columns: S, (n, k, c).
        budget: bounds how many columns go at once.
    """
    if columns.shape[1] == 0:  # a loss that is linear in the outputs has no curvature
        return
    for some in columns.split(budget.columns(len(columns)), dim=1):
        uses: dict[str, list[_Use]] = {}
        for use in _backward(totals, outputs, calls, some):
            uses.setdefault(use.call.name, []).append(use)
        for name, parts in uses.items():
            _add_weight_(totals[name], parts)
            parts.clear()  # their memory is needed no more


def _backward(
    totals: Mapping[str, Tensor], outputs: Tensor, calls: Sequence[LayerCall], columns: Tensor
) -> Iterator[_Use]:
    """Yield the uses that the outputs depend on, with the gradients of all columns."""
    edges = [call.output for call in calls]
    uses: list[_Use | None] = [
        _Use(call, columns.shape[1], totals[call.name].dtype) for call in calls
    ]
    for k, column in enumerate(columns.unbind(1)):
        found = torch.autograd.grad(outputs, edges, column, retain_graph=True, allow_unused=True)
        for index, gradient in enumerate(found):
            use = uses[index]
            if gradient is None:
                uses[index] = None
            elif use is not None:
                use.gradients[:, k] = gradient
    yield from (use for use in uses if use is not None)


def _add_weight_(total: Tensor, uses: Sequence[_Use]) -> None:
    # Several uses of one weight are further positions of it: their gradients add up, then square.
    def patches(examples: slice) -> Tensor:
        return _along_positions([use.patches(examples) for use in uses])

    def gradients(examples: slice) -> Tensor:
        return _along_positions([use.columns(examples) for use in uses])

    shape = uses[0].call.geometry.grouped(total)
    add_squares_(total.view(shape), patches, gradients, uses[0].gradients.shape[0])


def _along_positions(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
