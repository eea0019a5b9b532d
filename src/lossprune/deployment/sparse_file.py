"""A pruned network in a small file: the surviving values, and where they are.

The file is safetensors.  For every tensor of the network's state dict that the mask covers it holds
``values:NAME``, the kept weights in row-major order, and ``kept:NAME``, their positions (see
``positions.py``); every other tensor is there as it is, as ``dense:NAME``.  A tensor that the
network uses under several names is stored once.  The metadata describe each tensor, with a CRC-32
of its bytes, and carry one of the header itself: a changed byte is noticed, wherever it is.
"""

import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.deployment.positions import encode
from lossprune.deployment.sparse_header import kind_of, unstorable
from lossprune.files import check_folder_of, write_whole
from lossprune.pruning.canonical import in_order
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.names import listed, look_up
from lossprune.pruning.wholeness import check_whole
from lossprune.pruning.wrappers import unwrapped

FORMAT = "lossprune sparse network 1"
VALUES = ("exact", "float16")

UNSIGNED = "00000000"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save_sparse(model: nn.Module, mask: Mask, path: str | Path, *, values: str = "exact") -> None:
    """Write ``model`` with the weights that ``mask`` removes left out.

    What is stored is the network with the mask applied, whatever its removed weights are now;
    ``model`` itself is not changed.  Kept weights, biases, normalisation and buffers come back
    bit for bit.  The same network and mask give the same file.  A file that is there is replaced as
    a whole.

    Args:
        model: any network; see :func:`lossprune.load_sparse` for how to get it back.
        mask: of weights of ``model``.
        path: of the file, such as ``"network.safetensors"``.
        values: ``"exact"``, or ``"float16"`` to round the kept weights to half precision (a
            relative error of at most 2⁻¹¹ above 6.1e-5, an absolute one of at most 3e-8 below);
            what the mask does not cover stays exact, and so do integers and kept weights of 16
            bits or fewer.  A warning says how many of them became 0.

    Raises:
        ValueError: ``values`` is neither.
        PruningError: the mask is not one of this network; values that float16 cannot hold; a
            state dict that holds something else than plain tensors of types that safetensors has:
            complex128, quantised, sparse and nested ones are not.  The tensor is named.
        FileNotFoundError: the folder to write into does not exist.

    >>> import tempfile
    >>> from lossprune import load_sparse
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
    check_folder_of(path)
    model = unwrapped(model)
    state, same = tensors_of(model)
    kept = _kept_of(model, mask, state, same)
    stored: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    zeros: dict[str, int] = {}
    for name, tensor in state.items():
        if name in same:
            described[name] = {"same": same[name]}
            continue
        parts: dict[str, Any] = {"dtype": kind_of(tensor), "shape": list(tensor.shape)}
        if name in kept:
            where, flags = kept[name]
            positions = encode(flags.flatten().numpy())
            survivors = bits_of(tensor.cpu())[flags].view(tensor.dtype)
            if values == "float16" and tensor.is_complex():
                raise PruningError(
                    f'{name!r} is complex, which float16 is not: save it with values="exact"'
                )
            if values == "float16" and tensor.is_floating_point() and tensor.itemsize > 2:
                exact, survivors = survivors, _halved(name, survivors)
                zeros[name] = int(((survivors == 0) & (exact != 0)).sum())
            stored[f"values:{name}"] = survivors
            stored[f"kept:{name}"] = torch.from_numpy(positions.code)
            parts |= {
                "mask": where,
                "stored": kind_of(survivors),
                "marked": positions.marked,
                "k": positions.k,
                "removed": positions.removed,
                "values": crc_of(survivors),
                "kept": crc_of(stored[f"kept:{name}"]),
            }
        else:
            stored[f"dense:{name}"] = tensor.cpu().contiguous().clone()
            parts["dense"] = crc_of(stored[f"dense:{name}"])
        described[name] = parts
    write_whole(path, _signed(stored, described, mask))
    _tell_of_zeros(zeros, mask.total - mask.removed)


def is_sparse_file(path: str | Path) -> bool:
    """Whether the file says that it is one of :func:`save_sparse`; nothing else is checked."""
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return FORMAT.encode() in file.read(min(size, 1 << 26))


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict, and for each further name of a tensor its first."""
    check_whole(model)
    state: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if problem := unstorable(tensor):
            raise PruningError(
                f"{name!r} of {type(model).__name__} cannot be stored: a plain tensor is needed, "
                f"{problem}"
            )
        tensor = tensor.detach().resolve_conj().resolve_neg()
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
    for given, name in look_up(mask, state).items():
        if name is None:
            raise PruningError(f"the mask names {given!r}, which {type(model).__name__} lacks")
        flags = mask[given]
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


def _tell_of_zeros(zeros: Mapping[str, int], kept: int) -> None:
    """Say how many kept weights float16 could not tell from 0, and where."""
    where = [f"{count:,} of {name!r}" for name, count in zeros.items() if count]
    if where:
        warnings.warn(
            f"{sum(zeros.values()):,} of {kept:,} kept weights are 0 in float16, as they are "
            f"below 3e-8: {listed(where)}",
            stacklevel=3,
        )


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor as integers of its size: not every type can be indexed."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def crc_of(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, in hexadecimal."""
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
        "header_crc32": UNSIGNED,
    }
    try:
        file = in_order(save(stored, metadata))
    except KeyError as error:  # an older safetensors lacks some types
        raise PruningError(f"{error} cannot be stored by the safetensors installed here") from None
    end = 8 + int.from_bytes(file[:8], "little")
    signature = f"{zlib.crc32(file[:end]):08x}"
    return with_signature(file[:end], UNSIGNED, signature) + file[end:]


def with_signature(header: bytes, old: str, new: str) -> bytes:
    """Return the header with another checksum of itself."""
    return header.replace(f'"header_crc32":"{old}"'.encode(), f'"header_crc32":"{new}"'.encode(), 1)
