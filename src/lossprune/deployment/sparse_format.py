"""The bytes of a sparse file: checksums of all that it holds, and what its header says, checked.

Nothing is made of a file before what it says of its tensors is found to fit them.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.deployment.exponents import EXPONENTS, rest_bytes
from lossprune.json_text import parse_json
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask_file import check_shape, header_in, in_order

NAME = "lossprune sparse network"
# The second has exponents told apart; a file without any is one of the first.
_FORMATS = f"{NAME} 1", f"{NAME} 2"

# What is said of each tensor, by name.
Descriptions = Mapping[str, Mapping[str, Any]]

_UNSIGNED = "00000000"
# As safetensors names them; there are none for complex128 and for quantised tensors.
_KINDS = {
    **{f"float{n}": f"F{n}" for n in (64, 32, 16)},
    **{f"int{n}": f"I{n}" for n in (64, 32, 16, 8)},
    **{f"uint{n}": f"U{n}" for n in (64, 32, 16, 8)},
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "bool": "BOOL",
}

_DENSE = {"dtype", "shape", "dense"}
_SPARSE = {"dtype", "shape", "mask", "stored", "marked", "k", "removed", "values", "kept"}
_CODED = _SPARSE - {"values"} | {"exponents", "rest"}
_PARTS = {
    "values": "kept weights",
    "exponents": "kept weights' exponents",
    "rest": "kept weights",
    "kept": "positions",
    "dense": "values",
}


def packed(stored: dict[str, Tensor], described: Descriptions, criterion: str | None) -> bytes:
    """Return the file; its header has a checksum of itself, as it is with zeros in that place.

    Raises:
        PruningError: the safetensors installed here lacks a type.
    """
    from safetensors.torch import save

    metadata = {
        "format": _FORMATS[any("exponents" in said for said in described.values())],
        "tensors": json.dumps(described, separators=(",", ":")),
        "criterion": criterion or "",
        "header_crc32": _UNSIGNED,
    }
    try:
        file = in_order(save(stored, metadata))
    except KeyError as error:  # an older safetensors lacks some types
        raise PruningError(f"{error} cannot be stored by the safetensors installed here") from None
    end = _end(file)
    signature = f"{zlib.crc32(file[:end]):08x}"
    return _with_signature(file[:end], _UNSIGNED, signature) + file[end:]


def unpacked(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor], str | None]:
    """Return descriptions, tensors and criterion of a file whose every byte is as it was written.

    Raises:
        PruningError: it is something else, damaged or contradicts itself; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    contents = path.read_bytes()
    try:
        header, metadata = header_in(contents)
    except ValueError as error:
        raise PruningError(f"{path} is truncated or not safetensors: {error}") from None
    if metadata.get("format") not in _FORMATS:
        raise PruningError(
            f"{path} is safetensors, but not a sparse network of lossprune (format "
            f"{str(metadata.get('format'))[:40]!r}, needed is {' or '.join(map(repr, _FORMATS))})"
        )
    end = _end(contents)
    signature = metadata.get("header_crc32", "")
    if f"{zlib.crc32(_with_signature(contents[:end], signature, _UNSIGNED)):08x}" != signature:
        raise PruningError(f"{path} is damaged: its header is not the one that was written")
    try:
        described = _descriptions(metadata.get("tensors", ""), header)
        stored = load(contents)
    except ValueError as error:
        raise PruningError(f"{path} contradicts itself: {error}") from None
    except SafetensorError as error:
        raise PruningError(f"{path} is truncated or not safetensors: {error}") from None
    for name, parts in described.items():
        for part, word in _PARTS.items():
            if part in parts and crc_of(stored[f"{part}:{name}"]) != parts[part]:
                raise PruningError(f"{path} is damaged: the {word} of {name!r} changed")
    return described, stored, metadata.get("criterion") or None


