"""What stands in a folder of results, at any time and from any terminal."""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossprune.experiment.folder import RECORD, RunFolder
from lossprune.experiment.log import legible
from lossprune.files import write_whole
from lossprune.json_text import parse_digested, parse_json, with_digest
from lossprune.sweep.board import describe_outcome
from lossprune.sweep.job import ERROR, Outcome, RunPhase, last_lines, noted_failure, settled_outcome
from lossprune.sweep.view import progress

SWEEPS = ".sweeps"
"""In a results folder: what each plan that was swept into it stands for, and the last to do it."""

_STALE_SECONDS = 600.0  # a run on another machine that has written nothing for so long is not alive
_ORDER = (
    *(RunPhase.FINISHED, RunPhase.RUNNING, RunPhase.WAITING),
    *(RunPhase.INTERRUPTED, RunPhase.DIVERGED, RunPhase.FAILED),
)


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


def read_status(path: Path) -> dict[str, Outcome]:
    """Return how every run in a results folder stands, by its folder's name, and in that order.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"RESULTS must be a folder of results, but there is no {path}")
    swept = {run for plan in _plans(path) if _lives(plan) for run in plan["runs"]}
    return {
        folder.name: _status_of(folder, folder.name in swept)
        for folder in sorted(path.iterdir())
        if (folder / RECORD).is_file() or (folder / ERROR).is_file()
    }


def _status_of(folder: Path, swept: bool) -> Outcome:
    run = RunFolder(folder)
    if (settled := settled_outcome(run)) is not None:
        return settled
    if _alive(folder):
        return Outcome(RunPhase.RUNNING)
    # A sweep comes back to what it left, as to a pruned run that waits for others to train with.
    left = Outcome(RunPhase.WAITING if swept else RunPhase.INTERRUPTED)
    return noted_failure(run) or left


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
        ended = here[RunPhase.FINISHED] + here[RunPhase.DIVERGED] + here[RunPhase.FAILED]
        lines.append(
            f"plan {name}: {ended} of {len(planned)} ended ({_counted(here) or 'none begun'}), "
            f"{len(planned) - sum(here.values())} not begun"
        )
    for name, run in runs.items():
        if run.status == RunPhase.RUNNING:
            lines.append(f"running: {name}: {progress(path / name)}")
    for name, run in runs.items():
        if run.status in (RunPhase.FAILED, RunPhase.DIVERGED):
            lines.append(f"{name}: {describe_outcome(run)}")
            lines += [f"    {line}" for line in last_lines(RunFolder(path / name))]
    pruned = {name: run.valid_error for name, run in runs.items() if run.valid_error is not None}
    pruned = {name: error for name, error in pruned.items() if runs[name].pruned_loss is not None}
    if pruned:
        best = min(pruned, key=pruned.__getitem__)
        lines.append(f"best pruned: {best}: {describe_outcome(runs[best])}")
    return "\n".join(map(legible, lines))


def _counted(counts: Counter[RunPhase]) -> str:
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
