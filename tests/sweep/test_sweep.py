"""Sweeps as a person meets them: results, what is shown, and what is shared."""

import json
import os
import pty
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from lossprune import Mask
from lossprune.commands.sweep import SweepConfig, plan_runs
from lossprune.experiment import RunConfig, run
from lossprune.experiment.runner import opened
from lossprune.sweep.engines import split_cores
from lossprune.sweep.status import note_plan


def test_a_sweep_gives_what_each_run_gives_alone(undisturbed, tmp_path):
    """To the bit, though its workers share data, start network and first measurements."""
    config = SweepConfig(path=undisturbed.path)
    networks, masks = undisturbed.networks(), undisturbed.masks()
    for planned in plan_runs(config, str(undisturbed.plan)):
        record = undisturbed.runs[planned.config.name]
        alone = replace(planned.config, path=tmp_path, threads=record["environment"]["threads"])
        run(alone)
        for file in ("best_model.pt", "last_model.pt"):
            assert (alone.folder / file).read_bytes() == networks[f"{alone.name}/{file}"]
        if alone.prunes:
            assert Mask.load(alone.folder / "mask.safetensors") == masks[alone.name]
        found = undisturbed.without_times(json.loads((alone.folder / "record.json").read_text()))
        assert found == record


def test_a_second_sweep_touches_nothing(undisturbed):
    before = {file: file.stat().st_mtime_ns for file in undisturbed.path.glob("arch=*/*")}
    said = undisturbed.finish()
    assert "5 of 5 finished (5 before)" in said
    after = {file: file.stat().st_mtime_ns for file in undisturbed.path.glob("arch=*/*")}
    assert after == before


@pytest.mark.full("a line for each run, beside the live table")
def test_away_from_a_terminal_there_is_a_line_for_each_run(new_grid):
    said = new_grid.finish("--only", "pi=1")
    # On both streams; where it takes long, others say how far it is.
    lines = [line for line in said.splitlines() if " running: " not in line]
    assert lines[0] == "0 of 3 finished"
    assert lines[1].startswith("[1/3] baseline ")
    # What all have in common is not said.
    assert {line.split()[1] for line in lines[2:4]} == {"pm=LM:", "pm=QM:"}
    assert lines[4] == "3 of 3 finished"
    assert lines[5].startswith("lowest validation error: ")
    assert len(lines) == 6


def test_on_a_terminal_there_is_a_live_table(new_grid):
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        os.environ.update(COLUMNS="100", TERM="xterm")
        words = new_grid.command()
        os.execv(words[0], words)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:
            break
    assert os.waitpid(pid, 0)[1] == 0, shown.decode()
    text = shown.decode()
    assert "pruned to loss" in text
    assert "running" in text
    assert "lowest validation error: " in text
    assert "5 of 5 finished" in text


def test_status_tells_at_any_time(new_grid, command):
    grid = new_grid
    process = grid.start()
    (folder, *_) = grid.wait_for_pruning()
    answer = command("status", grid.path)
    assert answer.status == 0
    assert " running" in answer.out.splitlines()[0]
    assert f"running: {folder.name}: " in answer.out or "of 5 ended" in answer.out
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=30)
    psutil.wait_procs(below, timeout=10)
    assert process.pid == json.loads((grid.path / ".sweeps" / "grid.json").read_text())["pid"]
    stopped = command("status", grid.path).out.splitlines()
    assert "interrupted" in stopped[0]
    assert " running" not in stopped[0]
    assert stopped[1].startswith("plan grid: ")
    assert "not begun" in stopped[1]


def test_status_of_a_finished_sweep(undisturbed, command):
    lines = command("status", undisturbed.path).out.splitlines()
    assert lines[0] == f"{undisturbed.path}: 5 finished"
    assert lines[1] == "plan grid: 5 of 5 ended (5 finished), 0 not begun"
    assert lines[2].startswith("best pruned: arch=MLP")


def test_status_of_what_a_sweep_will_come_back_to(tmp_path, command):
    """It waits while that sweep's process, here this one, is there; else it was interrupted."""
    path = tmp_path / "results"
    config = RunConfig(arch="MLP", dataset="digits", prune_epoch=-1, epochs=2, path=path)
    with opened(config) as going:
        going.begin()
    assert command("status", path).out.splitlines() == [f"{path}: 1 interrupted"]
    note_plan(path, "own", [config.folder])
    told = command("status", path).out.splitlines()
    assert told[0] == f"{path}: 1 waiting"
    assert told[1] == "plan own: 0 of 1 ended (1 waiting), 0 not begun"


def test_status_of_no_folder(command):
    answer = command("status", "nowhere")
    assert answer.status == 2
    assert answer.err == "error: RESULTS must be a folder of results, but there is no nowhere\n"


def test_tensorboard_files_hold_the_curves(undisturbed):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folders = sorted((undisturbed.path / "tensorboard").iterdir())
    assert {folder.name for folder in folders} == set(undisturbed.runs)
    for folder in folders:
        record = undisturbed.runs[folder.name]
        events = accumulators.EventAccumulator(str(folder))
        events.Reload()
        rows = [*record["epochs"], *filter(None, [record["after_pruning"]])]
        losses = [event.value for event in events.Scalars("loss/valid")]
        assert losses == pytest.approx([row["scores"]["valid_loss"] for row in rows])
        if record["stages"]:
            after = [event.value for event in events.Scalars("stage/loss_after")]
            assert after == pytest.approx([stage["loss_after"] for stage in record["stages"]])


def test_two_sweeps_of_one_folder_share_the_work(new_grid):
    grid = new_grid
    first, second = grid.start(), grid.start()
    for process in (first, second):
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said
        assert "5 of 5 finished" in said
    assert list(grid.statuses().values()) == ["finished"] * 5
    assert not list(grid.path.glob("*/error.json"))


def test_workers_get_equal_shares_of_the_cores():
    cores = sorted(os.sched_getaffinity(0))
    shares = split_cores(len(cores))
    assert sorted(core for share in shares for core in share) == cores
    assert split_cores(1) == [cores]
    assert all(len(share) == 1 for share in split_cores(3 * len(cores)))


def test_the_driver_and_the_command_line_import_no_torch():
    code = (
        "import sys, lossprune.commands.sweep, lossprune.sweep.driver, lossprune.sweep.status;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
