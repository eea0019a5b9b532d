"""``torchrun experiments.py …``: two real processes, gloo, the real command line."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from lossprune.cli import main
from lossprune.experiment import RunConfig, RunFolder
from lossprune.pruning import Mask
from tests.processes import Processes, finish

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FLAGS = shlex.split(
    "--arch MLP --dataset digits --threads 1 --pm QM --exp --pr 0.9 --nex 199 --nepochs 6 --pe 2 "
    "--pi 4 --lr 0.05"
)
# 1,297 examples leave a batch of 97, and 199 one of 99: the shares are uneven.

# One process adds up a gradient in another order than two; over 78 steps in single precision the
# difference grows to less than this, relative to the largest weight, or of a loss.
ROUNDING = 1e-4


def several(root: Path, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, str(root / "experiments.py"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, **options
    )


def folder_in(path: Path) -> Path:
    (folder,) = path.iterdir()
    return folder


def record_of(path: Path) -> dict:
    return json.loads((folder_in(path) / "record.json").read_text())


def network(path: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder_in(path) / name, weights_only=True)["state_dict"]


def mask_of(path: Path) -> Mask:
    return Mask.load(folder_in(path) / "mask.safetensors")


def what_is_left(path: Path) -> dict[str, object]:
    """All that a run leaves, but for times, the lock of a killed process, and the path."""

    def timeless(value):
        if isinstance(value, dict):
            return {name: timeless(item) for name, item in value.items() if name != "seconds"}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    models = ("best_model.pt", "last_model.pt", "mask.safetensors")
    files = {file.name for file in folder_in(path).iterdir()} - {".lock", ".holder.json"}
    contents = {name: (folder_in(path) / name).read_bytes() for name in models}
    return {"files": files, "record": timeless(record_of(path)), **contents}


@pytest.fixture(scope="module")
def together(root, tmp_path_factory):
    """A run of two processes that nothing disturbed: its path, and what it said."""
    path = tmp_path_factory.mktemp("together")
    done = several(root, *FLAGS, "--path", path)
    assert done.returncode == 0, done.stderr
    return path, done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone")
    assert main(["run", *FLAGS, "--train", "dense", "--path", str(path)]) == 0
    return path


def assert_same_to_rounding(one: Path, other: Path) -> None:
    assert mask_of(one) == mask_of(other)
    for name in ("best_model.pt", "last_model.pt"):
        ours, theirs = network(one, name), network(other, name)
        assert ours.keys() == theirs.keys()
        for key, weight in theirs.items():
            allowed = ROUNDING * float(weight.abs().max())
            assert float((ours[key] - weight).abs().max()) <= allowed, key
    ours, theirs = record_of(one), record_of(other)
    for name in ("before_pruning", "after_pruning", "best", "last"):
        assert ours[name]["epoch"] == theirs[name]["epoch"]
        assert ours[name]["scores"] == pytest.approx(theirs[name]["scores"], rel=ROUNDING)
    for name in ("loss_before", "loss_after", "predicted_change"):
        found = [[stage[name] for stage in record["stages"]] for record in (ours, theirs)]
        assert found[0] == pytest.approx(found[1], rel=ROUNDING)


def test_two_processes_do_what_one_does(together, alone):
    assert_same_to_rounding(together[0], alone)


def test_one_speaks_and_writes_and_the_record_says_how_many(together):
    path, done = together
    lines = done.stderr.splitlines()
    for said in ("folder: ", "start: ", *(f"epoch {epoch}/6" for epoch in range(1, 7)), "pruned: "):
        assert len([line for line in lines if line.startswith(said)]) == 1, said
    assert {file.name for file in folder_in(path).iterdir()} == {
        "best_model.pt", "last_model.pt", "log.txt", "mask.safetensors", "record.json",
    }  # fmt: skip
    record = record_of(path)
    assert record["environment"]["processes"] == 2
    ways = [(it["from_epoch"], it["mode"]) for it in record["training"]]
    assert ways == [(1, "distributed"), (3, "distributed")]
    assert "2 processes share every batch" in record["training"][-1]["reason"]
    assert "sparse training is for one process" in record["training"][-1]["reason"]


def test_a_finished_run_is_answered_once_and_not_touched(together, tmp_path):
    path, _ = together
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files(path)}
    finish(["run", *FLAGS, "--path", str(path)], tmp_path / "log", 2)
    said = (tmp_path / "log").read_text().splitlines()
    assert said.count("Experiment already exists!") == 1
    assert not [line for line in said if line.startswith("epoch")]
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files(path)} == before


def files(path: Path) -> list[Path]:
    return sorted(folder_in(path).iterdir())


@pytest.fixture(scope="module")
def killed(root, tmp_path_factory):
    """What is left of a run whose launcher was killed by kill -9 after the second stage."""
    path = tmp_path_factory.mktemp("killed") / "results"
    command = [*TORCHRUN, str(root / "experiments.py"), *FLAGS, "--path", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stderr is not None
        members = []
        for line in launcher.stderr:
            members = members or psutil.Process(launcher.pid).children()
            if line.startswith("stage 2/4"):
                break
        # Before it goes on: what follows the second stage would else be a matter of luck.
        for member in members:
            member.send_signal(signal.SIGSTOP)
        launcher.kill()
        launcher.wait(30)
        time.sleep(1)  # longer than they go without a look at it: they end as they wake
        for member in members:
            member.send_signal(signal.SIGCONT)
        _, alive = psutil.wait_procs(members, timeout=30)
        assert not alive, "processes outlived their launcher"
    return path


def test_killed_it_goes_on_to_the_same_to_the_bit(together, killed, tmp_path):
    shutil.copytree(killed, tmp_path / "results")
    finish(["run", *FLAGS, "--path", str(tmp_path / "results")], tmp_path / "log", 2)
    said = (tmp_path / "log").read_text().splitlines()
    assert len([line for line in said if line.startswith("going on after")]) == 1
    assert what_is_left(tmp_path / "results") == what_is_left(together[0])


def test_one_process_goes_on_where_two_stopped(killed, alone, tmp_path):
    shutil.copytree(killed, tmp_path / "results")
    assert main(["run", *FLAGS, "--path", str(tmp_path / "results")]) == 0
    assert mask_of(tmp_path / "results") == mask_of(alone)
    record = record_of(tmp_path / "results")
    assert record["environment"]["processes"] == 2
    assert record["training"][0]["mode"] == "distributed"
    assert record["training"][-1]["mode"] in ("dense", "sparse")
    best, expected = record["best"]["scores"], record_of(alone)["best"]["scores"]
    assert best == pytest.approx(expected, rel=ROUNDING)


def test_a_wrong_flag_is_one_sentence(root, tmp_path):
    done = several(root, *FLAGS, "--pr", "3", "--path", tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert said == ["error: --pr must be a number in [0, 1), got 3.0"]
    assert done.returncode == 1  # torchrun's
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_one_sentence(tmp_path):
    path = tmp_path / "results"
    config = RunConfig(arch="MLP", dataset="digits", prune_epoch=-1, path=path)
    flags = ["--arch", "MLP", "--dataset", "digits", "--pe", "-1", "--path", str(path)]
    with RunFolder(config.folder).locked():
        both = Processes(["run", *flags], tmp_path / "log", 2)
        both.join(60)
    assert [it.exitcode for it in both.members] == [2, 2]
    (said,) = [line for line in both.said.splitlines() if line.startswith("error:")]
    assert f"is in use by process {os.getpid()} on " in said


def test_what_one_process_lacks_ends_all_with_one_sentence(tmp_path, together, monkeypatch):
    """The second one is on a machine without the start network."""
    start, elsewhere = tmp_path / "start.pt", tmp_path / "elsewhere"
    shutil.copy(folder_in(together[0]) / "best_model.pt", start)
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = ["run", *FLAGS, "--model_0", "start.pt", "--path", str(tmp_path / "results")]
    both = Processes(arguments, tmp_path / "log", 2, folders=[tmp_path, elsewhere])
    both.join(60)
    assert [it.exitcode for it in both.members] == [2, 2]
    errors = [line for line in both.said.splitlines() if "error" in line]
    assert errors == ["error: --model_0: no file start.pt"]
    assert "Traceback" not in both.said
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweep", "mlp-mnist"], "error: lossprune sweep is for one process: start it without"),
        (["run", *FLAGS, "--train", "sparse"], "error: --train sparse cannot train MLP: sparse"),
    ],
)
def test_what_is_for_one_process_is_refused_once(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    both = Processes(arguments, tmp_path / "log", 2)
    both.join(60)
    assert [it.exitcode for it in both.members] == [2, 2]
    errors = [line for line in both.said.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith(said)


def test_a_process_that_is_killed_takes_the_other_along(tmp_path):
    """Without a launcher that would end it: it must not wait for ever."""
    flags = [*FLAGS, "--nepochs", "5000", "--path", str(tmp_path / "results")]
    both = Processes(["run", *flags], tmp_path / "log", 2)
    both.wait_for("epoch 3/")
    first, second = both.members
    second.kill()
    both.join(60)
    assert first.exitcode == 2
    errors = [line for line in both.said.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith("error: another process of the run was killed")
    assert "Traceback" not in both.said


def test_a_launcher_that_forgot_something_is_one_sentence(tmp_path):
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "lossprune.cli", "run", *FLAGS, "--path", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: "
        "start several processes with torchrun"
    )
