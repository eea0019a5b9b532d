"""Networks in files: a state dict with a few words about it, and nothing that can run code."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.experiment.pt_file import read_pt, sealed
from lossprune.pruning.names import without_wrappers

FORMAT = "lossprune network 1"
_BATCH_COUNT = ".num_batches_tracked"


def network_bytes(weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Return the contents of a ``*.pt`` file, readable with ``torch.load(weights_only=True)``.

    It holds ``{"state_dict": weights, "metadata": {"format": …, **metadata}}``.
    """
    contents = {
        "state_dict": OrderedDict((name, tensor.cpu()) for name, tensor in weights.items()),
        "metadata": {"format": FORMAT, **metadata},
    }
    return sealed(contents)


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of all tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def read_network(
    path: Path, asked: str = "--model_0: "
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Read the weights and metadata of a network, and the SHA-256 of the file.

    Accepts what :func:`network_bytes` makes, a plain state dict saved by ``torch.save``, and
    safetensors.  No code of the file is ever run.

    Args:
        path: of the file.
        asked: what messages begin with, such as the flag that named the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, truncated, a pickled module, or anything else; one sentence says
            which.
    """
    if not path.exists():
        raise FileNotFoundError(f"{asked}no file {path}")
    if path.is_dir():
        raise ValueError(f"{asked}{path} is a folder; give a file, such as its best_model.pt")
    contents = path.read_bytes()
    weights, metadata = network_in(contents, path, asked)
    return weights, metadata, hashlib.sha256(contents).hexdigest()


def network_in(
    contents: bytes, path: Path, asked: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and metadata of a file with these contents; errors as above."""
    if path.suffix == ".safetensors":
        loaded = _load_safetensors(path, contents, asked)
    else:
        loaded = read_pt(contents, f"{asked}{path}")
    return _unwrap(path, loaded, asked)


def load_weights_(
    network: nn.Module,
    arch: str,
    path: Path,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    asked: str = "--model_0: ",
) -> None:
    """Copy ``weights`` into ``network``, in place.

    What wrappers such as ``DistributedDataParallel`` put before names is left out.  Batch norm's
    counts of batches may be missing, as in files older than they are: with the momentum of these
    networks nothing depends on them.

    Raises:
        ValueError: they are of another architecture or size, or not finite.
    """
    named = metadata.get("architecture", arch)
    if named != arch:
        raise ValueError(f"{asked}{path} holds a {named}, but --arch is {arch}")
    expected = network.state_dict()
    counts = {name: tensor for name, tensor in expected.items() if name.endswith(_BATCH_COUNT)}
    weights = counts | {without_wrappers(name): tensor for name, tensor in weights.items()}
    for name in (*expected, *weights):
        problem = _mismatch(name, expected.get(name), weights.get(name))
        if problem:
            raise ValueError(f"{asked}{path} does not hold this {arch}: {problem}")
    network.load_state_dict(weights)


def _mismatch(name: str, expected: Tensor | None, given: Tensor | None) -> str | None:
    if given is None:
        return f"it lacks {name!r}"
    if expected is None:
        return f"it has {name!r}, which the network lacks"
    if expected.shape != given.shape:
        return f"{name!r} has shape {tuple(given.shape)}, the network {tuple(expected.shape)}"
    if not given.isfinite().all():
        return f"{name!r} holds values that are not finite"
    return None


def _load_safetensors(path: Path, contents: bytes, asked: str) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(contents)
    except SafetensorError as error:
        raise ValueError(f"{asked}{path} is truncated or not safetensors: {error}") from None


def _unwrap(path: Path, loaded: Any, asked: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    metadata: dict[str, Any] = {}
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        if isinstance(loaded.get("metadata"), Mapping):
            metadata = dict(loaded["metadata"])
        loaded = loaded["state_dict"]
    if isinstance(loaded, Mapping) and loaded and all(_is_entry(item) for item in loaded.items()):
        return dict(loaded), metadata
    raise ValueError(
        f"{asked}{path} does not hold a network: a state dict (names and tensors) is needed, "
        f"it holds {_a_kind_of(loaded)}"
    )


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _a_kind_of(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dictionary with {', '.join(map(repr, list(value)[:3])) or 'nothing'}"
    return f"an object of type {type(value).__name__}"
