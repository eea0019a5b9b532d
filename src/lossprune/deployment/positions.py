"""Which weights are kept, in close to as few bits as that can be told in.

The positions of n kept weights among N are the gaps g ≥ 0 before each.  At density p = n / N gaps
are about geometric, and the Rice code of parameter k tells one in k + 1 + ⌊g / 2ᵏ⌋ bits: the
quotient ⌊g / 2ᵏ⌋ as so many 0s and a 1, the remainder in k bits.  All quotients come first, then
all remainders, each in whole bytes.  At k = 0 the quotients are the mask itself, one bit a weight.
The k that takes least is chosen; the bound is N · H(p), H the binary entropy.

Where more is kept than removed, the positions of the removed weights are told instead.

Source: R. F. Rice, "Some practical universal noiseless coding techniques", JPL 79-22, 1979.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Bits = np.ndarray[Any, np.dtype[np.uint8]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Positions:
    """Coded positions of the kept weights.

    Attributes:
        code: the bytes.
        marked: how many positions are told.
        k: the parameter of the Rice code.
        removed: whether the positions told are those of the removed weights.
    """

    code: Bits
    marked: int
    k: int
    removed: bool


def encode(kept: Flags) -> Positions:
    """Code where the flat ``kept`` is true.

    >>> encode(np.arange(1000) % 100 == 0)
    Positions(code=array([...], dtype=uint8), marked=10, k=6, removed=False)
    """
    removed = bool(2 * np.count_nonzero(kept) > kept.size)
    where = np.flatnonzero(~kept if removed else kept)
    gaps = np.diff(where, prepend=-1) - 1
    k = min(range(32), key=lambda k: len(where) * (k + 1) + int((gaps >> k).sum()))
    quotients = np.zeros(int((gaps >> k).sum()) + len(where), dtype=np.bool_)
    quotients[np.cumsum((gaps >> k) + 1) - 1] = True
    remainders = (gaps[:, None] >> np.arange(k)[::-1]) & 1
    code = np.concatenate([np.packbits(quotients), np.packbits(remainders.astype(np.bool_))])
    return Positions(code, len(where), k, removed)


def decode(positions: Positions, size: int) -> Flags:
    """Return which of ``size`` weights are kept.

    Raises:
        ValueError: the code is not one of ``size`` weights.
    """
    count, k = positions.marked, positions.k
    if not (0 <= count <= size and 0 <= k <= size.bit_length()):
        raise ValueError(f"{count} positions among {size} weights, k = {k}")
    split = len(positions.code) - (count * k + 7) // 8
    if split < 0:
        raise ValueError(f"{len(positions.code)} bytes are too few for {count} positions")
    ends = np.flatnonzero(np.unpackbits(positions.code[:split]))
    if len(ends) != count:
        raise ValueError(f"it tells {len(ends)} positions, not {count}")
    told = int(ends[-1]) + 1 if count else 0  # bits of all quotients
    bits = np.unpackbits(positions.code[split:])
    if split != (told + 7) // 8 or bits[count * k :].any():
        raise ValueError(f"it holds more than {count} positions")
    if (told - count) << k > size:
        raise ValueError(f"it tells positions beyond {size} weights")
    bits = bits[: count * k].reshape(count, k)
    remainders = bits.astype(np.int64) @ (1 << np.arange(k, dtype=np.int64)[::-1])
    gaps = ((np.diff(ends, prepend=-1) - 1) << k) + remainders
    where = np.cumsum(gaps + 1) - 1
    if count and where[-1] >= size:
        raise ValueError(f"it tells position {where[-1]} of {size} weights")
    kept = np.full(size, positions.removed)
    kept[where] = not positions.removed
    return kept
