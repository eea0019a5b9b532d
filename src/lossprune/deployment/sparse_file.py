"""A pruned network in a small file: the surviving values, and where they are.

The file is safetensors.  For every tensor of the network's state dict that the mask covers it holds
``values:NAME``, the kept weights in row-major order, and ``kept:NAME``, their positions (see
``positions.py``); every other tensor is there as it is, as ``dense:NAME``.  A tensor that the
network uses under several names is stored once.  The metadata describe each tensor, with a CRC-32
of its bytes, and carry one of the header itself: a changed byte is noticed, wherever it is.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.deployment.positions import Positions, decode, encode
from lossprune.pruning.canonical import in_order
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.wholeness import check_whole

FORMAT = "lossprune sparse network 1"
VALUES = ("exact", "float16")

_UNSIGNED = "00000000"
_LISTED = 8


def save_sparse(model: nn.Module, mask: Mask, path: str | Path, *, values: str = "exact") -> None:
    """Write ``model`` with the weights that ``mask`` removes left out.

    What is stored is the network with the mask applied, whatever its removed weights are now;
    ``model`` itself is not changed.  Kept weights, biases, normalisation and buffers come back
    bit for bit.  The same network and mask give the same file.  A file that is there is replaced as
    a whole.

    Args:
        model: any network; see :func:`load_sparse` for how to get it back.
        mask: of weights of ``model``.
        path: of the file, such as ``"network.safetensors"``.
        values: ``"exact"``, or ``"float16"`` to round the kept weights to half precision (a
            relative error of at most 2⁻¹¹ above 6.1e-5, an absolute one of at most 3e-8 below);
            what the mask does not cover stays exact.

    Raises:
        ValueError: ``values`` is neither.
        PruningError: the mask is not one of this network; a value that float16 cannot hold; a
            state dict that holds something else than tensors.  The tensor is named.
        FileNotFoundError: the folder to write into does not exist.

    >>> import tempfile
    >>> network = nn.Linear(100, 10)
    >>> mask = Mask({"weight": torch.rand(10, 100) < 0.05})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_sparse(network, mask, Path(folder) / "small.safetensors")
    ...     other = nn.Linear(100, 10)
    ...     load_sparse(Path(folder) / "small.safetensors", other) == mask
    True
    >>> torch.equal(other.weight, network.weight * mask["weight"])
    True
    """
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(VALUES)}, got {values!r}")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: its folder does not exist")
    state, same = _tensors(model)
    kept = _kept_of(model, mask, state, same)
    stored: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        if name in same:
            described[name] = {"same": same[name]}
            continue
        parts: dict[str, Any] = {"dtype": _kind(tensor), "shape": list(tensor.shape)}
        if name in kept:
            where, flags = kept[name]
            positions = encode(flags.flatten().numpy())
            survivors = tensor.detach().cpu()[flags]
            if values == "float16":
                survivors = _halved(name, survivors)
            stored[f"values:{name}"] = survivors
            stored[f"kept:{name}"] = torch.from_numpy(positions.code)
            parts |= {
                "mask": where,
                "stored": _kind(survivors),
                "marked": positions.marked,
                "k": positions.k,
                "removed": positions.removed,
                "values": _crc(survivors),
                "kept": _crc(stored[f"kept:{name}"]),
            }
        else:
            stored[f"dense:{name}"] = tensor.detach().cpu().contiguous().clone()
            parts["dense"] = _crc(stored[f"dense:{name}"])
        described[name] = parts
    _write(path, _signed(stored, described, mask))


def load_sparse(path: str | Path, model: nn.Module) -> Mask:
    """Load a network that :func:`save_sparse` wrote into ``model``, in place; return its mask.

    ``model`` has the architecture of the one that was saved; its tensors keep their devices.  It is
    changed only when the whole file is found good.

    Raises:
        FileNotFoundError: there is no such file.
        PruningError: the file is something else, damaged, or of another network; the message names
            the file and the tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no sparse network at {path}")
    described, stored, criterion = _read(path)
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
    problems = _mismatches(model, state)
    if problems:
        told = "; ".join(problems[:_LISTED])
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise PruningError(f"{path} does not hold this {type(model).__name__}: {told}{more}")
    model.load_state_dict(state)
    return Mask(kept, criterion=criterion)


