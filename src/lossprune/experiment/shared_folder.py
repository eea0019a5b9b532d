"""A run's folder as several processes see it: the first one's, which alone touches it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lossprune.experiment.folder import RunFolder
from lossprune.experiment.ranks import Ranks
from lossprune.experiment.record import RunRecord


class SharedFolder:
    """The folder of one run of one process or several.

    All processes call the same methods in the same order.  What is read, the first one reads and
    tells the others, who need not see its disk; what is written, it alone writes.  Its errors are
    everybody's: ``ElsewhereError`` on the others, where they wait for it.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path = path
        self._folder = RunFolder(path)
        self._ranks = ranks

    def settled(self) -> RunRecord | None:
        """As :meth:`RunFolder.settled`."""
        return self._record(self._folder.settled)

    def record(self) -> RunRecord | None:
        """As :meth:`RunFolder.record`."""
        return self._record(self._folder.record)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """As :meth:`RunFolder.locked`; the first process holds it."""
        with ExitStack() as stack:
            self._ranks.from_first(lambda: stack.enter_context(self._folder.locked()))
            yield

    def has(self, name: str) -> bool:
        """Return whether there is a file of that name."""
        found = self._ranks.from_first(lambda: b"" if (self.path / name).exists() else None)
        return found is not None

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""
        contents = self._ranks.from_first(lambda: self._folder.read(name))
        assert contents is not None
        return contents

    def write(self, name: str, contents: bytes) -> None:
        """As :meth:`RunFolder.write`."""
        if self._ranks.first:
            self._folder.write(name, contents)

    def save(self, name: str, save: Callable[[Path], None]) -> None:
        """As :meth:`RunFolder.save`."""
        if self._ranks.first:
            self._folder.save(name, save)

    def remove(self, name: str) -> None:
        """As :meth:`RunFolder.remove`."""
        if self._ranks.first:
            self._folder.remove(name)

    def _record(self, read: Callable[[], RunRecord | None]) -> RunRecord | None:
        if self._ranks.world == 1:
            return read()

        def text() -> bytes | None:
            record = read()
            return None if record is None else record.to_json().encode()

        told = self._ranks.from_first(text)
        return None if told is None else RunRecord.from_json(told.decode())
