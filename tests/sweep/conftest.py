"""Sweeps small enough for a test."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lossprune import Mask
from tests.processes import finish

PLAN = """
arch = "MLP"
dataset = "digits"
nepochs = 0
pe = 0
pr = 0.95
nex = 200
exp = true
pm = ["LM", "QM"]
pi = [1, 100]
reg = 1e-3
[baseline]
nepochs = 1
"""


class Grid:
    """A plan of 1 + 4 runs, swept by a process of its own."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.plan = folder / "grid.toml"
        self.path = folder / "results"
        self.plan.write_text(PLAN)
        self.flags = flags

    def command(self, *more: str) -> list[str]:
        words = ["sweep", str(self.plan), "--path", str(self.path), "--workers", "2", *self.flags]
        return [sys.executable, "-m", "lossprune", *words, *more]

    def start(self, *more: str, **options) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(*more), stderr=subprocess.PIPE, text=True, **options)

    def start_on_ray(self, address: str) -> subprocess.Popen[str]:
        command = self.command("--ray", address)
        at = command.index("--workers")
        return subprocess.Popen(command[:at] + command[at + 2 :], stderr=subprocess.PIPE, text=True)

    def finish(self, *more: str) -> str:
        """Sweep to the end, which must be a good one, and return what was said."""
        log = self.plan.with_name("said")
        log.unlink(missing_ok=True)
        finish(self.command(*more)[3:], log)
        return log.read_text()

    @property
    def runs(self) -> dict[str, dict]:
        """The records by folder, but for times."""
        return {
            record.parent.name: without_times(json.loads(record.read_text()))
            for record in sorted(self.path.glob("*/record.json"))
        }

    @staticmethod
    def without_times(value):
        return without_times(value)

    def statuses(self) -> dict[str, str]:
        return {name: record["status"] for name, record in self.runs.items()}

    def networks(self) -> dict[str, bytes]:
        """The bytes of all networks."""
        files = self.path.glob("*/*.pt")
        return {str(file.relative_to(self.path)): file.read_bytes() for file in files}

    def masks(self) -> dict[str, Mask]:
        return {file.parent.name: Mask.load(file) for file in self.path.glob("*/*.safetensors")}

    def wait_for_pruning(self, stages: int = 3) -> list[Path]:
        """Wait until runs are within their pruning, and return their folders."""
        return self.wait_until(lambda: [f for f in self.path.glob("*") if self.pruning(f, stages)])

    def pruning(self, folder: Path, stages: int) -> bool:
        try:
            record = json.loads((folder / "record.json").read_text())
        except (OSError, ValueError):
            return False
        return record["status"] == "running" and record["config"]["pi"] > stages

    @staticmethod
    def wait_until(found: Callable[[], Sequence], seconds: float = 300) -> list:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = list(found())
            if value:
                return value
            time.sleep(0.01)
        raise AssertionError("it did not happen in time")


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name != "seconds"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Grid:
    """The same sweep, done without any fault."""
    grid = Grid(tmp_path_factory.mktemp("undisturbed"))
    grid.finish("--tensorboard")
    assert len(grid.runs) == 5
    return grid


@pytest.fixture
def grid(tmp_path, undisturbed) -> Grid:
    """A sweep whose baseline is done and nothing else."""
    grid = Grid(tmp_path)
    (baseline,) = undisturbed.path.glob("*pe=-1*")
    grid.path.mkdir()
    shutil.copytree(baseline, grid.path / baseline.name)
    return grid


@pytest.fixture
def new_grid(tmp_path) -> Grid:
    """The same with nothing done."""
    return Grid(tmp_path)


@pytest.fixture
def check_same(undisturbed) -> Callable[[Grid], None]:
    """Compare a sweep that something happened to with the undisturbed one, to the bit."""

    def check(grid: Grid) -> None:
        assert grid.networks() == undisturbed.networks()
        assert grid.masks() == undisturbed.masks()
        here, there = grid.runs, undisturbed.runs
        assert here.keys() == there.keys()
        for record in (*here.values(), *there.values()):
            record["start"].pop("path")
        for name, record in here.items():
            for part, value in record.items():
                assert value == there[name][part], (name, part)
        kept = {"log.txt", "record.json", "best_model.pt", "last_model.pt", "mask.safetensors"}
        for folder in grid.path.glob("arch=*"):
            assert {file.name for file in folder.iterdir()} <= kept

    return check
