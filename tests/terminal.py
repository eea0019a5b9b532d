"""A terminal for a program, and what a person sees on it, at any time."""

import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator, Sequence

_ROWS = 50
_TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b[^\[]|[\r\n]|[^\x1b\r\n]")
_NOT_FOR_IT = ("JPY_PARENT_PID", "MPLBACKEND", "COLUMNS", "LINES", "NO_COLOR")


class Screen:
    """Lines of so many columns, with a cursor: up, down, erase a line, and nothing else."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self._row = self._column = 0

    def feed(self, text: str) -> None:
        for token in _TOKEN.finditer(text):
            amount, kind = token.groups()
            if kind == "A":
                self._row = max(self._row - int(amount or 1), 0)
            elif kind == "K":
                self.lines[self._row] = ""
            elif token[0] == "\r":
                self._column = 0
            elif token[0] == "\n":
                self._down()
            elif not token[0].startswith("\x1b"):
                self._put(token[0])

    def _down(self) -> None:
        self._row += 1
        self.lines += [""] * (self._row + 1 - len(self.lines))

    def _put(self, sign: str) -> None:
        if self._column == self.columns:
            self._down()
            self._column = 0
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[: self._column] + sign + line[self._column + 1 :]
        self._column += 1

    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.lines]


def screens(words: Sequence[str], columns: int, **environment: str) -> Iterator[list[str]]:
    """Run a program on a terminal; give its screen after each thing that it writes, and the end."""
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        # Not os.execv: readline puts COLUMNS where os.environ does not see it.
        kept = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_IT}
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
        os.execve(words[0], list(words), {**kept, "TERM": "xterm", **environment})
    screen, rest = Screen(columns), b""
    while True:
        try:
            rest += os.read(terminal, 4096)
        except OSError:
            break
        # No sign, and no sequence that moves the cursor, is cut in two.
        text = rest.decode(errors="ignore")
        whole = text[: re.search(r"(\x1b[^A-Za-z]*)?\Z", text).start()]
        screen.feed(whole)
        rest = rest[len(whole.encode()) :]
        yield screen.shown()
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, screen.shown()
    yield screen.shown()
