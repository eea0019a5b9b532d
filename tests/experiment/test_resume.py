"""Nothing is lost: runs that are killed, or find no space, go on as if they had never stopped."""

import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lossprune.cli import main
from lossprune.experiment.folder import MASK
from lossprune.kernels.compiler import compiler_available
from lossprune.pruning import Mask
from tests.compilers import hide_compilers
from tests.processes import Processes, finish

FLAGS = shlex.split(
    "run --arch MLP --dataset digits --threads 1 --pm QM --exp --pr 0.95 --nex "
    "200 --nepochs 60 --pe 20 --pi 30 --lr 0.05"
)


def the_run(path: Path) -> Path:
    (folder,) = path.iterdir()
    return folder


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name != "seconds"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def result(path: Path) -> dict:
    """All that a run leaves, but for times."""
    folder = the_run(path)
    lines = (folder / "log.txt").read_text().splitlines()
    models = ("best_model.pt", "last_model.pt")
    return {
        # A process killed after its last write leaves its lock; a finished run is not touched.
        "files": {file.name for file in folder.iterdir()} - {".lock", ".holder.json"},
        "log": [line if line.startswith("#") else line.rsplit("\t", 1)[0] for line in lines],
        "record": without_times(json.loads((folder / "record.json").read_text())),
        "mask": {name: kept.tolist() for name, kept in Mask.load(folder / MASK).items()},
        **{name: (folder / name).read_bytes() for name in models},
    }


def state(path: Path) -> str:
    """Where a killed run is."""
    try:
        record = json.loads((the_run(path) / "record.json").read_text())
    except (FileNotFoundError, ValueError):
        return "nothing"
    if record["before_pruning"] and not record["after_pruning"]:
        return "pruning"
    return "training"


# The last one where the process before was killed in the moment after its last write.
WORDS = ("start: ", "going on", "Experiment already exists")


@pytest.fixture(params=["dense", "sparse"])
def way(request) -> list[str]:
    """Both ways of fine-tuning."""
    if request.param == "sparse" and not compiler_available():
        pytest.skip("no C compiler here")
    return ["--train", request.param]


@pytest.mark.slow
@pytest.mark.full("random moments, beside any two writes")
@pytest.mark.parametrize("count", [1, 2])
def test_killed_at_random_moments_it_ends_as_if_never_stopped(tmp_path, way, count):
    """Six of them for one process; each takes two of them seconds more."""
    if count > 1 and way[-1] == "sparse":
        pytest.skip("several processes train densely")
    undisturbed, log = tmp_path / "undisturbed", tmp_path / "log"
    flags = [*FLAGS, *way]
    finish([*flags, "--path", str(undisturbed)], log, count)
    record = json.loads((the_run(undisturbed) / "record.json").read_text())
    moments = random.Random(20)
    killed, states = tmp_path / "killed", []
    kills = 6 if count == 1 else 5
    while len(states) < kills:
        told = tmp_path / f"log-{len(states)}"
        process = Processes([*flags, "--path", str(killed)], told, count)
        process.wait_for(*WORDS)
        # So that the kills spread over the run.
        process.join(moments.uniform(0, 1.7 * record["seconds"] / kills))
        if process.exitcode is not None:
            # It came to its end before the last kill: begin another run, to be killed as well.
            assert process.exitcode == 0, process.said
            assert result(killed) == result(undisturbed)
            killed = tmp_path / f"killed-{len(states)}"
            told.unlink()
            continue
        process.kill()
        process.join(30)
        states.append(state(killed))
    finish([*flags, "--path", str(killed)], log, count)
    assert result(killed) == result(undisturbed)
    assert {"pruning", "training"} <= set(states), states


class Killed(BaseException):
    """What kill -9 leaves of a process: nothing of it runs on, but that ``main`` tells of it."""


