"""What a sparse file says of its tensors: checked before anything is made of it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.json_text import parse_json
from lossprune.pruning.mask_file import check_shape

# As safetensors names them; there are none for complex128 and for quantised tensors.
KINDS = {
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
    if kind_of(tensor) not in KINDS:
        return f"it is {kind_of(tensor)}"
    return None


def read_descriptions(text: str, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
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
        whole.add(name)
        if names == _DENSE:
            parts_of_file.add(f"dense:{name}")
            _check_dense(name, said, header)
        elif names == _SPARSE:
            parts_of_file |= {f"values:{name}", f"kept:{name}"}
            _check_sparse(name, said, header)
            if said["mask"] in masks:
                raise ValueError(f"the mask has {said['mask']!r} twice")
            masks.add(said["mask"])
        else:
            raise ValueError(f"{name!r} is not described as it should be")
    if more := header.keys() - parts_of_file:
        raise ValueError(f"{min(more)!r} belongs to no tensor")
    return described


def _check_dense(name: str, said: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    _check_kind(name, said)
    _check_stored(header, f"dense:{name}", KINDS[said["dtype"]], said["shape"])


def _check_sparse(name: str, said: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    _check_kind(name, said)
    size, marked, removed = math.prod(said["shape"]), said["marked"], said["removed"]
    if said["stored"] not in (said["dtype"], "float16") or not isinstance(said["mask"], str):
        raise ValueError(f"{name!r} is not described as it should be")
    if type(marked) is not int or type(said["k"]) is not int or type(removed) is not bool:
        raise ValueError(f"the positions of {name!r} are not described as they should be")
    kept = size - marked if removed else marked
    if not 0 <= marked <= size:
        raise ValueError(f"{name!r} has {marked} positions among {size} weights")
    _check_stored(header, f"values:{name}", KINDS[said["stored"]], [kept])
    positions = header.get(f"kept:{name}", {})
    shape = positions.get("shape")
    if positions.get("dtype") != "U8" or not isinstance(shape, list) or len(shape) != 1:
        raise ValueError(f"{name!r} has no positions")


def _check_kind(name: str, said: Mapping[str, Any]) -> None:
    if not isinstance(said["dtype"], str) or said["dtype"] not in KINDS:
        raise ValueError(f"{name!r} is of no type that can be stored: {str(said['dtype'])[:40]}")
    check_shape(name, said["shape"])


def _check_stored(header: Mapping[str, Any], part: str, kind: str, shape: list[int]) -> None:
    found = header.get(part, {})
    if (found.get("dtype"), found.get("shape")) != (kind, shape):
        raise ValueError(
            f"{part!r} should be {kind} of shape {shape}, it is "
            f"{found.get('dtype', 'missing')} {str(found.get('shape', ''))[:40]}".rstrip()
        )
