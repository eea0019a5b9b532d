"""Downloads that resume, are verified before they are kept, and try one address after another.

pooch places the file: under a temporary name first, moved once it is good. What it lacks is the
downloader here, which goes on from the bytes that an interrupted download left in a ``.part`` file.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pooch
from filelock import FileLock

from lossprune.data.transfer import FAILURES, Patience, RemoteFile, Resuming, reason

MIRROR_VARIABLE = "LOSSPRUNE_MIRROR"
PATIENCE = Patience()


def fetch(
    file: RemoteFile,
    folder: Path,
    *,
    mirror: str | None = None,
    progress: bool | None = None,
    patience: Patience = PATIENCE,
) -> Path:
    """Download ``file`` into ``folder`` unless it is there; return its path.

    Several processes may do this at once: one downloads, the others wait for it.

    Args:
        file: what to download.
        folder: made if missing.
        mirror: base URL to use instead of the file's own; None: that in ``LOSSPRUNE_MIRROR``, if
            any.
        progress: show a bar on standard error; None: only where it is a terminal.
        patience: how long to try each address.

    Raises:
        ValueError: ``mirror`` is not an http or https URL.
        OSError: the folder cannot be written, or no address gave a good file.
    """
    target = folder / file.name
    mirrors = _mirrors(file, mirror)
    if target.exists():  # Nothing is written then, for the folder may be read-only.
        return target
    staging, lock = folder / f".{file.name}.download", folder / f".{file.name}.lock"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not target.exists():
                _fetch_by_way_of(staging, file, mirrors, progress, patience)
    except DownloadError:
        if made and list(folder.iterdir()) == [lock]:
            _leave_nothing(lock, made)
        raise
    except OSError as error:  # the file system refuses: say what could not be done
        raise OSError(
            f"cannot download {file.name} into {folder}: {error.strerror or error}"
        ) from error
    return target


def _leave_nothing(lock: Path, made: list[Path]) -> None:
    """Remove the folders that were made for a file that did not come."""
    with suppress(OSError):  # another process has begun to fetch into one of them
        lock.unlink()
        for folder in made:
            folder.rmdir()


def _mirrors(file: RemoteFile, mirror: str | None) -> tuple[str, ...]:
    chosen = mirror or os.environ.get(MIRROR_VARIABLE)
    if not chosen:
        return file.mirrors
    if urlsplit(chosen).scheme not in ("http", "https") or not urlsplit(chosen).netloc:
        raise ValueError(
            f"mirror (--mirror, {MIRROR_VARIABLE}) must be an http or https URL, got {chosen!r}"
        )
    return (chosen,)


class DownloadError(OSError):
    """No address gave the file, or gave it whole and right."""


def _fetch_by_way_of(
    staging: Path,
    file: RemoteFile,
    mirrors: tuple[str, ...],
    progress: bool | None,
    patience: Patience,
) -> None:
    """Download into the folder ``staging``, then move the file to the one above.

    All that interrupted downloads leave is in ``staging``, and goes with it once the file is there.
    """
    staging.mkdir(exist_ok=True)
    failures = []
    for base in mirrors:
        source = pooch.create(
            path=staging, base_url=f"{base.rstrip('/')}/", registry={file.name: None}
        )
        try:
            with _quiet(pooch.get_logger()):
                # The cast: pooch annotates a downloader's parameters with a processor's names.
                downloader = cast(Any, Resuming(file, staging, progress, patience))
                source.fetch(file.name, downloader=downloader)
        except FAILURES as error:
            failures.append(f"{source.get_url(file.name)} ({reason(error)})")
        else:
            os.replace(staging / file.name, staging.parent / file.name)
            shutil.rmtree(staging)
            return
    if not any(staging.iterdir()):
        staging.rmdir()
    raise DownloadError(
        f"cannot download {file.name}, tried {', '.join(failures)}: put it into {staging.parent}, "
        f"or name another base URL with --mirror or {MIRROR_VARIABLE}"
    )


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
