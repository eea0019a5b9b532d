"""Runs trained together come out as each does alone, whatever happens to some of them."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lossprune import Mask
from lossprune.experiment import FolderBusyError, RunConfig, RunFolder, RunRecord, run
from lossprune.experiment.group import run_together
from lossprune.experiment.runner import opened
from tests.processes import begin

PROGRAM = """
import resource, torch
from lossprune.experiment.prepare import Cache
from lossprune.experiment.group import run_together
if files:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
torch.set_num_threads(1)
run_together(configs, checkpoint_seconds=seconds, cache=Cache({"dataset": 2}))
"""

NEVER = 1e6  # seconds between two checkpoints

# Absolute, of weights below 1 and of losses below 3, after four epochs of 13 steps at a rate of
# 0.05: float32 rounds by 1e-7 in another order of sums, and SGD lets that grow a little.
TOLERANCE = 2e-5
COUNTED = 1.5 / 250  # of error rates: one example of the smallest split may fall on the other side


def start(configs: Sequence[RunConfig], seconds: float = 0.0, files: int = 0):
    """Train a group in a process of its own."""
    return begin(PROGRAM, configs=list(configs), seconds=seconds, files=files)


def config(path: Path, **more) -> RunConfig:
    settings = {"arch": "MLP", "dataset": "digits", "threads": 1, "epochs": 4, "lr": 0.05}
    pruning = {"criterion": "MP", "sparsity": 0.5, "examples": 200, "train": "dense"}
    return RunConfig(**{**settings, **pruning, "prune_epoch": -1, "path": path, **more})


def mixed(path: Path) -> list[RunConfig]:
    """Two seeds, dense and pruned, several rates and schedules, one of fewer epochs."""
    return [
        config(path),
        config(path, seed=2, l2=0.01),
        config(path, prune_epoch=0),
        config(path, prune_epoch=0, seed=2, sparsity=0.8, lr=0.1),
        config(path, decay=0.5, decay_every=2),
        config(path, epochs=2),
    ]


def networks(path: Path) -> dict[str, bytes]:
    return {str(it.relative_to(path)): it.read_bytes() for it in path.glob("*/*.pt")}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name != "seconds"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def records(path: Path, *ignored: str) -> dict[str, dict]:
    found = {it.parent.name: json.loads(it.read_text()) for it in path.glob("*/record.json")}
    return {
        name: {key: value for key, value in without_times(it).items() if key not in ignored}
        for name, it in found.items()
    }


def check_same(path: Path, expected: Path, *ignored: str) -> None:
    """To the bit, and nothing left behind but the results."""
    assert networks(path) == networks(expected)
    assert records(path, *ignored) == records(expected, *ignored)
    for mask in expected.glob("*/mask.safetensors"):
        assert Mask.load(path / mask.relative_to(expected)) == Mask.load(mask)
    kept = {"log.txt", "record.json", "best_model.pt", "last_model.pt", "mask.safetensors"}
    for folder in path.iterdir():
        assert {it.name for it in folder.iterdir()} <= kept


def check_close(found: RunRecord, expected: RunRecord) -> None:
    assert (found.status, found.message) == (expected.status, expected.message)
    assert len(found.epochs) == len(expected.epochs)
    for one, other in zip(found.epochs, expected.epochs, strict=True):
        for name, value in vars(other.scores).items():
            tolerance = COUNTED if name.endswith("error") else TOLERANCE
            assert getattr(one.scores, name) == pytest.approx(value, abs=tolerance), name


def check_weights(folder: Path, expected: Path) -> None:
    for name in ("best_model.pt", "last_model.pt"):
        one, other = (torch.load(it / name, weights_only=True) for it in (folder, expected))
        for key, weight in other["state_dict"].items():
            torch.testing.assert_close(one["state_dict"][key], weight, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed")
    for result in run_together(mixed(path), checkpoint_seconds=NEVER):
        assert isinstance(result, RunRecord)
    return path


def test_each_run_of_a_group_is_that_run_alone(undisturbed, tmp_path):
    for one, other in zip(mixed(undisturbed), mixed(tmp_path), strict=True):
        found = RunFolder(one.folder).settled()
        assert found is not None
        check_close(found, run(other))
        check_weights(one.folder, other.folder)
        if one.prunes:
            masks = [Mask.load(it.folder / "mask.safetensors") for it in (one, other)]
            assert masks[0] == masks[1]
        assert [(it["from_epoch"], it["mode"]) for it in found.training] == [(1, "stacked")]


def test_a_checkpoint_after_every_epoch_changes_nothing(undisturbed, tmp_path):
    run_together(mixed(tmp_path))
    check_same(tmp_path, undisturbed)


def test_killed_at_random_moments_a_group_goes_on_to_the_same_results(undisturbed, tmp_path):
    """Some runs have saved an epoch that others have not: those go first."""
    moments = random.Random(3)
    states = []
    for _ in range(6):
        process = start(mixed(tmp_path))
        count = len(list(tmp_path.glob("*/*")))
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*/.holder.json"))) < 3 and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.join(moments.uniform(0, 0.5))
        states.append((process.exitcode, count))
        process.kill()
        process.join(30)
    assert [code for code, _ in states].count(None) >= 2, states
    run_together(mixed(tmp_path), checkpoint_seconds=NEVER)
    for leftover in (*tmp_path.glob("*/.lock"), *tmp_path.glob("*/.holder.json")):
        leftover.unlink()  # of runs that a killed process had finished
    check_same(tmp_path, undisturbed)


def test_more_runs_than_a_process_may_hold_are_trained_in_parts(undisturbed, tmp_path):
    process = start(mixed(tmp_path), NEVER, files=104)
    process.join(60)
    assert process.exitcode == 0
    check_same(tmp_path, undisturbed, "training")
    reasons = {it["training"][0]["reason"].split(",")[0] for it in records(tmp_path).values()}
    assert reasons == {"3 networks in turn over the same batches"}


def test_a_run_that_diverges_after_some_epochs_leaves_what_it_leaves_alone(tmp_path):
    """Its rate grows; the group keeps no network of the epoch before, and yet leaves it."""

    def runs(path: Path) -> list[RunConfig]:
        return [config(path), config(path, decay=1e4), config(path, lr=1e30)]

    now, never, alone = (tmp_path / name for name in ("now", "never", "alone"))
    found = run_together(runs(now), checkpoint_seconds=0.0)
    assert [it.status for it in found if isinstance(it, RunRecord)] == [
        "finished",
        "diverged",
        "diverged",
    ]
    run_together(runs(never), checkpoint_seconds=NEVER)
    check_same(never, now, "training")  # where it says how many there were
    expected = [run(it) for it in runs(alone)]
    assert 0 < len(expected[1].epochs) < 4
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, RunRecord)
        assert (one.status, one.message) == (other.status, other.message)
        assert len(one.epochs) == len(other.epochs)
    assert isinstance(found[0], RunRecord)
    check_close(found[0], expected[0])


def test_a_busy_folder_and_a_failing_one_leave_the_others_unharmed(tmp_path, undisturbed):
    busy, failing, *others = mixed(tmp_path)
    (failing.folder / "last_model.pt").mkdir(parents=True)
    with RunFolder(busy.folder).locked():
        results = run_together([busy, failing, *others], checkpoint_seconds=NEVER)
    assert isinstance(results[0], FolderBusyError)
    assert isinstance(results[1], ValueError)
    assert str(results[1]).startswith(f"cannot write {failing.folder / 'last_model.pt'}: ")
    assert all(isinstance(it, RunRecord) and it.status == "finished" for it in results[2:])
    (failing.folder / "last_model.pt").rmdir()
    run_together(mixed(tmp_path))
    check_same(tmp_path, undisturbed, "training")


def test_a_run_leaves_its_group_to_be_pruned_and_goes_on_in_another(tmp_path):
    def runs(path: Path) -> list[RunConfig]:
        return [config(path, prune_epoch=2, sparsity=it) for it in (0.4, 0.6)]

    here, alone = runs(tmp_path / "here"), runs(tmp_path / "alone")
    left = run_together(here, checkpoint_seconds=NEVER)
    for result in left:
        assert isinstance(result, RunRecord)
        assert (result.status, len(result.epochs), result.after_pruning) == ("running", 2, None)
    pruned = [run(it, leave=lambda _: True) for it in here]
    assert all(it.status == "running" and it.after_pruning is not None for it in pruned)
    for found, other in zip(run_together(here), map(run, alone), strict=True):
        assert isinstance(found, RunRecord)
        check_close(found, other)
        assert [it["from_epoch"] for it in found.training] == [1]


def stop_after(configs: Sequence[RunConfig], epochs: int) -> None:
    """Leave runs alone in the midst of their training, as a kill would."""
    for it in configs:
        with opened(it) as going:
            going.begin()
            for _ in range(epochs):
                going.train()


def test_a_run_goes_on_in_a_group_and_alone(tmp_path):
    """Alone for an epoch, two in a group until one is held, and alone again."""
    here = [config(tmp_path / "here", seed=it, train="auto") for it in (1, 2)]
    stop_after(here, 1)
    longer = [replace(it, epochs=4) for it in here]
    results = run_together(longer)
    for it, found in zip(longer, results, strict=True):
        assert isinstance(found, RunRecord)
        assert [(way["from_epoch"], way["mode"]) for way in found.training] == [(2, "stacked")]
        alone = run(replace(it, path=tmp_path / "alone"))
        check_close(found, alone)


def test_a_group_that_was_killed_goes_on_alone(tmp_path):
    short = [config(tmp_path, seed=it, epochs=400, train="auto") for it in (1, 2)]
    process = start(short)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        begun = [RunFolder(it.folder).record() for it in short]
        if all(it is not None and it.epochs for it in begun):
            break
        time.sleep(0.01)
    process.kill()
    process.join(30)
    for it in short:
        with opened(it) as going:
            going.begin()
            done = going.state.epoch
            assert done > 0
            going.train()
            ways = [(way["from_epoch"], way["mode"]) for way in going.record.training]
            assert ways == [(1, "stacked"), (done + 1, "dense")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_a_group_is_the_runs_alone_whenever_it_saves(tmp_path):
    """Weights stay in the stack between epochs; a best network and a checkpoint fetch them."""

    def runs(name: str) -> list[RunConfig]:
        return [replace(it, device="cuda") for it in mixed(tmp_path / name)]

    now, never, alone = runs("now"), runs("never"), runs("alone")
    run_together(now, checkpoint_seconds=0.0)
    found = run_together(never, checkpoint_seconds=NEVER)
    for result, other in zip(found, map(run, alone), strict=True):
        assert isinstance(result, RunRecord)
        check_close(result, other)
    check_same(tmp_path / "now", tmp_path / "never")
    for one, other in zip(now, alone, strict=True):
        check_weights(one.folder, other.folder)
