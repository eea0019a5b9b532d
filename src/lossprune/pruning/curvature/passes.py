"""The backward passes of a chunk of examples, and what becomes of them layer by layer."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lossprune.pruning.curvature.budget import Budget
from lossprune.pruning.curvature.layers import LayerCall
from lossprune.pruning.curvature.squares import add_squares_, prefers_direct
from lossprune.pruning.curvature.tiles import Tile, tile


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
    kept: Mapping[str, Tensor] | None = None,
) -> None:
    """Add Σ_n Σ_k (∂(z_n · S_nk)/∂θ)² to the total of every weight.

    Args:
        totals: by parameter name, of the weight's shape; added to in place.
        outputs: z, (n, c), with its graph, which is kept.
        calls: the uses of the weights in that graph.
        columns: S, (n, k, c).
        budget: bounds how many columns go at once.
        kept: by parameter name, True where the diagonal is wanted; None: everywhere.
    """
    if columns.shape[1] == 0:  # a loss that is linear in the outputs has no curvature
        return
    for some in columns.split(budget.columns(len(columns)), dim=1):
        uses: dict[str, list[_Use]] = {}
        for use in _backward(totals, outputs, calls, some):
            uses.setdefault(use.call.name, []).append(use)
        for name, parts in uses.items():
            _add_weight_(totals[name], parts, kept[name] if kept else None)
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


def _add_weight_(total: Tensor, uses: Sequence[_Use], kept: Tensor | None) -> None:
    # Several uses of one weight are further positions of it: their gradients add up, then square.
    def patches(examples: slice) -> Tensor:
        return _along_positions([use.patches(examples) for use in uses])

    def gradients(examples: slice) -> Tensor:
        return _along_positions([use.columns(examples) for use in uses])

    examples = uses[0].gradients.shape[0]
    shape = uses[0].call.geometry.grouped(total)
    total = total.view(shape)
    first = gradients(slice(0, 1))
    tiles = None
    if kept is not None and not kept.any():
        return
    # Only the direct way, a product for every example, costs so much that leaving out pays.
    if kept is not None and shape[0] == 1 and prefers_direct(shape, first.shape[1], first.shape[4]):
        tiles = tile(kept.view(shape[1:]))
    if tiles is None:
        add_squares_(total, patches, gradients, examples)
        return
    x, y = patches(slice(0, examples)), gradients(slice(0, examples))
    for part in tiles:
        _add_tile_(total[0], x[:, 0], y[:, :, 0], part)


def _add_tile_(total: Tensor, x: Tensor, y: Tensor, part: Tile) -> None:
    """Add to ``total``, (o, i), what x, (n, i, p), and y, (n, k, o, p), give in one tile."""
    here = total.new_zeros(1, len(part.outputs), len(part.inputs))
    add_squares_(
        here,
        lambda examples: x[examples].index_select(1, part.inputs)[:, None],
        lambda examples: y[examples].index_select(2, part.outputs)[:, :, None],
        len(x),
    )
    total[part.outputs[:, None], part.inputs] += here[0]


def _along_positions(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
