"""Networks in files: a state dict with a few words about it, and nothing that can run code."""

import hashlib
import io
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.experiment.seal import check_seal, sealed
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
        loaded = _load_pt(path, contents, asked)
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


def _load_pt(path: Path, contents: bytes, asked: str) -> Any:
    check_seal(contents, f"{asked}{path}")
    try:
        with warnings.catch_warnings(action="ignore"):  # the answer below says all there is to say
            return torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds; each is answered by a sentence
        foreign = _foreign_classes(contents)
        if foreign:
            raise ValueError(
                f"{asked}{path} holds pickled objects ({', '.join(foreign[:3])}), whose code "
                "is never run here; where you trust it, convert it with torch.save(torch.load("
                "'old.pt', weights_only=False).state_dict(), 'new.pt') and give the new file"
            ) from error
        raise ValueError(f"{asked}{path} is truncated or not a network saved by torch") from error


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


def _foreign_classes(contents: bytes) -> list[str]:
    """Name the classes that unpickling would import, but for those of a state dict; none is."""
    harmless = ("torch._utils ", "torch.storage ", "torch Float", "collections OrderedDict")
    return [
        name.replace(" ", ".")
        for name in dict.fromkeys(_imported_names(_pickle_in(contents)))
        if not name.startswith(harmless) and not name.endswith("Storage")
    ]


def _pickle_in(contents: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(contents)) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return archive.read(name)
    except (zipfile.BadZipFile, StopIteration):
        return contents  # the format before torch 1.6, or not torch's at all


def _imported_names(pickled: bytes) -> Iterator[str]:
    """Read the opcodes of consecutive pickles for the names they would import."""
    stream = io.BytesIO(pickled)
    strings: list[str] = []
    try:
        while True:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument)
                elif opcode.name == "STACK_GLOBAL":
                    yield " ".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
    except ValueError:
        return  # the end, or bytes that are not a pickle
