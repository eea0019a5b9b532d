"""Following the mask: which parts of a weight still have anything to measure."""

from dataclasses import dataclass

from torch import Tensor

# Output channels in a tile.  Fewer would leave out more, but make products too thin to be fast.
_ROWS = 128
# Tiles pay for gathering their rows and columns if they cover no more than this of the weight.
_WORTHWHILE = 0.6


@dataclass(frozen=True)
class Tile:
    """A submatrix: these outputs and these inputs, as indices."""

    outputs: Tensor
    inputs: Tensor


def tile(kept: Tensor) -> list[Tile] | None:
    """Cover the kept entries of a weight, (o, i), with tiles; None where that saves too little.

    Each tile leaves out the outputs that have lost all their inputs, and the inputs (a channel at
    a kernel position) that none of its outputs uses any more.

    >>> import torch
    >>> kept = torch.tensor([[True, False, False, True], [False] * 4])
    >>> tile(kept)
    [Tile(outputs=tensor([0]), inputs=tensor([0, 3]))]
    """
    rows = kept.any(1).nonzero().flatten()
    if not len(rows):  # the layer has no weight left
        return []
    tiles = [Tile(some, kept[some].any(0).nonzero().flatten()) for some in rows.split(_ROWS)]
    covered = sum(len(part.outputs) * len(part.inputs) for part in tiles)
    return tiles if covered <= _WORTHWHILE * kept.numel() else None
