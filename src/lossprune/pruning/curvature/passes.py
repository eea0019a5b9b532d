"""The backward passes of a chunk of examples, and what becomes of them layer by layer."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossprune.pruning.curvature.columns import Columns
from lossprune.pruning.curvature.geometry import Lookup
from lossprune.pruning.curvature.layers import LayerCall
from lossprune.pruning.curvature.lookups import Rows, add_rows_, without_rows
from lossprune.pruning.curvature.probe import Budget
from lossprune.pruning.curvature.squares import add_factored_, add_squares_, prefers_direct

# Output channels in a tile.  Fewer would leave out more, but make products too thin to be fast.
_ROWS = 128
# Tiles pay for gathering their rows and columns if they cover no more than this of the weight.
_WORTHWHILE = 0.6


@dataclass(frozen=True)
class _Tile:
    """A submatrix: these outputs and these inputs, as indices."""

    outputs: Tensor
    inputs: Tensor


class _WeightUse:
    """One use of a weight: what the layer saw, and the gradients at its output, as they come."""

    def __init__(self, call: LayerCall, examples: int, columns: int, dtype: torch.dtype) -> None:
        self.call = call
        rows, *rest = call.output_shape
        # An example's rows (its tokens, say, where a network folds them into the first dimension).
        self.rows = rows // examples
        self._shape = (examples, *((self.rows, *rest) if self.rows > 1 else rest))
        self._columns, self._dtype = columns, dtype
        self.gradients: Tensor

    def add(self, k: int, gradient: Tensor) -> None:
        gradient = gradient.reshape(self._shape)
        if self._columns == 1:  # as it is, without a copy
            self.gradients = gradient.to(self._dtype)[:, None]
            return
        if k == 0:
            shape = (len(gradient), self._columns, *self._shape[1:])
            self.gradients = gradient.new_empty(shape, dtype=self._dtype)
        self.gradients[:, k] = gradient

    @property
    def looks_up(self) -> bool:
        return isinstance(self.call.geometry, Lookup)

    def patches(self, examples: slice) -> Tensor:
        geometry, dtype = self.call.geometry, self._dtype
        if self.rows == 1:
            return geometry.patches(self.call.inputs[examples].to(dtype))
        start, stop, _ = examples.indices(len(self.gradients))
        inputs = self.call.inputs[start * self.rows : stop * self.rows].to(dtype)
        # Rows are further positions: (n·r, g, i, p) → (n, g, i, r·p).
        patches = geometry.patches(inputs)
        return patches.unflatten(0, (-1, self.rows)).permute(0, 2, 3, 1, 4).flatten(3)

    def columns(self, examples: slice) -> Tensor:
        gradients = self.gradients[examples]
        if self.rows == 1:
            return self.call.geometry.columns(gradients)
        # (n, k, r, *output) → (n·r, k, g, o, p) → (n, k, g, o, r·p)
        columns = self.call.geometry.columns(gradients.transpose(1, 2).flatten(0, 1))
        return columns.unflatten(0, (-1, self.rows)).permute(0, 2, 3, 4, 1, 5).flatten(4)


class _Squares:
    """The only use of a weight, at one position: of its columns y the sum Σ_k y² is enough."""

    def __init__(self, call: LayerCall, dtype: torch.dtype) -> None:
        self.call = call
        self.squares = call.inputs.new_zeros(call.output_shape, dtype=dtype)

    def add(self, k: int, gradient: Tensor) -> None:
        self.squares.addcmul_(gradient, gradient)

    def add_to_(self, total: Tensor) -> None:
        geometry = self.call.geometry
        x = geometry.patches(self.call.inputs.to(self.squares.dtype))[..., 0]
        add_factored_(
            geometry.grouped(total), x, geometry.columns(self.squares[:, None])[:, 0, ..., 0]
        )


def add_squared_gradients_(
    totals: Mapping[str, Tensor],
    outputs: Tensor,
    calls: Sequence[LayerCall],
    columns: Columns,
    budget: Budget,
    kept: Mapping[str, Tensor] | None = None,
    tell: Callable[[float], None] = lambda examples: None,
) -> None:
    """Add Σ_n Σ_k (∂(z_n · S_nk)/∂θ)² to the total of every weight.

    Args:
        totals: by parameter name, of the weight's shape; added to in place.
        outputs: z, (n, ...), with its graph, which is kept.
        calls: the uses of the weights in that graph.
        columns: S.
        budget: bounds how many columns go at once.
        kept: by parameter name, True where the diagonal is wanted; None: everywhere.
        tell: is called after some of the columns, but the last, with their share of the examples.
    """
    keys = columns.keys()  # none where a loss is linear in the outputs: it has no curvature
    size = budget.columns(len(outputs))
    for start in range(0, len(keys), size):
        some = [columns[key] for key in keys[start : start + size]]
        uses: dict[str, list[_WeightUse]] = {}
        for use in _backward(totals, outputs, calls, some):
            if isinstance(use, _Squares):
                use.add_to_(totals[use.call.name])
            else:
                uses.setdefault(use.call.name, []).append(use)
        for name, parts in uses.items():
            _add_weight_(totals[name], parts, kept[name] if kept else None)
            parts.clear()  # their memory is needed no more
        if start + size < len(keys):
            tell(len(outputs) * size / len(keys))


def _backward(
    totals: Mapping[str, Tensor],
    outputs: Tensor,
    calls: Sequence[LayerCall],
    columns: Sequence[Tensor],
) -> Iterator[_WeightUse | _Squares]:
    """Yield the uses that the outputs depend on, with the gradients of all columns."""
    edges = [call.output for call in calls]
    times = Counter(call.name for call in calls)
    uses: list[_WeightUse | _Squares | None] = []
    for call in calls:
        dtype = totals[call.name].dtype
        alone = times[call.name] == 1 and call.output_shape[0] == len(outputs)
        looks_up = isinstance(call.geometry, Lookup)
        if alone and not looks_up and call.geometry.positions(call.output_shape) == 1:
            uses.append(_Squares(call, dtype))
        else:
            uses.append(_WeightUse(call, len(outputs), len(columns), dtype))
    for k, column in enumerate(columns):
        found = torch.autograd.grad(outputs, edges, column, retain_graph=True, allow_unused=True)
        for index, gradient in enumerate(found):
            use = uses[index]
            if gradient is None:
                uses[index] = None
            elif use is not None:
                use.add(k, gradient)
    yield from (use for use in uses if use is not None)


def _add_weight_(total: Tensor, uses: Sequence[_WeightUse], kept: Tensor | None) -> None:
    if kept is not None and not kept.any():
        return
    examples = uses[0].gradients.shape[0]
    lookups = [use for use in uses if use.looks_up]
    products = [use for use in uses if not use.looks_up]
    rows = [_rows(lookups, example) for example in range(examples)] if lookups else []
    if not products:
        add_rows_(total, rows, None, None)
        return

    # Several uses of one weight are further positions of it: their gradients add up, then square.
    def patches(examples: slice) -> Tensor:
        return _along_positions([use.patches(examples) for use in products])

    def gradients(examples: slice) -> Tensor:
        return _along_positions([use.columns(examples) for use in products])

    geometry = products[0].call.geometry
    if rows:
        add_rows_(total, rows, patches, gradients)
        add_squares_(geometry.grouped(total), patches, without_rows(gradients, rows), examples)
        return
    total = geometry.grouped(total)
    tiles = None
    first = gradients(slice(0, 1))
    # Only the direct way, a product for every example, costs so much that leaving out pays.
    direct = prefers_direct(total.shape, first.shape[1], first.shape[4])
    if kept is not None and len(total) == 1 and direct:
        tiles = _tiled(geometry.grouped(kept)[0])
    if tiles is None:
        add_squares_(total, patches, gradients, examples)
        return
    x, y = patches(slice(0, examples)), gradients(slice(0, examples))
    for part in tiles:
        _add_tile_(total[0], x[:, 0], y[:, :, 0], part)


def _rows(uses: Sequence[_WeightUse], example: int) -> Rows:
    """What an example looks up in all uses."""
    ids, gradients = [], []
    for use in uses:
        geometry = use.call.geometry
        own = geometry.patches(use.call.inputs.reshape(len(use.gradients), -1))[example]
        y = geometry.columns(use.gradients[example, None])[0]
        if isinstance(geometry, Lookup) and geometry.padding is not None:
            counted = own != geometry.padding
            own, y = own[counted], y[:, counted]
        ids.append(own)
        gradients.append(y)
    return Rows.of(torch.cat(ids), torch.cat(gradients, dim=1))


def _add_tile_(total: Tensor, x: Tensor, y: Tensor, part: _Tile) -> None:
    """Add to ``total``, (o, i), what x, (n, i, p), and y, (n, k, o, p), give in one tile."""
    here = total.new_zeros(1, len(part.outputs), len(part.inputs))
    add_squares_(
        here,
        lambda examples: x[examples].index_select(1, part.inputs)[:, None],
        lambda examples: y[examples].index_select(2, part.outputs)[:, :, None],
        len(x),
    )
    total[part.outputs[:, None], part.inputs] += here[0]


def _tiled(kept: Tensor) -> list[_Tile] | None:
    """Cover the kept entries of a weight, (o, i), with tiles; None where that saves too little.

    Each tile leaves out the outputs that have lost all their inputs, and the inputs (a channel at
    a kernel position) that none of its outputs uses any more.

    >>> import torch
    >>> kept = torch.tensor([[True, False, False, True], [False] * 4])
    >>> _tiled(kept)
    [_Tile(outputs=tensor([0]), inputs=tensor([0, 3]))]
    """
    rows = kept.any(1).nonzero().flatten()
    if not len(rows):  # the layer has no weight left
        return []
    tiles = [_Tile(some, kept[some].any(0).nonzero().flatten()) for some in rows.split(_ROWS)]
    covered = sum(len(part.outputs) * len(part.inputs) for part in tiles)
    return tiles if covered <= _WORTHWHILE * kept.numel() else None


def _along_positions(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
