"""Classes drawn from distributions, without a second array of their size."""

import torch
from torch import Tensor

# Neighbouring classes whose probabilities are summed first: all of few, about a root of many.
_PIECE = 64


def drawn_classes(p: Tensor, uniform: Tensor) -> Tensor:
    """Return the first classes at which the cumulated probabilities exceed what is given.

    First a piece of neighbouring classes is found, by the sums of the pieces, then one in it.

    Args:
        p: probabilities, (n, c).
        uniform: numbers in [0, 1), (n, k), in double precision.

    Returns:
        Classes, (n, k).

    >>> drawn_classes(torch.tensor([[0.25, 0.0, 0.75]]), torch.tensor([[0.2, 0.3]]).double())
    tensor([[0, 2]])
    """
    classes = p.shape[1]
    size = min(classes, max(_PIECE, int(classes**0.5)))
    whole = classes // size * size
    sums = p[:, :whole].unflatten(1, (-1, size)).sum(2)
    if whole < classes:
        sums = torch.cat([sums, p[:, whole:].sum(1, keepdim=True)], 1)
    piece, part = _found(sums.double(), uniform)
    # (n, k, size): the classes of each piece that was found
    inside = piece[..., None] * size + torch.arange(size, device=p.device)
    chances = p.gather(1, inside.clamp(max=classes - 1).flatten(1)).view(inside.shape)
    chances = chances.double().masked_fill_(inside >= classes, 0.0)
    place, _ = _found(chances.flatten(0, 1), part.view(-1, 1))
    return (piece * size + place.view(piece.shape)).clamp_(max=classes - 1)


def _found(chances: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulated chances (n, c) exceed a share of their sum (n, k), and the rest of it.

    The rest is told as a share of the chance that is found.
    """
    below = chances.cumsum(1)
    wanted = uniform * below[:, -1:]
    place = torch.searchsorted(below, wanted, right=True).clamp_(max=chances.shape[1] - 1)
    found = chances.gather(1, place)
    rest = (wanted - (below.gather(1, place) - found)) / found
    return place, rest.nan_to_num(nan=0.0).clamp_(0.0, 1.0)
