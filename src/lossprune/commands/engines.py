"""The deployed network beside other inference engines, each in a process of its own."""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossprune.commands import form_worker
from lossprune.commands.deployable import Deployable
from lossprune.commands.form_worker import REQUEST
from lossprune.commands.forms import state_bytes
from lossprune.deployment.engines.problem import write_problem
from lossprune.deployment.engines.process import (
    TOLERANCE,
    Engine,
    EngineError,
    Ready,
    timed_in_turn,
    worker_command,
)
from lossprune.deployment.timing import Timing
from lossprune.progress import Progress
from lossprune.pruning import PruningError

# Rows of the table, and the forms that are timed for them.
_FORMS = {
    "torch dense": "dense",
    "torch masked": "masked",
    "torch compacted": "compacted",
    "lossprune": "deployed",
}


@dataclass(frozen=True)
class TimedEngine:
    """One engine, and what it took for each batch size.

    Attributes:
        name: what the table calls it.
        version: of its package.
        told: what making the network ready took, by the batch size: ``ready_s`` and
            ``ready_processor_s``, ``first_call_s``, ``memory_mib``, and for other packages'
            engines ``difference``, from torch's outputs, relative to the largest.
        latency: of a call, by the batch size.
        size: bytes of the file that it reads.
    """

    name: str
    version: str
    told: Mapping[int, Mapping[str, Any]]
    latency: Mapping[int, Timing]
    size: int

    @property
    def wrong(self) -> bool:
        """Whether its outputs are not torch's."""
        differences = [told["difference"] for told in self.told.values() if "difference" in told]
        return not all(value is not None and value <= TOLERANCE for value in differences)

    def described(self) -> dict[str, Any]:
        """What a record says of it."""
        batches = {
            str(batch): {**told, "latency": asdict(self.latency[batch])}
            for batch, told in self.told.items()
        }
        return {
            "name": self.name,
            "version": self.version,
            "size": self.size,
            "wrong": self.wrong,
            "batches": batches,
        }


@dataclass(frozen=True)
class Asked:
    """How the engines are to be compared.

    Attributes:
        others: names of other packages' engines.
        peers: the Python of another environment, for those that this one lacks.
        batches: the batch sizes.
        threads: of each engine.
        seconds: for all of them at each batch size.
        request: what the processes of the network's forms are told.
        size: bytes of the file that the pruned ones are loaded from.
    """

    others: Sequence[str]
    peers: str | None
    batches: Sequence[int]
    threads: int
    seconds: float
    request: Mapping[str, Any]
    size: int


@dataclass(frozen=True)
class Beside:
    """The engines that were compared, and why another was not, by its name."""

    asked: Asked
    engines: Sequence[TimedEngine]
    left_out: Mapping[str, str]


def time_engines(source: Deployable, asked: Asked, progress: Progress) -> Beside:
    """Time all engines that there are, in turn; nothing where no other package's are asked for."""
    if not asked.others:
        return Beside(asked, (), {})
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as path, ExitStack() as stack:
        folder = Path(path)
        (folder / REQUEST).write_text(json.dumps(asked.request), encoding="utf-8")
        rows: dict[str, dict[int, Ready]] = {}

        def start(name: str, command: Sequence[str], forms: Mapping[str, str]) -> None:
            """Let an engine make its forms of the network ready, named as in the table."""
            progress.note(f"starting {name}")
            try:
                engine = stack.enter_context(Engine(name, command, folder / f"{name}.log"))
                for label, prefix in forms.items():
                    for batch in asked.batches:
                        engine.ready(f"{prefix}{batch}")
                    rows[label] = {b: Ready(engine, f"{prefix}{b}") for b in asked.batches}
            except EngineError as error:
                left_out[name] = str(error)

        worker = [sys.executable, "-m", form_worker.__name__, str(folder), str(asked.threads)]
        start("lossprune", worker, {label: f"{form}:" for label, form in _FORMS.items()})
        onnx = 0
        for name, python in _pythons(asked, left_out).items():
            try:
                onnx = onnx or _write_problems(source, asked.batches, folder)
            except (ImportError, PruningError) as error:
                left_out[name] = " ".join(str(error).split())
                continue
            start(name, worker_command(python, name, folder, asked.threads), {name: ""})
        taken = _timed(rows, asked, progress, left_out)
    sizes = {**dict.fromkeys(_FORMS, asked.size), "torch dense": state_bytes(source.dense)}
    timed = [
        _row(label, ready, taken, sizes.get(label, onnx))
        for label, ready in rows.items()
        if label not in left_out
    ]
    return Beside(asked, timed, left_out)


def _row(
    label: str,
    ready: Mapping[int, Ready],
    taken: Mapping[int, Mapping[str, Sequence[float]]],
    size: int,
) -> TimedEngine:
    (version,) = {row.engine.version for row in ready.values()}
    return TimedEngine(
        label,
        str(torch.__version__) if label.startswith("torch") else version,
        {batch: row.told for batch, row in ready.items()},
        {batch: Timing.of(taken[batch][label]) for batch in ready},
        size,
    )


def _pythons(asked: Asked, left_out: dict[str, str]) -> dict[str, str]:
    """The Python of each engine: this one's where it has it; told where there is none."""
    found = {}
    for name in asked.others:
        if find_spec(name) is not None:
            found[name] = sys.executable
        elif asked.peers is not None:
            found[name] = asked.peers
        else:
            left_out[name] = "it is not installed here; --peers names another Python"
    return found


def _write_problems(source: Deployable, batches: Sequence[int], folder: Path) -> int:
    """Write what other packages' engines read and return the bytes of the last ONNX file."""
    size = 0
    for batch in batches:
        match source.inputs(batch).example:
            case (Tensor() as example,):
                size = write_problem(folder / str(batch), source.masked, example)
            case _:
                raise PruningError("the network takes something else than one tensor")
    return size


def _timed(
    rows: Mapping[str, Mapping[int, Ready]],
    asked: Asked,
    progress: Progress,
    left_out: dict[str, str],
) -> dict[int, dict[str, list[float]]]:
    """Time all at every batch size; what is lost at one is left out."""
    taken: dict[int, dict[str, list[float]]] = {}
    for batch in asked.batches:
        progress.note(f"timing engines at batches of {batch}")
        left = {label: ready[batch] for label, ready in rows.items() if label not in left_out}
        taken[batch], lost = timed_in_turn(left, asked.seconds / max(len(left), 1))
        left_out |= lost
    return taken
