"""Files of ``torch.save``: with a digest inside, and read so that none of their code ever runs.

``torch.save`` writes a zip archive that has no digest which ``torch.load`` would check.  Its last
two bytes are the length of a comment, 0, and the comment would follow.  Here it does: a mark and
the SHA-256 of every byte before.  ``torch.load`` and every other reader of zip archives take no
notice of it.
"""

import hashlib
import io
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
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


def read_pt(contents: bytes, named: str) -> Any:
    """Return what such a file holds, on the CPU.

    Args:
        contents: of the file.
        named: what messages call it.

    Raises:
        ValueError: it is damaged, truncated, or holds objects whose code would have to run.
    """
    check_seal(contents, named)
    try:
        with warnings.catch_warnings(action="ignore"):  # the answer below says all there is to say
            return torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds; each is answered by a sentence
        foreign = _foreign_classes(contents)
        if foreign:
            raise ValueError(
                f"{named} holds pickled objects ({', '.join(foreign[:3])}), whose code "
                "is never run here; where you trust it, convert it with torch.save(torch.load("
                "'old.pt', weights_only=False).state_dict(), 'new.pt') and give the new file"
            ) from error
        raise ValueError(f"{named} is truncated or not a network saved by torch") from error


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
