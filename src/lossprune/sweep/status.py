"""What stands in a folder of results, at any time and from any terminal."""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossprune.experiment.folder import CHECKPOINT, RECORD, RunFolder
from lossprune.experiment.record import DIVERGED, FINISHED, RUNNING, legible
from lossprune.files import write_whole
from lossprune.json_text import parse_digested, parse_json, with_digest
from lossprune.sweep.board import describe_outcome
from lossprune.sweep.job import ERROR, FAILED, Outcome, last_lines, noted_failure
from lossprune.sweep.view import progress

INTERRUPTED, WAITING = "interrupted", "waiting"
SWEEPS = ".sweeps"
"""In a results folder: what each plan that was swept into it stands for, and the last to do it."""

_STALE_SECONDS = 600.0  # a run on another machine that has written nothing for so long is not alive
_ORDER = (FINISHED, RUNNING, WAITING, INTERRUPTED, DIVERGED, FAILED)


@dataclass(frozen=True)
class RunStatus:
    """How one run stands."""

    folder: Path
    status: str
    outcome: Outcome | None = None


def note_plan(path: Path, name: str, folders: Sequence[Path]) -> None:
    """Leave word of a plan in a results folder, so that its runs to come can be counted.

    Raises:
        ValueError: it cannot be written.
    """
    said = {"plan": name, "runs": [folder.name for folder in folders], **_this_process()}
    target = path / SWEEPS / f"{name}.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, json.dumps(with_digest(said), indent=0).encode())
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}") from None


def read_status(path: Path) -> dict[str, RunStatus]:
    """Return the status of every run in a results folder, by its folder's name.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"RESULTS must be a folder of results, but there is no {path}")
    return {run.folder.name: run for run in sorted(_runs(path), key=lambda run: run.folder.name)}


def _runs(path: Path) -> Iterator[RunStatus]:
    swept = {run for plan in _plans(path) if _lives(plan) for run in plan["runs"]}
    for folder in path.iterdir():
        if (folder / RECORD).is_file() or (folder / ERROR).is_file():
            yield _status_of(folder, folder.name in swept)


def _status_of(folder: Path, swept: bool) -> RunStatus:
    run = RunFolder(folder)
    try:
        record = run.record()
    except ValueError as error:
        return RunStatus(folder, FAILED, Outcome(FAILED, str(error)))
    if record is not None and record.status != RUNNING and not (folder / CHECKPOINT).exists():
        return RunStatus(folder, record.status, Outcome.of(record))
    if _alive(folder):
        return RunStatus(folder, RUNNING)
    failure = noted_failure(run)
    if failure is not None:
        return RunStatus(folder, FAILED, failure)
    # A sweep comes back to what it left, as to a pruned run that waits for others to train with.
    return RunStatus(folder, WAITING if swept else INTERRUPTED)


def _alive(folder: Path) -> bool:
    """Whether the process that signed the folder still works on it."""
    try:
        holder: dict[str, Any] = parse_json((folder / ".holder.json").read_bytes())
        if holder["host"] == socket.gethostname():
            return _lives(holder)
        written = max(file.stat().st_mtime for file in folder.iterdir())
        return time.time() - written < _STALE_SECONDS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _lives(process: dict[str, Any]) -> bool:
    """Whether a process of this machine is still there."""
    try:
        if process["host"] != socket.gethostname():
            return False
        os.kill(process["pid"], 0)
    except PermissionError:
        return True
    except (OSError, KeyError, TypeError):
        return False
    return True


def describe_status(path: Path) -> str:
    """Return how a results folder stands: counts, plans, what runs, and what failed and why."""
    runs = read_status(path)
    counts = Counter(run.status for run in runs.values())
    lines = [f"{path}: " + (_counted(counts) or "no runs")]
    for plan in _plans(path):
        name, planned = plan["plan"], plan["runs"]
        here = Counter(runs[run].status for run in planned if run in runs)
        ended = here[FINISHED] + here[DIVERGED] + here[FAILED]
        lines.append(
            f"plan {name}: {ended} of {len(planned)} ended ({_counted(here) or 'none begun'}), "
            f"{len(planned) - sum(here.values())} not begun"
        )
    for run in runs.values():
        if run.status == RUNNING:
            lines.append(f"running: {run.folder.name}: {progress(run.folder)}")
    for run in runs.values():
        if run.status in (FAILED, DIVERGED) and run.outcome is not None:
            lines.append(f"{run.folder.name}: {describe_outcome(run.outcome)}")
            lines += [f"    {line}" for line in last_lines(RunFolder(run.folder))]
    best = _best(runs)
    if best is not None and best.outcome is not None:
        lines.append(f"best pruned: {best.folder.name}: {describe_outcome(best.outcome)}")
    return "\n".join(map(legible, lines))


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[status]} {status}" for status in _ORDER if counts[status])


def _plans(path: Path) -> list[dict[str, Any]]:
    """Return what :func:`note_plan` left, plan by plan; what cannot be read is left out."""
    found = []
    for file in sorted((path / SWEEPS).glob("*.json")):
        try:
            said = parse_digested(file.read_bytes())
        except (OSError, ValueError):
            continue
        runs = said.get("runs")
        if "plan" in said and isinstance(runs, list) and all(isinstance(run, str) for run in runs):
            found.append(said)
    return found


def _best(runs: dict[str, RunStatus]) -> RunStatus | None:
    """The pruned network of lowest validation error."""
    pruned = [
        run
        for run in runs.values()
        if run.outcome is not None
        and run.outcome.pruned_loss is not None
        and run.outcome.valid_error is not None
    ]
    return min(pruned, key=lambda run: run.outcome.valid_error, default=None)  # type: ignore[union-attr]
