"""Floating-point numbers whose exponents are told in close to as few bits as they can be.

The kept weights of a tensor are of few magnitudes: of the 9 bits that are the exponent of a float32
and the first bit of its mantissa, their *head*, the entropy is one to three bits.  The other bits,
sign and rest of the mantissa, are as good as random and stay as they are.

Heads are told one after the other, the commonest first: which numbers have this head, of those
whose head is not told yet.  Each is a set of positions, coded as those of the kept weights are (see
``positions.py``).  By the chain rule the entropies of these sets add up to that of the heads; the
code takes about 3 % more.  Where too few heads are left for that, they are there as they are.

The bytes of the code: the number of sets, then of each its head, how many positions are told, k
with 128 added where they are those that do not have it, and the bytes of its code; the codes; the
heads that are left, two bytes each.  All numbers are little-endian.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lossprune.deployment.positions import Bits, Positions, decode, encode

# Bits of the exponent, by the type's name.
EXPONENTS = {"float64": 11, "float32": 8, "float16": 5, "bfloat16": 8}

Words = np.ndarray[Any, np.dtype[Any]]  # unsigned

_RAW = 2  # bytes of a head as it is
_MOST_SETS = 255
_SET = np.dtype([("head", "<u2"), ("marked", "<u4"), ("k", "u1"), ("bytes", "<u4")])
_OTHERS = 128


@dataclass(frozen=True)
class Split:
    """Numbers as their coded heads, and all other bits.

    Attributes:
        code: of the heads.
        rest: of each number the low bytes of what is left of it, then the bits above these, packed.
    """

    code: Bits
    rest: Bits


def split(words: Words, kind: str) -> Split:
    """Split numbers, given as unsigned words, of a type in :data:`EXPONENTS`.

    >>> words = np.linspace(0.5, 1, 1000, dtype=np.float32).view(np.uint32)
    >>> parts = split(words, "float32")
    >>> len(parts.code) + len(parts.rest), words.nbytes
    (2965, 4000)
    >>> bool((joined(parts, 1000, "float32") == words).all())
    True
    """
    low, width = _low(kind), _width(kind)
    heads = (words << 1 >> (low + 1)).astype(np.uint16)
    rest = (words & ((1 << low) - 1)) | (words >> (8 * words.itemsize - 1) << low)
    whole = width // 8
    low_bytes = rest.astype(words.dtype.newbyteorder("<")).view(np.uint8)
    low_bytes = low_bytes.reshape(len(words), words.itemsize)[:, :whole]
    above = (rest[:, None] >> np.arange(8 * whole, width, dtype=words.dtype)) & 1
    packed = np.packbits(above.astype(np.bool_))
    return Split(_encoded(heads), np.concatenate([low_bytes.flatten(), packed]))


def joined(parts: Split, count: int, kind: str) -> Words:
    """Return the numbers, as unsigned words.

    Raises:
        ValueError: the code is not one of so many heads of this type.
    """
    low, width = _low(kind), _width(kind)
    size = (low + EXPONENTS[kind] + 2) // 8
    whole = width // 8
    words = np.zeros((count, size), np.uint8)
    words[:, :whole] = parts.rest[: count * whole].reshape(count, whole)
    rest = words.view(f"<u{size}").flatten().astype(f"u{size}")
    above = np.unpackbits(parts.rest[count * whole :], count=count * (width % 8))
    for place, bits in enumerate(above.reshape(count, width % 8).T):
        rest |= bits.astype(rest.dtype) << (8 * whole + place)
    heads = _decoded(parts.code, count, EXPONENTS[kind] + 1).astype(rest.dtype)
    sign = rest >> low << (8 * size - 1)
    return sign | heads << low | (rest & ((1 << low) - 1))


def rest_bytes(count: int, kind: str) -> int:
    """Return the bytes of the rest of so many numbers."""
    width = _width(kind)
    return count * (width // 8) + (count * (width % 8) + 7) // 8


def _low(kind: str) -> int:
    """How many bits lie below the head."""
    size = {"float64": 64, "float32": 32}.get(kind, 16)
    return size - 2 - EXPONENTS[kind]


def _width(kind: str) -> int:
    """How many bits there are beside the head: those below, and the sign."""
    return _low(kind) + 1


def _encoded(heads: Words) -> Bits:
    values, counts = np.unique(heads, return_counts=True)
    sets, codes, left = [], [], heads
    for place in np.lexsort((values, -counts))[:_MOST_SETS]:
        told = left == (head := values[place])
        found = encode(told)
        if _SET.itemsize + len(found.code) >= _RAW * counts[place]:
            break
        k = found.k + _OTHERS * found.removed
        sets.append((head, found.marked, k, len(found.code)))
        codes.append(found.code)
        left = left[~told]
    table = np.array(sets, _SET).view(np.uint8)
    number = np.array([len(sets)], np.uint8)
    return np.concatenate([number, table, *codes, left.astype("<u2").view(np.uint8)])


def _decoded(code: Bits, count: int, bits: int) -> Words:
    place = 1 + (int(code[0]) if len(code) else 0) * _SET.itemsize
    if len(code) < place:
        raise ValueError("its exponents are cut off")
    heads = np.zeros(count, np.uint16)
    left = np.arange(count)
    for head, marked, k, size in code[1:place].copy().view(_SET).tolist():
        part = code[place : place + size]
        if len(part) < size:
            raise ValueError("its exponents are cut off")
        told = decode(Positions(part, marked, k % _OTHERS, k >= _OTHERS), len(left))
        heads[left[told]] = head
        left = left[~told]
        place += size
    if len(code) - place != _RAW * len(left):
        raise ValueError(f"{len(code) - place} bytes are left for {len(left)} exponents")
    heads[left] = code[place:].copy().view("<u2")
    if count and int(heads.max()) >> bits:
        raise ValueError(f"an exponent is beyond {bits} bits")
    return heads
