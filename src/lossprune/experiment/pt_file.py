"""A digest of a ``*.pt`` file, inside it: what ``torch.load`` reads has no other that it checks.

``torch.save`` writes a zip archive.  Its last two bytes are the length of a comment, 0, and the
comment would follow.  Here it does: a mark and the SHA-256 of every byte before.  ``torch.load``
and every other reader of zip archives take no notice of it.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

_MARK = b"lossprune sha256 "
_SEAL = len(_MARK) + 2 * hashlib.sha256().digest_size
_END, _END_SIZE = b"PK\x05\x06", 22  # of the record before the comment


def sealed(contents: Any) -> bytes:
    """Return the file that ``torch.save`` makes of ``contents``, with a digest of its bytes."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    with buffer.getbuffer() as archive:
        archive[-2:] = _SEAL.to_bytes(2, "little")
        digest = hashlib.sha256(archive).hexdigest()
    buffer.seek(0, io.SEEK_END)
    buffer.write(_MARK + digest.encode())
    return buffer.getvalue()


def check_seal(file: bytes, path: Path | str) -> None:
    """Check that a file is as :func:`sealed` made it, where it has a digest.

    Files of older versions and of others have none: nothing is known of them.

    Raises:
        ValueError: it is not; the message names ``path``.
    """
    body, seal = memoryview(file)[:-_SEAL], file[-_SEAL:]
    if seal.startswith(_MARK):
        damaged = hashlib.sha256(body).hexdigest().encode() != seal[len(_MARK) :]
    else:
        damaged = bytes(body[-_END_SIZE:]).startswith(_END)  # the mark itself has gone
    if damaged:
        raise ValueError(f"{path} is damaged: its contents are not those that were written")
