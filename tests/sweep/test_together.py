"""Sweeps that train their runs together, and what is killed in the midst of that."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from lossprune import Mask
from lossprune.sweep.grouping import split_evenly
from lossprune.sweep.plan_file import parse_plan

PLAN = """
arch = "MLP"
dataset = "digits"
seed = [1, 2]
nepochs = 24
pe = 0
pr = 0.5
nex = 100
exp = true
pm = ["LM", "QM"]
pi = 2
lr = 0.02
[baseline]
nepochs = 2
"""
TOLERANCE = 2e-4  # of losses below 3 after 24 epochs; float32 rounds by 1e-7, and SGD lets it grow


@pytest.fixture
def make_grid(new_grid):
    """Two baselines and four prunings to a half, which are trained densely."""

    def make(folder: Path):
        grid = type(new_grid)(folder, "--threads", "1")
        grid.plan.write_text(PLAN)
        return grid

    return make


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def quiet(make_grid, kept):
    """The same sweep by one worker, without any fault; done once."""
    grid = make_grid(kept)
    if not grid.path.exists():
        grid.said = grid.finish("--workers", "1")
        (kept / "said").write_text(grid.said)
    grid.said = (kept / "said").read_text()
    return grid


def check_same(grid, expected) -> None:
    assert grid.networks() == expected.networks()
    assert grid.masks() == expected.masks()
    here, there = grid.runs, expected.runs
    for record in (*here.values(), *there.values()):
        record["start"].pop("path")
        for way in record["training"]:
            way.pop("reason")  # which counts how many there were
    assert here == there


def ways(grid) -> set[tuple[int, str]]:
    return {(it["from_epoch"], it["mode"]) for run in grid.runs.values() for it in run["training"]}


@pytest.mark.slow
@pytest.mark.full("a group of baselines, beside groups that are killed")
def test_baselines_are_a_group_and_then_what_was_pruned_side_by_side(quiet, make_grid, tmp_path):
    lines = [line for line in quiet.said.splitlines() if line.startswith("training together: ")]
    assert lines == [
        "training together: baseline seed=1; baseline seed=2",
        "training together: 4 runs: pm=LM seed=1; pm=QM seed=1; pm=LM seed=2; …",
    ]
    assert ways(quiet) == {(1, "stacked")}
    alone = make_grid(tmp_path)
    said = alone.finish("--stack", "1")
    assert "training together" not in said
    assert ways(alone) == {(1, "dense")}
    assert [Mask.load(it).sparsity for it in alone.path.glob("*/mask.safetensors")]
    for name, record in alone.runs.items():
        found = quiet.runs[name]
        assert found["status"] == record["status"] == "finished"
        assert found["last"]["scores"]["valid_loss"] == pytest.approx(
            record["last"]["scores"]["valid_loss"], abs=TOLERANCE
        )


def training(grid, fewest: int = 3) -> list[int]:
    """The live process that trains a group of so many, once it does."""
    pids = []
    for holder in grid.path.glob("*/.holder.json"):
        try:
            pids.append(json.loads(holder.read_text())["pid"])
        except (OSError, ValueError):
            continue
    return [pid for pid in set(pids) if pids.count(pid) >= fewest and psutil.pid_exists(pid)]


@pytest.mark.slow
def test_whatever_is_killed_a_group_goes_on_to_the_same_results(quiet, make_grid, tmp_path):
    """A worker twice, at random moments; then the driver; then Ctrl-C, while status looks on."""
    grid, moments = make_grid(tmp_path), random.Random(5)
    process = grid.start("--workers", "1")
    for _ in range(2):
        (pid,) = grid.wait_until(lambda: training(grid))
        time.sleep(moments.uniform(0, 0.5))
        worker = psutil.Process(pid)
        os.kill(pid, signal.SIGKILL)
        assert not psutil.wait_procs([worker], timeout=10)[1]
    (pid,) = grid.wait_until(lambda: training(grid))
    worker = psutil.Process(pid)
    process.kill()
    _, said = process.communicate(timeout=30)
    assert said.count("its worker died (killed, or out of memory); they go on elsewhere") == 2
    assert not psutil.wait_procs([worker], timeout=10)[1]

    process = grid.start("--workers", "1", start_new_session=True)
    (pid,) = grid.wait_until(lambda: training(grid, 4))
    psutil.Process(pid).suspend()  # else it could be done before status has loaded
    command = [*grid.command()[:3], "status", str(grid.path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "4 running" in told.splitlines()[0]
    assert told.count("running: arch=MLP") == 4
    assert "of 24" in told
    psutil.Process(pid).resume()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "Traceback" not in said

    said = grid.finish("--workers", "1")
    assert "6 of 6 finished (2 before)" in said
    check_same(grid, quiet)


def test_a_diverging_member_is_reported_and_the_others_go_on(tmp_path, command):
    (tmp_path / "own.toml").write_text(
        'arch = "MLP"\ndataset = "digits"\npe = -1\nnepochs = 2\nlr = [1e30, 0.01, 0.02]\n'
    )
    answer = command("sweep", "own.toml", "--workers", "1", "--threads", "1")
    assert answer.status == 3
    assert "training together: baseline lr=1e+30; baseline lr=0.01; baseline lr=0.02" in answer.err
    assert "2 of 3 finished, 1 diverged" in answer.err


def test_groups_are_of_nearly_the_same_size_and_in_order():
    plan = parse_plan(
        'arch = "MLP"\ndataset = "digits"\npe = -1\nseed = [1, 2, 3, 4, 5, 6, 7]\n', "p"
    )
    runs = plan.expand()

    def sizes(most: int | None, places: int) -> list[int]:
        groups = split_evenly(runs, places, most)
        assert [run for group in groups for run in group] == list(runs)
        return sorted(map(len, groups))

    assert sizes(None, 1) == [7]
    assert sizes(None, 3) == [2, 2, 3]
    assert sizes(3, 1) == [2, 2, 3]
    assert sizes(3, 20) == [1] * 7