@pytest.fixture
def stop_before(monkeypatch) -> Callable[[int], None]:
    """Let this process be killed before so many files from now are put in place or removed."""
    left = [0]

    def stopping(operation):
        def instead(path, *args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return operation(path, *args, **kwargs)

        return instead

    monkeypatch.setattr(Path, "replace", stopping(Path.replace))
    monkeypatch.setattr(Path, "unlink", stopping(Path.unlink))

    def set_left(count: int) -> None:
        left[0] = count

    return set_left


def test_killed_between_any_two_writes_it_ends_as_if_never_stopped(tmp_path, stop_before, way):
    """Stops before every single rename in turn: there is no moment between two others."""
    flags = shlex.split(
        "run --arch MLP --dataset digits --threads 1 --pm LM --exp --pr 0.9 --nex "
        "100 --nepochs 3 --pe 1 --pi 2"
    )
    flags += way
    assert main([*flags, "--path", str(tmp_path / "undisturbed")]) == 0
    expected = result(tmp_path / "undisturbed")
    stops = 0
    for stop in range(1, 200):
        path = tmp_path / f"stop-{stop}"
        stop_before(stop)
        status = main([*flags, "--path", str(path)])
        stop_before(0)
        if status == 0:
            break
        stops += 1
        assert main([*flags, "--path", str(path)]) == 0
        assert result(path) == expected, f"stopped before write {stop}"
    assert stops > 20


@pytest.mark.slow
@pytest.mark.full("VGG11, compacted, where a smaller one over its kept weights runs too")
def test_a_compacted_network_is_trained_on_as_if_never_stopped(
    tmp_path, stop_before, capfd, monkeypatch
):
    """After an epoch: the checkpoint holds the ordinary network."""
    hide_compilers(monkeypatch)  # it would be trained over its kept weights alone
    random = np.random.default_rng(1)
    for split in ("train", "valid", "test"):
        for name, count in product("abc", range(4)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{count}.png")
    flags = shlex.split(
        "run --arch VGG11 --dataset folder --threads 1 --pm LM --pr 0.97 --nex 12 --nepochs 2 "
        "--pe 0 --lr 0.05"
    )
    flags += ["--data_path", str(tmp_path / "images")]
    assert main([*flags, "--path", str(tmp_path / "undisturbed")]) == 0
    expected = result(tmp_path / "undisturbed")
    (way,) = expected["record"]["training"]
    assert way["mode"] == "compacted"
    stop_before(19)
    assert main([*flags, "--path", str(tmp_path / "killed")]) == 2
    assert "raised Killed" in capfd.readouterr().err
    stop_before(0)
    assert main([*flags, "--path", str(tmp_path / "killed")]) == 0
    assert "going on after epoch 1" in capfd.readouterr().err
    assert result(tmp_path / "killed") == expected


# While pruning; while training and while fine-tuning. Each takes the seconds that the other process
# waits for a word; that no moment between two writes is another is tested with one process.
@pytest.mark.slow
@pytest.mark.parametrize(
    "stops", [(14,), pytest.param((6, 26), marks=pytest.mark.full("more moments"))]
)
def test_two_processes_of_which_one_is_killed_between_two_writes(tmp_path, stops):
    """The one that writes; the other ends by itself, and both go on as if never stopped."""
    flags = shlex.split(
        "run --arch MLP --dataset digits --threads 1 --pm LM --exp --pr 0.9 --nex "
        "100 --nepochs 3 --pe 1 --pi 2"
    )
    log, undisturbed, again = (tmp_path / name for name in ("log", "undisturbed", "again"))
    for path in (undisturbed, again):
        finish([*flags, "--path", str(path)], log, 2)
    expected = result(undisturbed)
    assert result(again) == expected, "the same command twice"
    for stop in stops:
        path = tmp_path / f"stop-{stop}"
        processes = Processes([*flags, "--path", str(path)], log, 2, stop=stop)
        processes.join(60)
        assert processes.exitcode, "it ended well, or waits for one that is no more"
        finish([*flags, "--path", str(path)], log, 2)
        assert result(path) == expected, f"stopped before write {stop}"


SHORT = shlex.split("run --arch MLP --dataset digits --threads 1 --nepochs 3 --pe -1 --path")


def test_no_space_left_is_one_sentence_and_loses_nothing(tmp_path):
    """A limit on the size of files makes writing fail as a full disk does."""
    path, log = tmp_path / "results", tmp_path / "log"
    # Networks fit, and the first checkpoint, which has no momentum yet; the next does not.
    full = Processes([*SHORT, str(path)], log, largest_file=300_000)
    full.join(120)
    assert full.exitcode == 2
    folder = the_run(path)
    said = full.said.splitlines()[-1]
    assert said.startswith(f"error: no space left to write {folder / 'checkpoint.pt'}")
    assert "Traceback" not in full.said
    assert json.loads((folder / "record.json").read_text())["status"] == "running"
    assert torch.load(folder / "best_model.pt", weights_only=True)["metadata"]["epoch"] == 0
    assert not list(folder.glob("*.part"))
    finish([*SHORT, str(path)], log)
    undisturbed = tmp_path / "undisturbed"
    assert main([*SHORT, str(undisturbed)]) == 0
    assert (folder / "last_model.pt").read_bytes() == (
        the_run(undisturbed) / "last_model.pt"
    ).read_bytes()


def test_a_full_disk(tmp_path):
    """A file system of one megabyte, where this system lets us mount one."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that this process lacks")
    try:
        (disk / "ballast").write_bytes(bytes(500_000))
        full = Processes([*SHORT, str(disk / "results")], log)
        full.join(120)
        assert full.exitcode == 2
        assert "error: no space left to write" in full.said
        record = the_run(disk / "results") / "record.json"
        if record.exists():
            assert json.loads(record.read_text())["status"] == "running"
        (disk / "ballast").unlink()
        subprocess.run([*mount[:4], "remount,size=8m", *mount[5:]], check=True)
        finish([*SHORT, str(disk / "results")], log)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_second_process_is_told_who_is_at_work(tmp_path):
    log = tmp_path / "log"
    arguments = [*FLAGS, "--path", str(tmp_path / "results")]
    first = Processes(arguments, log)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("results/*/record.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        second = subprocess.run(
            [sys.executable, "-m", "lossprune.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if first.exitcode is None:
            assert second.returncode == 2
            assert f"is in use by process {first.pid} on " in second.stderr
    finally:
        first.kill()
        first.join(30)
    assert second.returncode in (0, 2)
