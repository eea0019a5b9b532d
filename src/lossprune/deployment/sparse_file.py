"""A pruned network in a small file: the surviving values, and where they are.

The file is safetensors.  For every tensor of the network's state dict that the mask covers it holds
``values:NAME``, the kept weights in row-major order, or where that takes less ``exponents:NAME``
and ``rest:NAME`` (see ``exponents.py``), and ``kept:NAME``, their positions (see ``positions.py``);
every other tensor is there as it is, as ``dense:NAME``.  A tensor that the network uses under
several names is stored once.  The metadata describe each tensor, with a CRC-32 of its bytes, and
carry one of the header itself: a changed byte is noticed, wherever it is.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.deployment.positions import Positions, decode, encode
from lossprune.deployment.sparse_format import (
    NAME,
    crc_of,
    kind_of,
    packed,
    unpacked,
    unstorable,
)
from lossprune.deployment.sparse_values import bits_of, halved, parts_of, survivors_of
from lossprune.files import check_folder_of, write_whole
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.names import listed, look_up
from lossprune.pruning.wholeness import check_whole, unwrapped

VALUES = ("exact", "float16")

_LISTED = 8


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
    path = Path(path)
    check_folder_of(path)
    contents, zeros = sparse_bytes(model, mask, values)
    write_whole(path, contents)
    _tell_of_zeros(zeros, mask.total - mask.removed)


def sparse_bytes(
    model: nn.Module, mask: Mask, values: str, moved: Mapping[str, Tensor] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Return what :func:`save_sparse` writes, and how many kept weights became 0, by name.

    ``moved`` are tensors in the place of the network's own, by name; the rest is as there.

    Raises:
        ValueError, PruningError: as there.
    """
    check_values(values)
    model = unwrapped(model)
    state, same = _tensors_of(model)
    state |= {name: tensor.detach() for name, tensor in (moved or {}).items() if name in state}
    kept = _kept_of(model, mask, state, same)
    stored: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    zeros: dict[str, int] = {}
    for name, tensor in state.items():
        said: dict[str, Any] = {"dtype": kind_of(tensor), "shape": list(tensor.shape)}
        if name in same:
            said = {"same": same[name]}
        elif name in kept:
            where, flags = kept[name]
            exact = bits_of(tensor.cpu())[flags].view(tensor.dtype)
            survivors = halved(name, exact) if values == "float16" else exact
            if survivors is not exact:
                zeros[name] = int(((survivors == 0) & (exact != 0)).sum())
            positions = encode(flags.flatten().numpy())
            parts = {**parts_of(survivors), "kept": torch.from_numpy(positions.code)}
            said |= {"mask": where, "stored": kind_of(survivors), "marked": positions.marked}
            said |= {"k": positions.k, "removed": positions.removed}
            _store_(stored, said, name, parts)
        else:
            _store_(stored, said, name, {"dense": tensor.cpu().contiguous().clone()})
        described[name] = said
    return packed(stored, described, mask.criterion), zeros


def check_values(values: str) -> None:
    """Raise a ``ValueError`` unless kept weights can be stored so."""
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(VALUES)}, got {values!r}")


def is_sparse_file(path: str | Path) -> bool:
    """Whether the file says that it is one of :func:`save_sparse`; nothing else is checked."""
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return NAME.encode() in file.read(min(size, 1 << 26))


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
    described, stored, criterion = unpacked(path)
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


def _tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def _store_(
    stored: dict[str, Tensor], said: dict[str, Any], name: str, parts: Mapping[str, Tensor]
) -> None:
    """Put the parts of a tensor among what is stored, and their checksums in what is said of it."""
    for part, tensor in parts.items():
        stored[f"{part}:{name}"] = tensor
        said[part] = crc_of(tensor)


def _tell_of_zeros(zeros: Mapping[str, int], kept: int) -> None:
    """Say how many kept weights float16 could not tell from 0, and where."""
    where = [f"{count:,} of {name!r}" for name, count in zeros.items() if count]
    if where:
        warnings.warn(
            f"{sum(zeros.values()):,} of {kept:,} kept weights are 0 in float16, as they are "
            f"below 3e-8: {listed(where)}",
            stacklevel=3,
        )


def _scattered(
    path: Path, name: str, parts: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The mask and the weights of one tensor."""
    shape = parts["shape"]
    positions = Positions(
        stored[f"kept:{name}"].numpy(), parts["marked"], parts["k"], parts["removed"]
    )
    weights = torch.zeros(shape, dtype=getattr(torch, parts["dtype"]))
    try:
        kept = torch.from_numpy(decode(positions, weights.numel())).view(shape)
        values = survivors_of(name, parts, stored)
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
    expected, _ = _tensors_of(model)
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
    _, same = _tensors_of(model)
    return [
        f"{name!r} and {first!r} differ, the network has one tensor for both"
        for name, first in same.items()
        if state[name] is not state[first] and crc_of(state[name]) != crc_of(state[first])
    ]