def kind_of(tensor: Tensor) -> str:
    """Return the name of a tensor's type, such as ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


def unstorable(tensor: Any) -> str | None:
    """Return why a value of a state dict cannot be stored, or None where it can."""
    if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, nn.Parameter):
        return f"it is a {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"its layout is {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_nested:
        return "it is nested"
    if kind_of(tensor) not in _KINDS:
        return f"it is {kind_of(tensor)}"
    return None


def crc_of(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, in hexadecimal."""
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data):08x}"


def _with_signature(header: bytes, old: str, new: str) -> bytes:
    """Return the header with another checksum of itself."""
    return header.replace(f'"header_crc32":"{old}"'.encode(), f'"header_crc32":"{new}"'.encode(), 1)


def _end(file: bytes) -> int:
    """Where the header of a safetensors file ends."""
    return 8 + int.from_bytes(file[:8], "little")


def _descriptions(text: str, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what is said of each tensor, where all of it fits the file's header, and all is said.

    Raises:
        ValueError: it does not; the message names the tensor.
    """
    described = parse_json(text)
    if not isinstance(described, dict):
        raise ValueError("it describes no tensors")
    parts_of_file: set[str] = set()
    masks: set[str] = set()
    whole: set[str] = set()
    for name, said in described.items():
        names = said.keys() if isinstance(said, dict) else None
        if names == {"same"}:
            if not isinstance(said["same"], str) or said["same"] not in whole:
                raise ValueError(f"{name!r} is said to be the same as none before it")
            continue
        if names not in (_DENSE, _SPARSE, _CODED):
            raise ValueError(f"{name!r} is not described as it should be")
        whole.add(name)
        parts_of_file |= {f"{part}:{name}" for part in _PARTS if part in said}
        _check_kind(name, said)
        if names == _DENSE:
            _check_stored(header, f"dense:{name}", _KINDS[said["dtype"]], said["shape"])
            continue
        _check_sparse(name, said, header)
        if said["mask"] in masks:
            raise ValueError(f"the mask has {said['mask']!r} twice")
        masks.add(said["mask"])
    if more := header.keys() - parts_of_file:
        raise ValueError(f"{min(more)!r} belongs to no tensor")
    return described


def _check_sparse(name: str, said: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    size, marked, removed = math.prod(said["shape"]), said["marked"], said["removed"]
    if said["stored"] not in (said["dtype"], "float16") or not isinstance(said["mask"], str):
        raise ValueError(f"{name!r} is not described as it should be")
    if type(marked) is not int or type(said["k"]) is not int or type(removed) is not bool:
        raise ValueError(f"the positions of {name!r} are not described as they should be")
    kept = size - marked if removed else marked
    if not 0 <= marked <= size:
        raise ValueError(f"{name!r} has {marked} positions among {size} weights")
    if "values" in said:
        _check_stored(header, f"values:{name}", _KINDS[said["stored"]], [kept])
    elif said["stored"] not in EXPONENTS:
        raise ValueError(f"{name!r} is {said['stored']}, which has no exponents")
    else:
        _check_code(header, f"exponents:{name}", f"{name!r} has no exponents")
        _check_stored(header, f"rest:{name}", "U8", [rest_bytes(kept, said["stored"])])
    _check_code(header, f"kept:{name}", f"{name!r} has no positions")


def _check_code(header: Mapping[str, Any], part: str, otherwise: str) -> None:
    found = header.get(part, {})
    shape = found.get("shape")
    if found.get("dtype") != "U8" or not isinstance(shape, list) or len(shape) != 1:
        raise ValueError(otherwise)


def _check_kind(name: str, said: Mapping[str, Any]) -> None:
    if not isinstance(said["dtype"], str) or said["dtype"] not in _KINDS:
        raise ValueError(f"{name!r} is of no type that can be stored: {str(said['dtype'])[:40]}")
    check_shape(name, said["shape"])


def _check_stored(header: Mapping[str, Any], part: str, kind: str, shape: list[int]) -> None:
    found = header.get(part, {})
    if (found.get("dtype"), found.get("shape")) != (kind, shape):
        raise ValueError(
            f"{part!r} should be {kind} of shape {shape}, it is "
            f"{found.get('dtype', 'missing')} {str(found.get('shape', ''))[:40]}".rstrip()
        )
