"""Fetching one file from one address: resumed where it broke off, and verified."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
import urllib3
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from lossprune.progress import redraws

CHUNK = 1 << 16


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be had from several places.

    Attributes:
        name: its name there and here.
        mirrors: base URLs that it lies under, tried in order.
        verify: raises ValueError, saying what is wrong, unless the file at a path is good.
    """

    name: str
    mirrors: tuple[str, ...]
    verify: Callable[[Path], object]


@dataclass(frozen=True)
class Patience:
    """How long to try each address.

    Attributes:
        timeout: seconds without a byte after which an answer counts as failed.
        attempts: requests to one address, each going on where the one before stopped.
        pause: seconds before the second attempt, doubled before each further one.
    """

    timeout: float = 30.0
    attempts: int = 3
    pause: float = 1.0


class _BrokenOffError(Exception):
    """The answer ended before its announced length."""


class _StatusError(Exception):
    """The server answered with a status that says no."""

    def __init__(self, status: int):
        super().__init__(f"status {status}")
        self.status = status


class _WrongContentError(Exception):
    """The file arrived whole, but is not the one wanted."""


_TRANSIENT = (requests.RequestException, urllib3.exceptions.HTTPError, _BrokenOffError)
FAILURES = (*_TRANSIENT, _StatusError, _WrongContentError)


def reason(error: Exception) -> str:
    """Return what went wrong, in a few words."""
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error)


@dataclass(frozen=True)
class Resuming:
    """A downloader for pooch: writes ``file``, verified, to the path it is given.

    Attributes:
        file: what to fetch.
        folder: keeps what an interrupted download received.
        progress: show a bar on standard error; None: only where it is a terminal.
        patience: how long to try.
    """

    file: RemoteFile
    folder: Path
    progress: bool | None
    patience: Patience

    def __call__(self, url: str, output_file: str, _: object) -> None:
        """Fetch ``url`` to ``output_file``; the third argument, pooch's own, is not used."""
        # One part file an address: two servers may hold the same contents compressed differently.
        tag = hashlib.sha256(url.encode()).hexdigest()[:8]
        part = self.folder / f"{tag}.part"
        for attempt in range(1, self.patience.attempts + 1):
            resumed = part.exists()
            try:
                self._receive(url, part)
                self._verify(part)
            except FAILURES as error:
                last = attempt == self.patience.attempts
                if last or not _worth_another(error, resumed):
                    raise
                time.sleep(self.patience.pause * 2 ** (attempt - 1))
            else:
                os.replace(part, output_file)
                return

    def _verify(self, part: Path) -> None:
        try:
            self.file.verify(part)
        except ValueError as error:
            part.unlink()
            raise _WrongContentError(str(error)) from None

    def _receive(self, url: str, part: Path) -> None:
        """Add to ``part`` what it lacks."""
        have = part.stat().st_size if part.exists() else 0
        # identity: the .gz itself is wanted, and byte ranges count its bytes.
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        timeout = self.patience.timeout
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
            if have and response.status_code == requests.codes.requested_range_not_satisfiable:
                return  # There is nothing more: the part is whole, or wrong, as verifying tells.
            if not response.ok:
                raise _StatusError(response.status_code)
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                have = 0  # The server sends all of it again.
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            try:
                with part.open("ab" if have else "wb") as sink, self._bar(have, total) as advance:
                    for chunk in response.raw.stream(CHUNK, decode_content=False):
                        sink.write(chunk)
                        advance(len(chunk))
                whole = total is None or part.stat().st_size == total
            except urllib3.exceptions.ProtocolError:
                whole = False
        if not whole:
            raise _BrokenOffError(f"broke off after {part.stat().st_size} of {total} bytes")

    @contextmanager
    def _bar(self, have: int, total: int | None) -> Iterator[Callable[[int], None]]:
        show = redraws() if self.progress is None else self.progress
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        with Progress(
            *columns, TransferSpeedColumn(), console=Console(stderr=True), disable=not show
        ) as bar:
            task = bar.add_task(self.file.name, total=total, completed=have)
            yield lambda count: bar.advance(task, count)


def _worth_another(error: Exception, resumed: bool) -> bool:
    """Whether to ask the same address again."""
    if isinstance(error, _WrongContentError):
        return resumed  # The file may have changed between the two halves.
    if isinstance(error, _StatusError):
        return error.status >= 500 or error.status == requests.codes.too_many_requests
    return True
