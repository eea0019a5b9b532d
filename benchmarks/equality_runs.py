"""The runs that :mod:`benchmarks.equality` makes with two trees: their commands, and doing them.

A command is one line.  Its first word says what is called: ``lossprune`` (``python -m lossprune``),
``experiments.py``, ``torchrun`` (the same in two processes), or ``calls``, a program of the public
names in :mod:`benchmarks.equality_calls`.  ``@PATTERN`` is the one file of that pattern.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # that a command may take

_MLP = "--arch MLP --dataset digits --threads 1 --lr 0.05"
_CALLS = "-m benchmarks.equality_calls"
_DENSE = f"{_MLP} --pe -1 --nepochs 4 --dec 0.5 --dec_every 2"
_START = "--model_0 @dense/*/best_model.pt"
_IMAGES = "--threads 1 --lr 0.02 --data_path images"
_KILLED = f"run {_MLP} --pe 20 --nepochs 60 --pm QM --pi 100 --exp --nex 200 --train dense"
_PRUNED = "prune build:network --data build:data --threads 1 --examples 200"


@dataclass(frozen=True)
class Command:
    """One command of a run.

    Attributes:
        line: its words.
        status: the exit status that it must have.
        kill: it is killed as soon as it says a line that begins so.
        say: whether what it says on standard error is compared as well: what workers and several
            processes say comes in any order.
    """

    line: str
    status: int = 0
    kill: str = ""
    say: bool = True


RUNS: Mapping[str, tuple[Command, ...]] = {
    "dense training": (
        Command(f"experiments.py {_DENSE} --path dense"),
        Command(f"lossprune run {_DENSE} --path dense"),  # it is there already
        Command(
            f"lossprune run {_MLP} {_START} --nepochs 3 --pm OBD --pi 3 --pr 0.9 --reg 1e-3 "
            "--train dense --path pruned"
        ),
        Command(f"lossprune run {_MLP} --pe 1 --nepochs 2 --amp bf16 --path amp"),
        Command(f"lossprune run {_MLP} --pe -1 --nepochs 2 --lr 1e30 --path diverged", status=3),
        Command("lossprune compare dense pruned"),
    ),
    "sparse training": (
        Command(
            f"lossprune run {_MLP} --pe 2 --nepochs 5 --pm QM --pi 14 --exp --pr 0.95 --reg 1e-3 "
            "--train sparse --path sparse"
        ),
        Command(f"lossprune run {_MLP} --pe 1 --nepochs 4 --pm LM --pi 3 --pr 0.9 --path auto"),
        Command("calls clocked deploy @sparse/* --out deployed --batch 1,20 --seconds 0.1"),
    ),
    "convolutions, compacted": (
        Command("calls images"),
        Command(
            f"lossprune run --arch VGG11 --dataset folder {_IMAGES} --pm MP --nex 60 --pr 0.99 "
            "--nepochs 2 --pe 1 --batch_size 40 --path vgg"
        ),
        Command(
            f"lossprune run --arch PreActResNet18 --dataset folder {_IMAGES}/small --pm QM "
            "--pi 2 --exp --nex 12 --pr 0.9 --nepochs 2 --batch_size 40 --path resnet"
        ),
        Command(
            f"lossprune run --arch ResNet18 --dataset imagenet --image_size 32 {_IMAGES} --pm OBD "
            "--estimator monte-carlo:2 --nex 12 --pr 0.8 --nepochs 1 --batch_size 30 --path photos"
        ),
    ),
    "trained together": (
        Command("calls plans"),
        Command("lossprune sweep together.toml --workers 1 --threads 1 --stack 8", say=False),
        Command("lossprune status results"),
    ),
    "sweep and report": (
        Command("calls plans"),
        Command("lossprune sweep sweep.toml --dry-run"),
        Command("lossprune sweep sweep.toml --workers 2 --threads 1 --stack 1", say=False),
        Command("calls timeless results"),
        Command("lossprune report timeless --out report --records records.parquet"),
        Command("lossprune report records.parquet --out again"),
    ),
    "two processes": (
        Command(
            f"torchrun {_MLP} --pm QM --exp --pr 0.9 --nex 199 --nepochs 4 --pe 2 --pi 4",
            say=False,
        ),
    ),
    "killed and resumed": (
        *(Command(f"lossprune {_KILLED}", kill=at) for at in ("epoch 5/", "stage 9/", "epoch 25/")),
        Command(f"lossprune {_KILLED}", say=False),
    ),
    "criteria": (Command("calls criteria"), Command("calls losses")),
    "networks": (Command("calls networks"), Command("calls words")),
    "deployment": (
        Command("calls deployment"),
        Command("calls build"),
        Command(f"lossprune {_PRUNED} --sparsity 0.9 --stages 3 --reg 1e-3 --out pruned"),
        Command(f"lossprune {_PRUNED} --pattern 2:4 --exclude 0.weight --out pattern"),
        Command("calls clocked deploy pruned --out deployed --batch 1,20 --seconds 0.1"),
    ),
}


class FailedError(Exception):
    """A command ended otherwise than it must."""


class Doing:
    """Runs under way, each command a session of its own, which :meth:`stop` ends."""

    def __init__(self) -> None:
        self._live: set[subprocess.Popen[str]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def do(self, run: str, tree: Path, begin: Path, folder: Path) -> None:
        """Do all commands of a run in ``folder`` with ``tree``; what is killed is of ``begin``.

        Raises:
            FailedError: a command did not end as it must.
        """
        folder.mkdir(parents=True)
        for number, command in enumerate(RUNS[run], start=1):
            its = begin if command.kill else tree
            out, err = (folder / f"{number}.{kind}" for kind in ("out", "err"))
            words = [sys.executable, *words_of(command.line, its, folder)]
            with out.open("w") as says, err.open("w+") as tells:
                status = self._wait(
                    words, environment(its, folder), folder, command.kill, says, tells
                )
            text = err.read_text()
            if command.kill or not command.say:
                err.unlink()
            if command.kill:
                out.unlink()  # whether it was killed in time depends on the machine, not the result
            elif status != command.status:
                told = text.strip().splitlines()[-1:]
                raise FailedError(f"{command.line}: exit status {status}: {''.join(told)}")

    def _wait(
        self, words: list[str], its: dict[str, str], folder: Path, kill: str, *told: IO[str]
    ) -> int:
        """Wait for the end of a command; what it says goes to the two files."""
        with self._lock:
            if self._stopped:
                raise FailedError("stopped")
            process = subprocess.Popen(
                words,
                cwd=folder,
                env=its,
                stdin=subprocess.DEVNULL,
                stdout=told[0],
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._live.add(process)
        watch = threading.Timer(SECONDS, end, [process])
        watch.start()
        try:
            for line in process.stderr or ():
                told[1].write(line)
                if kill and line.startswith(kill):
                    end(process)
            return process.wait()
        finally:
            watch.cancel()
            with self._lock:
                self._live.discard(process)

    def stop(self) -> None:
        """End all commands, and begin no other."""
        with self._lock:
            self._stopped = True
            for process in self._live:
                end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a command and what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def words_of(line: str, tree: Path, folder: Path) -> list[str]:
    """Return the words of a command, for Python."""
    program, *words = shlex.split(line)
    words = [found(folder, word) if word.startswith("@") else word for word in words]
    launched = "-m torch.distributed.run --standalone --nproc-per-node 2"
    first = {
        "lossprune": ["-m", "lossprune"],
        "experiments.py": [str(tree / "experiments.py")],
        "torchrun": [*launched.split(), str(tree / "experiments.py")],
        "calls": _CALLS.split(),
    }
    return [*first[program], *words]


def found(folder: Path, word: str) -> str:
    matches = sorted(folder.glob(word[1:]))
    if len(matches) != 1:
        raise FailedError(f"{len(matches)} files are {word[1:]}, not one")
    return str(matches[0].relative_to(folder))


def environment(tree: Path, folder: Path) -> dict[str, str]:
    """Return what a command of a tree finds around it: the same for both but for the tree."""
    left_out = ("LOSSPRUNE_", "PYTHON", "SLURM_", "TORCHELASTIC_")
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(left_out) and name not in launched
    }
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {
        **(kept | threads),
        "PYTHONPATH": os.pathsep.join((str(tree / "src"), str(ROOT))),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LOSSPRUNE_CACHE": str(folder.parents[1] / f"cache-{folder.name}"),
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
