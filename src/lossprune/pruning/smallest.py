"""The smallest saliencies, until what they cost is an amount: found by counting.

The threshold up to which saliencies are marked is found by counting, not by sorting: the bits of a
float, read as an integer, order as the float does, so a histogram of their leading 16 bits tells in
which of 65,536 bins the threshold lies, and further ones refine it (2 passes for float32, 4 for
float64).  Where weights differ in what they cost, each is counted as often as that.  Each pass is
linear in the number of weights, takes one layer at a time in chunks that stay in the cache, never
joins the layers, and counts integers, so the answer is the same on every device.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
# Weights in a chunk: on a GPU, where each takes several launches, more than stay in a cache.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}
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
    available = sum(costs[name] * int(kept[name].count_nonzero()) for name in saliencies)
    if not 0 <= amount <= available:
        raise ValueError(
            f"amount must be between 0 and the {available} that the kept weights cost, got {amount}"
        )
    if amount == 0:
        return {name: torch.zeros_like(kept[name]) for name in saliencies}
    dtype = torch.float32
    for saliency in saliencies.values():
        dtype = torch.promote_types(dtype, saliency.dtype)
    threshold = _find_threshold(saliencies, kept, amount, costs, dtype)
    missing = threshold.missing
    # What costs nothing goes with others of its saliency only where some of these are missing.
    whole = missing == threshold.tied and all(costs.values())
    marked = {}
    for name, saliency in saliencies.items():
        values = saliency.to(dtype)
        if whole:
            marked[name] = (values <= threshold.value).logical_and_(kept[name])
            continue
        mark = ((values < threshold.value) & kept[name]).contiguous()
        if missing > 0:
            tied = ((values == threshold.value) & kept[name]).flatten().nonzero().flatten()
            if costs[name] > 0:  # else all of them cost nothing
                tied = tied[: -(-missing // costs[name])]
            mark.view(-1)[tied] = True
            missing -= costs[name] * len(tied)
        marked[name] = mark
    return marked


@dataclass(frozen=True)
class _Threshold:
    """The saliency at which an amount is reached.

    All smaller ones cost less than the amount, and with those of this value at least as much.

    Attributes:
        value: a number, of the type that saliencies are compared in.
        missing: how much of the amount those of this value are to cost.
        tied: what all of them cost.
    """

    value: float
    missing: int
    tied: int


def _find_threshold(
    saliencies: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    amount: int,
    costs: Mapping[str, int],
    dtype: torch.dtype,
) -> _Threshold:
    integer, bits = _INTEGER[dtype]
    first, missing, tied = -1 << (bits - 1), amount, 0  # the least key that it may be
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = _histogram(saliencies, kept, costs, dtype, first, shift)
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, missing))
        tied = int(counts[digit])
        missing -= int(below[digit]) - tied
        first += digit << shift
    value = _reflected(torch.tensor([first], dtype=integer)).view(dtype)
    return _Threshold(value.item(), missing, tied)


def _histogram(
    saliencies: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    costs: Mapping[str, int],
    dtype: torch.dtype,
    first: int,
    shift: int,
) -> Tensor:
    """Sum the costs of kept weights by their digit at ``shift``, of those whose key has one.

    These are the keys from ``first`` on, for so long as they differ from it by less than a digit.
    """
    total = torch.zeros(_DIGITS, dtype=torch.int64)
    last = first + (_DIGITS << shift) - 1
    least = torch.iinfo(_INTEGER[dtype][0])
    for name, saliency in saliencies.items():
        flat, alive = saliency.reshape(-1), kept[name].reshape(-1)
        size = _CHUNK.get(flat.device.type, _CHUNK["cuda"])
        counts = torch.zeros(_DIGITS + 2, dtype=torch.int64, device=flat.device)
        for start in range(0, flat.numel(), size):
            chunk = slice(start, start + size)
            # 1 to 65,536: a digit; 0: a key below, or a weight that is gone; else a key above.
            digits = _ordered_integers(flat[chunk], dtype)
            digits.clamp_(max(first - 1, least.min), min(last + 1, least.max))
            digits.bitwise_right_shift_(shift).sub_((first >> shift) - 1).mul_(alive[chunk])
            counts += torch.bincount(digits, minlength=_DIGITS + 2)
        total += costs[name] * counts[1:-1].cpu()
    return total


def _ordered_integers(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers that order as the floats do, in memory of their own."""
    integer, _ = _INTEGER[dtype]
    # + 0 turns −0 into +0
    return _reflected((values.to(dtype) + 0.0).contiguous().view(integer))


def _reflected(keys: Tensor) -> Tensor:
    """Bits of floats to integers that order as these do, and back; in place.

    A negative float's magnitude bits order backwards: they are flipped, and the sign is left.
    """
    signs = keys >> (torch.iinfo(keys.dtype).bits - 1)
    return keys.bitwise_xor_(signs.bitwise_and_(torch.iinfo(keys.dtype).max))
