"""The smallest saliencies, until what they cost is an amount: found by counting.

The threshold up to which saliencies are marked is found by counting, not by sorting: the bits of a
float, read as an integer, order as the float does, so a histogram of their leading 16 bits tells in
which of 65,536 bins the threshold lies, and further ones refine it (2 passes for float32, 4 for
float64).  Where weights differ in what they cost, each is counted as often as that.  Each pass is
linear in the number of weights, takes one layer at a time in chunks, never joins the layers, and
counts integers, so the answer is the same on every device.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
_CHUNK = 1 << 24
_INTEGER = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64)}


def select_smallest(
    saliencies: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    amount: int,
    costs: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Mark the kept weights of smallest saliency, over all parameters together.

    Args:
        saliencies: by parameter name, floating, without NaN; compared in the widest dtype given.
        kept: by parameter name, bool: the weights that may still be removed.
        amount: how much to mark: so many weights, or so much of what they cost.
        costs: c ≥ 0, what each weight of a parameter costs, by name; 1 each if not given.

    Returns:
        By parameter name, bool: the fewest smallest entries that cost at least ``amount``; without
        the last of them they would cost less.  Where all cost 1, exactly ``amount`` are True.
        Equal saliencies are marked by position: first parameter first, then in row-major order.

    >>> s = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
    >>> everything = {"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)}
    >>> select_smallest(s, everything, 1)
    {'a': tensor([False,  True]), 'b': tensor([False, False])}
    >>> select_smallest(s, everything, 6, {"a": 5, "b": 1})
    {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    costs = costs or dict.fromkeys(saliencies, 1)
    available = sum(costs[name] * int(kept[name].sum()) for name in saliencies)
    if not 0 <= amount <= available:
        raise ValueError(
            f"amount must be between 0 and the {available} that the kept weights cost, got {amount}"
        )
    if amount == 0:
        return {name: torch.zeros_like(kept[name]) for name in saliencies}
    dtype = torch.float32
    for saliency in saliencies.values():
        dtype = torch.promote_types(dtype, saliency.dtype)
    threshold, missing = _find_threshold(saliencies, kept, amount, costs, dtype)
    marked = {}
    for name, saliency in saliencies.items():
        keys = _ordered_integers(saliency, dtype)
        mark = (keys < threshold) & kept[name]
        if missing > 0:
            tied = ((keys == threshold) & kept[name]).flatten().nonzero().flatten()
            if costs[name] > 0:  # else all of them cost nothing
                tied = tied[: -(-missing // costs[name])]
            mark.view(-1)[tied] = True
            missing -= costs[name] * len(tied)
        marked[name] = mark
    return marked


def _ordered_integers(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers that order as the floats do."""
    integer, bits = _INTEGER[dtype]
    keys = (values.to(dtype) + 0.0).contiguous().view(integer)  # + 0 turns −0 into +0
    # A negative float's magnitude bits order backwards: flip them, leave the sign.
    return torch.where(keys < 0, keys ^ ((1 << (bits - 1)) - 1), keys)


def _find_threshold(
    saliencies: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    amount: int,
    costs: Mapping[str, int],
    dtype: torch.dtype,
) -> tuple[int, int]:
    """Return the key at which the amount is reached, and how much of it that very key is to cost.

    All smaller keys cost less than the amount, and with those of this key at least as much.
    """
    prefix, missing = None, amount
    for shift in range(_INTEGER[dtype][1] - _DIGIT_BITS, -1, -_DIGIT_BITS):
        below = _histogram(saliencies, kept, costs, dtype, prefix, shift).cumsum(0)
        digit = int(torch.searchsorted(below, missing))
        missing -= int(below[digit - 1]) if digit > 0 else 0
        prefix = digit - _DIGITS // 2 if prefix is None else (prefix << _DIGIT_BITS) | digit
    assert prefix is not None
    return prefix, missing


def _histogram(
    saliencies: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    costs: Mapping[str, int],
    dtype: torch.dtype,
    prefix: int | None,
    shift: int,
) -> Tensor:
    """Sum the costs of kept weights by their digit at ``shift``, of those before it ``prefix``.

    None: there are none before it.  This leading digit has the sign, the others are plain bits.
    """
    total = torch.zeros(_DIGITS, dtype=torch.int64)
    for name, saliency in saliencies.items():
        flat, alive = saliency.reshape(-1), kept[name].reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            keys = _ordered_integers(flat[chunk][alive[chunk]], dtype)
            if prefix is None:
                digits = (keys >> shift) + _DIGITS // 2
            else:
                keys = keys[(keys >> (shift + _DIGIT_BITS)) == prefix]
                digits = (keys >> shift) & (_DIGITS - 1)
            if digits.numel():
                total += costs[name] * torch.bincount(digits, minlength=_DIGITS).cpu()
    return total
