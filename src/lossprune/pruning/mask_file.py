"""Masks in files: safetensors with one bit a weight, and a digest of all of it.

The same contents are the same file, and another file is noticed.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossprune.json_text import parse_json
from lossprune.pruning.errors import PruningError

_FORMAT = "lossprune mask 1"
_METADATA = {"format", "shapes", "sparsity", "criterion"}  # and, but in old files, "sha256"
UNSIGNED = "0" * 64  # what "sha256" is in the file whose digest is put there


def mask_bytes(kept: Mapping[str, Tensor], sparsity: float, criterion: str | None) -> bytes:
    """Return the file of a mask; the same mask is the same file."""
    from safetensors.numpy import save

    packed = {name: np.packbits(where.cpu().numpy()) for name, where in kept.items()}
    metadata = {
        "format": _FORMAT,
        "shapes": json.dumps({name: list(where.shape) for name, where in kept.items()}),
        "sparsity": repr(sparsity),
        "criterion": criterion or "",
        "sha256": UNSIGNED,
    }
    return signed(save(packed, metadata))


def read_mask(contents: bytes, path: str | Path) -> tuple[dict[str, Tensor], str, str | None]:
    """Return what is kept, the sparsity as it is written, and the criterion.

    Nothing is allocated that is larger than eight times the file.

    Raises:
        PruningError: it is not a mask, is damaged, or its contents contradict each other.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        header, metadata = header_in(contents)
    except ValueError as error:
        raise PruningError(f"{path} is not a readable safetensors file: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise PruningError(f"{path} is a safetensors file, but not a mask of lossprune")
    try:
        _check_digest(contents, metadata)
        shapes = _shapes(metadata["shapes"])
        for name, said in header.items():
            if name not in shapes or said["dtype"] != "U8":
                raise ValueError(f"{name!r} holds no bits of it")
        packed = load(contents)
        kept = {name: _unpack(name, packed.get(name), shape) for name, shape in shapes.items()}
    except (SafetensorError, ValueError) as error:
        raise PruningError(f"{path} is a mask, but damaged: {error}") from None
    return kept, metadata["sparsity"], metadata["criterion"] or None


def _check_digest(contents: bytes, metadata: Mapping[str, str]) -> None:
    if metadata.keys() - {"sha256"} != _METADATA:
        raise ValueError(f"its metadata must be {', '.join(sorted(_METADATA))}")
    if "sha256" in metadata:
        check_signed(contents, metadata)


def _shapes(text: str) -> dict[str, list[int]]:
    shapes = parse_json(text)
    if not isinstance(shapes, dict):
        raise ValueError("its shapes are not an object")
    for name, shape in shapes.items():
        check_shape(name, shape)
    return shapes


def check_shape(name: str, shape: Any) -> None:
    """Raise ValueError unless ``shape``, read from a file, is one that a tensor can have."""
    sizes = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int for n in shape)
    if not sizes or min(shape, default=0) < 0 or math.prod(max(n, 1) for n in shape) >= 2**62:
        raise ValueError(f"{name!r} has no shape of a tensor: {str(shape)[:40]}")


def _unpack(name: str, packed: "np.ndarray[Any, Any] | None", shape: list[int]) -> Tensor:
    size = math.prod(shape)
    if packed is None or packed.shape != ((size + 7) // 8,):
        raise ValueError(f"the bits of {name!r} do not fit shape {shape}")
    bits = np.unpackbits(packed)
    if bits[size:].any():
        raise ValueError(f"more bits of {name!r} are set than shape {shape} has")
    return torch.from_numpy(bits[:size].astype(bool).reshape(shape))


def in_order(file: bytes) -> bytes:
    """Return the same safetensors file with its header in order, which else differs each time.

    The format is an eight-byte length, a JSON header of that length padded by spaces, and the data.
    """
    end = _end(file)
    header = json.dumps(json.loads(file[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header + file[end:]


def signed(file: bytes) -> bytes:
    """Return a safetensors file in order, with its SHA-256 where the metadata have ``UNSIGNED``."""
    file = in_order(file)
    return _with_digest(file, UNSIGNED, hashlib.sha256(file).hexdigest())


def check_signed(file: bytes, metadata: Mapping[str, str]) -> None:
    """Raise ValueError unless a file is as :func:`signed` returned it."""
    digest = metadata.get("sha256", "")
    if hashlib.sha256(_with_digest(file, digest, UNSIGNED)).hexdigest() != digest:
        raise ValueError("its contents are not those that were written")


def header_in(file: bytes) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return what the header of a safetensors file says of each tensor, and its metadata.

    Raises:
        ValueError: it is not such a header; whether the tensors are there is not looked at.
    """
    tensors = parse_json(file[8 : _end(file)])
    if not isinstance(tensors, dict):
        raise ValueError("its header is not an object")
    metadata = tensors.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise ValueError("its metadata are not texts by name")
    for name, said in tensors.items():
        if not isinstance(said, dict) or not isinstance(said.get("dtype"), str):
            raise ValueError(f"{name!r} has no type")
    return tensors, metadata


def _with_digest(file: bytes, old: str, new: str) -> bytes:
    """The same file with another SHA-256 in its metadata."""
    end = _end(file)
    # No other place can look like it: in a string of the metadata, quotes have a backslash.
    old, new = (f'"sha256":"{digest}"' for digest in (old, new))
    return file[:end].replace(old.encode(), new.encode(), 1) + file[end:]


def _end(file: bytes) -> int:
    """Where the header ends."""
    return 8 + int.from_bytes(file[:8], "little")
