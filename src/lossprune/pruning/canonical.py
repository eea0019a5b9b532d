"""The same contents are the same safetensors file, and another file is noticed."""

import hashlib
import json
from typing import Any

from lossprune.json_text import parse_json

UNSIGNED = "0" * 64
"""What ``sha256`` in the metadata is before :func:`signed` puts the digest there."""


def in_order(file: bytes) -> bytes:
    """Return the same safetensors file with its header in order, which else differs each time.

    The format is an eight-byte length, a JSON header of that length padded by spaces, and the data.
    """
    end = _end(file)
    header = json.dumps(json.loads(file[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header + file[end:]


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


def signed(file: bytes) -> bytes:
    """Return the file with the SHA-256 of all of it in its metadata, where zeros are."""
    return _with_digest(file, UNSIGNED, hashlib.sha256(file).hexdigest())


def is_signed(file: bytes, digest: str) -> bool:
    """Whether :func:`signed` made the file, whose metadata have this digest."""
    return hashlib.sha256(_with_digest(file, digest, UNSIGNED)).hexdigest() == digest


def _with_digest(file: bytes, old: str, new: str) -> bytes:
    end = _end(file)
    # No other place can look like it: in a string of the metadata, quotes have a backslash.
    old, new = (f'"sha256":"{digest}"' for digest in (old, new))
    return file[:end].replace(old.encode(), new.encode(), 1) + file[end:]


def _end(file: bytes) -> int:
    """Where the header ends."""
    return 8 + int.from_bytes(file[:8], "little")
