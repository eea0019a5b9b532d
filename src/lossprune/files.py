"""Files that are whole at any moment, and the folder of what can be made again.

No torch here: records and kernels are written without it.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CACHE_VARIABLE = "LOSSPRUNE_CACHE"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file in the same folder, which then takes the place of ``path``.

    It is flushed to the disk and renamed, so that a kill or a power cut leaves the old file or the
    new one.  Where the writing fails it is removed, and what was there is untouched.  Several
    processes may write at once: the last one's file stays.

    Raises:
        OSError: the system cannot write it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file, or replace one that is there, as :func:`replacing`.

    Raises:
        OSError: the system cannot write it; what was there is untouched.
    """
    with replacing(path) as part:
        part.write_bytes(contents)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes were writing into a folder that nobody else writes into."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def check_folder_of(path: Path) -> None:
    """Check, before any work, that a file can be where it is to be written.

    Raises:
        FileNotFoundError: its folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: its folder does not exist")


def cache_folder() -> Path:
    """Return the folder of all that can be made again; it may not exist yet.

    The one that ``LOSSPRUNE_CACHE`` names, else the user's cache folder (``~/.cache/lossprune``).
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    import pooch

    return Path(pooch.os_cache("lossprune"))


def _sync_folder(folder: Path) -> None:
    """Make a rename itself survive a power cut, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
