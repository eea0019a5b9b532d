"""The same contents are the same safetensors file."""

import json


def in_order(file: bytes) -> bytes:
    """Return the same safetensors file with its header in order, which else differs each time.

    The format is an eight-byte length, a JSON header of that length padded by spaces, and the data.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header + file[end:]


def metadata_in(file: bytes) -> dict[str, str]:
    """Return the metadata of a whole safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]).get("__metadata__", {})