def is_sparse_file(path: str | Path) -> bool:
    """Whether the file says that it is one of :func:`save_sparse`; nothing else is checked."""
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return FORMAT.encode() in file.read(min(size, 1 << 26))


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict, and for each further name of a tensor its first."""
    check_whole(model)
    state: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise PruningError(
                f"{name!r} of {type(model).__name__} cannot be stored: a plain tensor is needed, "
                f"it is {type(tensor).__name__}"
            )
        state[name] = tensor
        if tensor.numel():
            key = (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())
            if first.setdefault(key, name) != name:
                same[name] = first[key]
    return state, same


def _kept_of(
    model: nn.Module, mask: Mask, state: Mapping[str, Tensor], same: Mapping[str, str]
) -> dict[str, tuple[str, Tensor]]:
    """For each name that is stored: the mask's name for it, and which weights are kept."""
    kept: dict[str, tuple[str, Tensor]] = {}
    for name, flags in mask.items():
        if name not in state:
            raise PruningError(f"the mask names {name!r}, which {type(model).__name__} lacks")
        if state[name].shape != flags.shape:
            raise PruningError(
                f"the mask of {name!r} has shape {tuple(flags.shape)}, "
                f"the parameter {tuple(state[name].shape)}"
            )
        stored = same.get(name, name)
        if stored in kept:
            raise PruningError(f"the mask names one weight twice: {kept[stored][0]!r} and {name!r}")
        kept[stored] = (name, flags.cpu())
    return kept


def _halved(name: str, survivors: Tensor) -> Tensor:
    half = survivors.to(torch.float16)
    lost = (half.isinf() & survivors.isfinite()).nonzero()
    if len(lost):
        raise PruningError(
            f"{name!r} holds {float(survivors[lost[0, 0]]):g}, beyond the 65504 of float16: "
            'save it with values="exact"'
        )
    return half


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _crc(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data):08x}"


def _signed(
    stored: dict[str, Tensor], described: Mapping[str, Mapping[str, Any]], mask: Mask
) -> bytes:
    """The file: its header has a checksum of itself, as it is with zeros in that place."""
    from safetensors.torch import save

    metadata = {
        "format": FORMAT,
        "tensors": json.dumps(described, separators=(",", ":")),
        "criterion": mask.criterion or "",
        "header_crc32": _UNSIGNED,
    }
    file = in_order(save(stored, metadata))
    end = 8 + int.from_bytes(file[:8], "little")
    signature = f"{zlib.crc32(file[:end]):08x}"
    return _with_signature(file[:end], _UNSIGNED, signature) + file[end:]


def _with_signature(header: bytes, old: str, new: str) -> bytes:
    return header.replace(f'"header_crc32":"{old}"'.encode(), f'"header_crc32":"{new}"'.encode(), 1)


def _write(path: Path, contents: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(contents)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor], str | None]:
    """Descriptions, tensors and criterion of a file whose every byte is as it was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    contents = path.read_bytes()
    end = 8 + int.from_bytes(contents[:8], "little")
    try:
        stored = load(contents)
        metadata = json.loads(contents[8:end]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise PruningError(f"{path} is truncated or not safetensors: {error}") from None
    if metadata.get("format") != FORMAT:
        raise PruningError(
            f"{path} is safetensors, but not a sparse network of lossprune (format "
            f"{metadata.get('format')!r}, needed is {FORMAT!r})"
        )
    signature = metadata.get("header_crc32", "")
    header = _with_signature(contents[:end], signature, _UNSIGNED)
    if f"{zlib.crc32(header):08x}" != signature:
        raise PruningError(f"{path} is damaged: its header is not the one that was written")
    described: dict[str, dict[str, Any]] = json.loads(metadata["tensors"])
    for name, parts in described.items():
        for part in ("values", "kept", "dense"):
            if part in parts and _crc(stored[f"{part}:{name}"]) != parts[part]:
                raise PruningError(f"{path} is damaged: the {_WORDS[part]} of {name!r} changed")
    return described, stored, metadata["criterion"] or None


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
    try:
        kept = torch.from_numpy(decode(positions, math.prod(shape))).view(shape)
        weights = torch.zeros(shape, dtype=getattr(torch, parts["dtype"]))
        weights[kept] = values.to(weights.dtype)
    except (ValueError, RuntimeError, IndexError) as error:
        raise PruningError(f"{path} contradicts itself in {name!r}: {error}") from None
    return kept, weights


def _mismatches(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """All that keeps ``state`` from being one of ``model``."""
    expected, same = _tensors(model)
    problems = []
    for name in dict.fromkeys((*expected, *state)):
        if name not in state:
            problems.append(f"it lacks {name!r}")
        elif name not in expected:
            problems.append(f"it has {name!r}, which the network lacks")
        elif state[name].shape != expected[name].shape:
            problems.append(
                f"{name!r} has shape {tuple(state[name].shape)}, "
                f"the network {tuple(expected[name].shape)}"
            )
        elif state[name].dtype != expected[name].dtype:
            problems.append(
                f"{name!r} is {_kind(state[name])}, the network {_kind(expected[name])}"
            )
        elif name in same and same[name] in state and _differ(state[name], state[same[name]]):
            problems.append(
                f"{name!r} and {same[name]!r} differ, the network has one tensor for both"
            )
    return problems


def _differ(one: Tensor, other: Tensor) -> bool:
    return one is not other and (one.shape != other.shape or _crc(one) != _crc(other))
