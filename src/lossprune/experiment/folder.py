"""A run's folder: one process at a time, every file whole at any moment."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from lossprune.experiment.ranks import ALONE, Ranks
from lossprune.experiment.record import RunRecord, RunStatus
from lossprune.files import remove_unfinished, replacing, write_whole
from lossprune.json_text import parse_json

T = TypeVar("T")

RECORD, LOG, MASK = "record.json", "log.txt", "mask.safetensors"
BEST, LAST, CHECKPOINT = "best_model.pt", "last_model.pt", "checkpoint.pt"
PRUNED = "network.safetensors"  # in a folder of ``lossprune prune``
_BUSY_SECONDS = 0.5
_LOCK, _HOLDER = ".lock", ".holder.json"


class FolderBusyError(ValueError):
    """Another process works on the folder; the message says which."""


def start_file(path: Path) -> Path:
    """Return the file of ``--model_0``, which may be a folder that ``lossprune prune`` wrote."""
    return path / PRUNED if (path / PRUNED).is_file() else path


def when_free(attempt: Callable[[], T], deadline: float) -> T:
    """Return what ``attempt()`` does, tried again and again where another has the folder.

    Raises:
        FolderBusyError: it still has it at ``deadline``, by the monotonic clock.
    """
    while True:
        try:
            return attempt()
        except FolderBusyError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_BUSY_SECONDS)


class RunFolder:
    """The folder of one run, of one process or several.

    Every write goes to a temporary file beside its target, is flushed to the disk and then
    renamed: whenever the process or the machine stops, each file is the old one or the new one.

    Several processes call the same methods in the same order.  What is read, the first one reads
    and tells the others, who need not see its disk; what is written, it alone writes.  Its errors
    are everybody's: ``ElsewhereError`` on the others, where they wait for it.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path = path
        self._ranks = ranks

    def settled(self) -> RunRecord | None:
        """Return the record of a run that has come to its end, or None; nothing is written.

        The checkpoint is the last thing that a run removes: while there is one, it is not settled.
        """
        return self._told(self._settled_here)

    def record(self) -> RunRecord | None:
        """Return the record as it stands, or None where there is none yet."""
        return self._told(self._record_here)

    def _told(self, read: Callable[[], RunRecord | None]) -> RunRecord | None:
        if self._ranks.world == 1:
            return read()

        def text() -> bytes | None:
            record = read()
            return None if record is None else record.to_json().encode()

        told = self._ranks.from_first(text)
        return None if told is None else RunRecord.from_json(told.decode())

    def _settled_here(self) -> RunRecord | None:
        record = self._record_here()
        if record is None or record.status == RunStatus.RUNNING:
            return None
        return None if (self.path / CHECKPOINT).exists() else record

    def _record_here(self) -> RunRecord | None:
        try:
            return RunRecord.from_json((self.path / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise ValueError(f"cannot use {self.path}: a part of it is not a folder") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            left = (self.path / CHECKPOINT).exists()
            hint = f"; remove it, and the run goes on from {CHECKPOINT}" if left else ""
            raise ValueError(
                f"{self.path / RECORD} is not a record of a run: {error}{hint}"
            ) from None
        except OSError as error:
            raise ValueError(f"cannot read {self.path / RECORD}: {error.strerror}") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it; a lock that a dead process left does not count.

        Raises:
            FolderBusyError: another process holds it.
            ValueError: the folder cannot be made or written.
        """
        with contextlib.ExitStack() as stack:
            self._ranks.from_first(lambda: stack.enter_context(self._locked_here()))
            yield

    @contextlib.contextmanager
    def _locked_here(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / _LOCK)
        with _explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise FolderBusyError(f"{self.path} is in use by {self._holder()}") from None
        try:
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
            self.write(_HOLDER, json.dumps(holder).encode())
            remove_unfinished(self.path)
            yield
        finally:
            with contextlib.suppress(OSError):
                (self.path / _HOLDER).unlink(missing_ok=True)
                if self._settled_here() is not None:
                    (self.path / _LOCK).unlink(missing_ok=True)
            lock.release()

    def has(self, name: str) -> bool:
        """Return whether there is a file of that name."""
        there = self._ranks.from_first(lambda: b"" if (self.path / name).exists() else None)
        return there is not None

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""
        contents = self._ranks.from_first((self.path / name).read_bytes)
        assert contents is not None
        return contents

    def write(self, name: str, contents: bytes) -> None:
        """Replace a file as a whole.

        Raises:
            ValueError: it cannot be written, as there is no space left; the old one is untouched.
        """
        if self._ranks.first:
            with _explained(self.path / name):
                write_whole(self.path / name, contents)

    def save(self, name: str, save: Callable[[Path], object]) -> None:
        """Replace a file as a whole by what ``save(path)`` writes.

        Raises:
            ValueError: as :meth:`write`.
        """
        if self._ranks.first:
            with _explained(self.path / name), replacing(self.path / name) as part:
                save(part)

    def remove(self, name: str) -> None:
        """Remove a file where there is one."""
        if self._ranks.first:
            with _explained(self.path / name):
                (self.path / name).unlink(missing_ok=True)

    def _holder(self) -> str:
        try:
            holder = parse_json((self.path / _HOLDER).read_bytes())
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"  # it took the lock a moment ago and has not signed yet


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of the system into one sentence."""
    try:
        yield
    except FolderBusyError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(
                f"no space left to write {path}: what was there is untouched; "
                "free some and run the same command to go on"
            ) from error
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
