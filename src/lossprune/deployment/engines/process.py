"""Engines in their processes: started, asked, timed in turn, and ended."""

import json
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

OTHERS = ("onnxruntime", "openvino", "deepsparse")
TOLERANCE = 1e-3  # relative to the largest output; above it an engine's answer is called wrong
WORKER = Path(__file__).with_name("worker.py")

_ROUNDS = 5
_LEAST = 3  # calls of a network, ...
_LONGEST = 4  # unless they take so many times as long as they may
_SAID = 120  # signs of what a process said last


class EngineError(Exception):
    """An engine that is not there, cannot run the network or does not answer: in one line."""


class Engine:
    """An engine in its process.

    Args:
        name: what it is called.
        command: of the process; see ``worker.py`` for what it answers.
        log: the file that takes what it says beside its answers.
        patience: seconds that an answer may take.
        folder: the process is in; this one's if not given.

    Attributes:
        name: as given.
        version: of the package.
        told: what making each network ready took, by the network's name.

    Raises:
        EngineError: the package is not there.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        patience: float = 120.0,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self._patience = patience
        self._log = log
        try:
            with log.open("w") as said:
                self._process = subprocess.Popen(
                    command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                    text=True,
                )  # fmt: skip
        except OSError as error:
            raise EngineError(f"{command[0]} cannot be started: {error.strerror}") from None
        self.version: str = self._answer()["version"]
        self.told: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def ready(self, name: str) -> dict[str, Any]:
        """Make the network of this name ready and return what that took."""
        self.told[name] = self._ask("ready", name)
        return self.told[name]

    def seconds(self, name: str, calls: int) -> list[float]:
        """Return the seconds of so many calls of it."""
        return self._ask("time", name, calls)

    def _ask(self, *words: object) -> Any:
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # the answer says what happened
            print(*words, file=stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], self._patience)[0]:
            self.end()
            raise EngineError(f"no answer in {self._patience:.0f} s")
        line = stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        if status < 0:
            raise EngineError(f"it ended by {signal.Signals(-status).name}")
        said = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
        said = [line for line in said if line] or [f"it ended with exit status {status}"]
        errors = [line for line in said if "error" in line.lower()]
        raise EngineError(_reason(self.name, (errors or said)[-1]))


def _reason(name: str, said: str) -> str:
    """What the line of a process that tells its error means."""
    if said.startswith("ModuleNotFoundError") and repr(name) in said:
        return "it is not installed"
    return said if len(said) <= _SAID else f"{said[:_SAID]}…"


def worker_command(python: str, name: str, folder: Path, threads: int) -> list[str]:
    """Return the command of another package's engine, for the networks in a folder."""
    return [python, str(WORKER), name, str(folder), str(threads)]


@dataclass(frozen=True)
class Ready:
    """A network that an engine has made ready.

    Attributes:
        engine: in its process.
        name: of the network there.
    """

    engine: Engine
    name: str

    @property
    def told(self) -> dict[str, Any]:
        """What making it ready took."""
        return self.engine.told[self.name]

    def calls_in(self, seconds: float) -> int:
        """Return how many calls fill so many seconds, but at least one and at most a thousand."""
        first = self.told["first_call_s"]
        call = first if first > seconds else self.engine.seconds(self.name, 1)[0]
        return max(1, min(1000, int(seconds / max(call, 1e-6))))


def timed_in_turn(
    rows: Mapping[str, Ready], budget: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time networks in turn, round after round, so that a busy machine slows all alike.

    Calls that take long are made less often: each network has ``budget`` seconds, or what three
    calls take where that is longer, but at most four times the budget, or one call.  Before the
    counted calls of a round one is made that is not, where there are several: caches and threads
    come to rest.

    Args:
        rows: what is timed, by any name.
        budget: seconds for each.

    Returns:
        the seconds of calls by that name, and why another was left out on the way.
    """
    taken: dict[str, list[float]] = {name: [] for name in rows}
    spent = dict.fromkeys(taken, 0.0)
    calls: dict[str, int] = {}
    lost: dict[str, str] = {}
    for number in range(_ROUNDS):
        for name, row in list(rows.items())[:: 1 if number % 2 else -1]:
            least = budget if len(taken[name]) >= _LEAST else _LONGEST * budget
            if name in lost or (taken[name] and spent[name] >= least):
                continue
            began = time.perf_counter()
            try:
                if name not in calls:
                    calls[name] = row.calls_in(budget / _ROUNDS)
                count = calls[name] + (calls[name] > 1)
                taken[name] += row.engine.seconds(row.name, count)[-calls[name] :]
            except EngineError as error:
                lost[name] = str(error)
            spent[name] += time.perf_counter() - began
    return {name: seconds for name, seconds in taken.items() if name not in lost}, lost
