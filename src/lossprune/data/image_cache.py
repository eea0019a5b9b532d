"""Decoded images, kept so that each run after the first reads one file instead of thousands.

The cache lies in the folder named by the environment variable ``LOSSPRUNE_CACHE``, else in the
user's cache folder. It holds one safetensors file for each source of images; a source that has
changed has another key, and its new file takes the place of the old one. All of it may be deleted
at any time.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lossprune.data.dataset import Split
from lossprune.files import CACHE_VARIABLE, cache_folder, replacing


@dataclass(frozen=True)
class Decoded:
    """Splits by their names, and the classes' names: label i is the i-th."""

    classes: tuple[str, ...]
    splits: Mapping[str, Split]


def cached(key: str, source: Path, decode: Callable[[], Decoded]) -> Decoded:
    """Return what ``decode()`` gives, from the cache if it is there under ``key``.

    Several processes may ask at once: one decodes, the others wait and read. A cache file that is
    damaged is made anew. Where the cache cannot be written, a warning says so.

    Args:
        key: a digest that changes with the contents of ``source``.
        source: the path that the images come from.
        decode: reads the images.
    """
    folder = cache_folder()
    origin = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]
    file = folder / f"{source.name}-{origin}-{key[:16]}.safetensors"
    lock = FileLock(folder / f".{origin}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        _warn(folder, error)
        return decode()
    try:
        found = _read(file)
        if found is None:
            found = decode()
            _keep(file, origin, found)
    finally:
        lock.release()
    return found


def _keep(file: Path, origin: str, decoded: Decoded) -> None:
    """Write the cache file, and delete those of earlier states of the same source."""
    try:
        _write(file, decoded)
    except (OSError, SafetensorError) as error:
        _warn(file.parent, error)
        return
    for old in file.parent.glob(f"*-{origin}-*.safetensors"):
        if old != file:
            old.unlink(missing_ok=True)


def _write(file: Path, decoded: Decoded) -> None:
    tensors = {f"images.{name}": split.images for name, split in decoded.splits.items()}
    tensors |= {f"labels.{name}": split.labels for name, split in decoded.splits.items()}
    classes = json.dumps(decoded.classes)
    metadata = {"classes": classes, "sha256": _digest(classes, tensors)}
    with replacing(file) as part:
        save_file(tensors, part, metadata)


def _read(file: Path) -> Decoded | None:
    """Return the contents of a cache file; None if it is not there or not as it was written."""
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in sorted(stored.keys())}
    except (OSError, SafetensorError):
        return None
    classes = metadata.get("classes", "")
    if metadata.get("sha256") != _digest(classes, tensors):
        return None
    names = [name.removeprefix("images.") for name in tensors if name.startswith("images.")]
    splits = {name: Split(tensors[f"images.{name}"], tensors[f"labels.{name}"]) for name in names}
    return Decoded(tuple(json.loads(classes)), splits)


def _digest(classes: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(classes.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _warn(folder: Path, error: Exception) -> None:
    warnings.warn(
        f"decoded images cannot be cached in {folder} ({error}), so each run decodes them anew; "
        f"{CACHE_VARIABLE} can name another folder",
        stacklevel=2,
    )
