"""Which weights a stage removes: the smallest saliencies over all layers together, exactly counted.

The k-th smallest of N saliencies is found by counting, not by sorting: the bits of a float, read as
an integer, order as the float does, so a histogram of their leading 16 bits tells in which of
65,536 bins the k-th smallest lies, and further ones refine it (2 passes for float32, 4 for
float64).  Each pass is linear in N, takes one layer at a time in chunks, never joins the layers,
and counts integers, so the answer is the same on every device.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
_CHUNK = 1 << 24
_INTEGER = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64)}


def select_smallest(
    saliencies: Mapping[str, Tensor], kept: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """Mark the ``count`` kept weights of smallest saliency, over all parameters together.

    Args:
        saliencies: by parameter name, floating, without NaN; compared in the widest dtype given.
        kept: by parameter name, bool: the weights that may still be removed.
        count: how many to mark, at most the number kept.

    Returns:
        By parameter name, bool: exactly ``count`` entries are True.  Equal saliencies are marked
        by position: first parameter first, then in row-major order.

    >>> s = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
    >>> everything = {"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)}
    >>> select_smallest(s, everything, 1)
    {'a': tensor([False,  True]), 'b': tensor([False, False])}
    """
    available = sum(int(mask.sum()) for mask in kept.values())
    if not 0 <= count <= available:
        raise ValueError(f"count must be between 0 and the {available} kept weights, got {count}")
    if count == 0:
        return {name: torch.zeros_like(kept[name]) for name in saliencies}
    dtype = torch.float32
    for saliency in saliencies.values():
        dtype = torch.promote_types(dtype, saliency.dtype)
    threshold, ties = _find_threshold(saliencies, kept, count, dtype)
    marked = {}
    for name, saliency in saliencies.items():
        keys = _ordered_integers(saliency, dtype)
        mark = (keys < threshold) & kept[name]
        if ties > 0:
            tied = ((keys == threshold) & kept[name]).flatten().nonzero().flatten()[:ties]
            mark.view(-1)[tied] = True
            ties -= len(tied)
        marked[name] = mark
    return marked


def _ordered_integers(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers that order as the floats do."""
    integer, bits = _INTEGER[dtype]
    keys = (values.to(dtype) + 0.0).contiguous().view(integer)  # + 0 turns −0 into +0
    # A negative float's magnitude bits order backwards: flip them, leave the sign.
    return torch.where(keys < 0, keys ^ ((1 << (bits - 1)) - 1), keys)


def _find_threshold(
    saliencies: Mapping[str, Tensor], kept: Mapping[str, Tensor], count: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Return the key of the ``count``-th smallest, and how many of that very key to take."""
    bits = _INTEGER[dtype][1]
    prefix, rank = 0, count
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        leading = shift == bits - _DIGIT_BITS
        candidates = _candidates(saliencies, kept, dtype, None if leading else prefix, shift)
        # The leading digit carries the sign; the others are plain bits.
        histogram = _histogram(_digit(keys, shift, signed=leading) for keys in candidates)
        below = histogram.cumsum(0)
        digit = int(torch.searchsorted(below, rank))
        rank -= int(below[digit - 1]) if digit > 0 else 0
        prefix = digit - _DIGITS // 2 if leading else (prefix << _DIGIT_BITS) | digit
    return prefix, rank


def _candidates(
    saliencies: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    dtype: torch.dtype,
    prefix: int | None,
    shift: int,
) -> Iterator[Tensor]:
    """Keys of kept weights whose digits before this one are ``prefix``, a chunk at a time."""
    for name, saliency in saliencies.items():
        flat, alive = saliency.reshape(-1), kept[name].reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            keys = _ordered_integers(flat[chunk][alive[chunk]], dtype)
            if prefix is not None:
                keys = keys[(keys >> (shift + _DIGIT_BITS)) == prefix]
            yield keys


def _digit(keys: Tensor, shift: int, *, signed: bool) -> Tensor:
    digit = keys >> shift
    return digit + _DIGITS // 2 if signed else digit & (_DIGITS - 1)


def _histogram(digits: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(_DIGITS, dtype=torch.int64)
    for chunk in digits:
        if chunk.numel():
            total += torch.bincount(chunk, minlength=_DIGITS).cpu()
    return total
