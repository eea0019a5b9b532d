"""The kept weights of a tensor in a sparse file: rounded where asked, split, and put together."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossprune.deployment.exponents import EXPONENTS, Split, joined, split
from lossprune.deployment.sparse_format import kind_of
from lossprune.pruning.errors import PruningError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMES = 128  # bytes, about, that two tensors take more than one to be named and described


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor as integers of its size: not every type can be indexed."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def halved(name: str, survivors: Tensor) -> Tensor:
    """Kept weights in half precision; the same where they are of 16 bits or fewer, or integers."""
    if survivors.is_complex():
        raise PruningError(
            f'{name!r} is complex, which float16 is not: save it with values="exact"'
        )
    if not survivors.is_floating_point() or survivors.itemsize <= 2:
        return survivors
    half = survivors.to(torch.float16)
    lost = (half.isinf() & survivors.isfinite()).nonzero()
    if len(lost):
        raise PruningError(
            f"{name!r} holds {float(survivors[lost[0, 0]]):g}, beyond the 65504 of float16: "
            'save it with values="exact"'
        )
    return half


def parts_of(survivors: Tensor) -> dict[str, Tensor]:
    """Kept weights as they are, or as their exponents and the rest, where that takes less."""
    kind = kind_of(survivors)
    if kind in EXPONENTS:
        words = bits_of(survivors).numpy()
        found = split(words.view(f"u{words.itemsize}"), kind)
        if len(found.code) + len(found.rest) + _NAMES < words.nbytes:
            parts = {"exponents": found.code, "rest": found.rest}
            return {name: torch.from_numpy(part) for name, part in parts.items()}
    return {"values": survivors}


def survivors_of(name: str, parts: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    """The kept weights of one tensor.

    Raises:
        ValueError: its exponents are not those of so many weights.
    """
    if "values" in parts:
        return stored[f"values:{name}"]
    marked = parts["marked"]
    count = math.prod(parts["shape"]) - marked if parts["removed"] else marked
    found = Split(stored[f"exponents:{name}"].numpy(), stored[f"rest:{name}"].numpy())
    words = joined(found, count, parts["stored"])
    bits = torch.from_numpy(words.view(f"i{words.itemsize}"))
    return bits.view(getattr(torch, parts["stored"]))
