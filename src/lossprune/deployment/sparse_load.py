"""Loading what :func:`lossprune.save_sparse` wrote: all of it, or nothing."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.deployment.positions import Positions, decode
from lossprune.deployment.sparse_file import (
    FORMAT,
    UNSIGNED,
    bits_of,
    crc_of,
    tensors_of,
    with_signature,
)
from lossprune.deployment.sparse_header import kind_of, read_descriptions
from lossprune.pruning.canonical import header_in
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.wrappers import unwrapped

_LISTED = 8


def load_sparse(path: str | Path, model: nn.Module) -> Mask:
    """Load what :func:`lossprune.save_sparse` wrote into ``model``, in place; return its mask.

    ``model`` has the architecture of the one that was saved; its tensors keep their devices.  It is
    changed only when the whole file is found good.

    Raises:
        FileNotFoundError: there is no such file.
        PruningError: the file is something else, damaged, or of another network; the message names
            the file and the tensors.
    """
    model = unwrapped(model)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no sparse network at {path}")
    described, stored, criterion = _read(path)
    _check(path, model, _mismatches(model, described))
    state: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for name, parts in described.items():
        if "same" in parts:
            state[name] = state[parts["same"]]
        elif "dense" in parts:
            state[name] = stored[f"dense:{name}"]
        else:
            flags, state[name] = _scattered(path, name, parts, stored)
            kept[parts["mask"]] = flags
    _check(path, model, _apart(model, state))
    model.load_state_dict(state)
    return Mask(kept, criterion=criterion)


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor], str | None]:
    """Descriptions, tensors and criterion of a file whose every byte is as it was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    contents = path.read_bytes()
    try:
        header, metadata = header_in(contents)
    except ValueError as error:
        raise PruningError(f"{path} is truncated or not safetensors: {error}") from None
    if metadata.get("format") != FORMAT:
        raise PruningError(
            f"{path} is safetensors, but not a sparse network of lossprune (format "
            f"{str(metadata.get('format'))[:40]!r}, needed is {FORMAT!r})"
        )
    end = 8 + int.from_bytes(contents[:8], "little")
    signature = metadata.get("header_crc32", "")
    if f"{zlib.crc32(with_signature(contents[:end], signature, UNSIGNED)):08x}" != signature:
        raise PruningError(f"{path} is damaged: its header is not the one that was written")
    try:
        described = read_descriptions(metadata.get("tensors", ""), header)
        stored = load(contents)
    except ValueError as error:
        raise PruningError(f"{path} contradicts itself: {error}") from None
    except SafetensorError as error:
        raise PruningError(f"{path} is truncated or not safetensors: {error}") from None
    for name, parts in described.items():
        for part in ("values", "kept", "dense"):
            if part in parts and crc_of(stored[f"{part}:{name}"]) != parts[part]:
                raise PruningError(f"{path} is damaged: the {_WORDS[part]} of {name!r} changed")
    return described, stored, metadata.get("criterion") or None


_WORDS = {"values": "kept weights", "kept": "positions", "dense": "values"}


def _scattered(
    path: Path, name: str, parts: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The mask and the weights of one tensor."""
    shape = parts["shape"]
    positions = Positions(
        stored[f"kept:{name}"].numpy(), parts["marked"], parts["k"], parts["removed"]
    )
    values = stored[f"values:{name}"]
    weights = torch.zeros(shape, dtype=getattr(torch, parts["dtype"]))
    try:
        kept = torch.from_numpy(decode(positions, weights.numel())).view(shape)
    except ValueError as error:
        raise PruningError(f"{path} contradicts itself in {name!r}: {error}") from None
    bits_of(weights)[kept] = bits_of(values.to(weights.dtype))
    return kept, weights


def _check(path: Path, model: nn.Module, problems: Sequence[str]) -> None:
    if problems:
        told = "; ".join(problems[:_LISTED])
        told += f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise PruningError(f"{path} does not hold this {type(model).__name__}: {told}")


def _mismatches(model: nn.Module, described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All that keeps the tensors of a file from being those of ``model``."""
    expected, _ = tensors_of(model)
    problems = []
    for name in dict.fromkeys((*expected, *described)):
        if name not in described:
            problems.append(f"it lacks {name!r}")
            continue
        said = described[described[name].get("same", name)]
        tensor = expected.get(name)
        if tensor is None:
            problems.append(f"it has {name!r}, which the network lacks")
        elif tuple(said["shape"]) != tensor.shape:
            shapes = f"{tuple(said['shape'])}, the network {tuple(tensor.shape)}"
            problems.append(f"{name!r} has shape {shapes}")
        elif said["dtype"] != kind_of(tensor):
            problems.append(f"{name!r} is {said['dtype']}, the network {kind_of(tensor)}")
        elif any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            problems.append(f"{name!r} of the network is expanded: it holds one number")
    return problems


def _apart(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Where the file has two tensors and ``model`` one."""
    _, same = tensors_of(model)
    return [
        f"{name!r} and {first!r} differ, the network has one tensor for both"
        for name, first in same.items()
        if state[name] is not state[first] and crc_of(state[name]) != crc_of(state[first])
    ]
