import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lossprune.cli import main

ROOT = Path(__file__).parents[1]
IN_MEMORY = Path("/dev/shm")
ENOUGH = 4 << 30  # bytes


def pytest_configure():
    """Let programs take one thread, and keep the tests' files in memory where they fit.

    Tests share the cores, and threads that wait for one another would take them.  Runs flush every
    file that they write to the disk, and tests would wait for it; it must be possible to run the
    programs among the files.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not os.access(IN_MEMORY, os.W_OK):
        return
    there = os.statvfs(IN_MEMORY)
    if there.f_bavail * there.f_frsize > ENOUGH and not there.f_flag & os.ST_NOEXEC:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))


def pytest_collection_modifyitems(items):
    """Begin with what takes longest; leave out, unless asked, what a shorter test says too."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)
    if "LOSSPRUNE_FULL" in os.environ:
        return
    for item in items:
        if (mark := item.get_closest_marker("full")) is not None:
            reason = f"takes long: set LOSSPRUNE_FULL to run {mark.args[0]}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tests share the cores; small networks are no slower for it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder that LOSSPRUNE_DATA names, or ../shared/data beside the checkout."""
    return Path(os.environ.get("LOSSPRUNE_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def mnist_path(shared_data) -> Path:
    """A folder with real MNIST."""
    if not (shared_data / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST in {shared_data}; name its folder in LOSSPRUNE_DATA")
    return shared_data


class Answer(NamedTuple):
    """What a command answered."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    """Run ``lossprune`` with these arguments, in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Answer:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Answer(status, *capfd.readouterr())

    return run
