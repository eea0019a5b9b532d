"""Whatever is killed, no finished result is lost or counted twice, and the same command goes on."""

import json
import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes below this one, with the folder that each holds."""
    return psutil.Process(process.pid).children(recursive=True)


def holder(folder) -> int:
    return json.loads((folder / ".holder.json").read_text())["pid"]


def mtimes(grid) -> dict[str, int]:
    return {
        str(file): file.stat().st_mtime_ns
        for file in grid.path.glob("*/record.json")
        if '"finished"' in file.read_text()
    }


@pytest.mark.full("a killed worker, beside a killed driver with all its workers")
def test_a_killed_worker_takes_nothing_with_it(grid, check_same):
    process = grid.start()
    (folder, *_) = grid.wait_for_pruning()
    (pid,) = grid.wait_until(lambda: [holder(folder)] if (folder / ".holder.json").exists() else [])
    os.kill(pid, signal.SIGKILL)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert said.count("its worker died") == 1
    assert "Traceback" not in said
    assert "5 of 5 finished" in said
    check_same(grid)


def test_a_killed_driver_leaves_no_worker_and_the_same_command_goes_on(grid, check_same):
    process = grid.start()
    grid.wait_for_pruning()
    below = workers(process)
    assert below
    process.kill()
    process.communicate(timeout=30)
    gone, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    assert len(gone) == len(below)
    assert set(grid.statuses().values()) <= {"finished", "running"}
    before = mtimes(grid)
    said = grid.finish()
    assert f"5 of 5 finished ({len(before)} before)" in said
    after = mtimes(grid)
    assert {file: after[file] for file in before} == before
    check_same(grid)


def test_ctrl_c_stops_at_once_and_the_same_command_goes_on(grid, check_same):
    process = grid.start(start_new_session=True)  # a terminal sends it to all of the group
    grid.wait_for_pruning()
    below = workers(process)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 130
    assert said.endswith("interrupted: the same command goes on from there\n")
    assert "Traceback" not in said
    assert not psutil.wait_procs(below, timeout=10)[1]
    grid.finish()
    check_same(grid)


def test_ctrl_c_while_workers_load_torch_is_one_line(grid):
    process = grid.start(start_new_session=True)
    grid.wait_until(lambda: [it for it in workers(process) if "forkserver" in str(it.cmdline())])
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[1:] == ["interrupted: the same command goes on from there"]


@pytest.mark.full("a full disk of a sweep, beside that of a run")
def test_a_full_disk_stops_the_sweep_and_the_same_command_goes_on(grid, check_same):
    """A file system of a megabyte or two, where this system lets us mount one."""
    filled = grid.path
    held = filled.with_name("held")
    filled.rename(held)
    filled.mkdir()
    size = sum(file.stat().st_size for file in held.rglob("*") if file.is_file())
    room = size + 1_000_000  # about one run
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(filled)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that this process lacks")
    try:
        shutil.copytree(held, filled, dirs_exist_ok=True)
        process = grid.start()
        _, said = process.communicate(timeout=100)
        assert process.returncode == 2, said
        assert said.splitlines()[-1].startswith("error: no space left to write ")
        assert "Traceback" not in said
        assert len(grid.runs) < 5
        subprocess.run(["mount", "-o", "remount,size=64m", str(filled)], check=True)
        grid.finish()
        check_same(grid)
    finally:
        subprocess.run(["umount", str(filled)], check=True)


def test_a_diverging_run_is_reported_and_the_others_go_on(tmp_path, mnist_path, command):
    (tmp_path / "own.toml").write_text(
        'arch = "MLP"\ndataset = "mnist"\npe = -1\nnepochs = 1\nlr = [1e30, 0.01]\n'
    )
    data = ["--data_path", mnist_path]
    answer = command("sweep", "own.toml", "--workers", "2", *data)
    assert answer.status == 3
    assert "1 of 2 finished, 1 diverged" in answer.err
    assert "lr=1e+30: diverged: epoch 1: the training loss is not finite" in answer.err
    assert "    # diverged: epoch 1" in answer.err  # the last lines of its log
    again = command("sweep", "own.toml", *data)
    assert again.status == 3
    assert "1 of 2 finished (2 before), 1 diverged" in again.err
    status = command("status", "results")
    assert "results: 1 finished, 1 diverged" in status.out


def test_what_starts_from_a_diverged_baseline_is_not_run(tmp_path, command):
    (tmp_path / "own.toml").write_text(
        'arch = "MLP"\ndataset = "digits"\nnepochs = 1\nlr = [1e30, 0.01]\npr = 0.5\n'
        'pm = ["MP", "LM"]\nnex = 100\n[baseline]\n'
    )
    answer = command("sweep", "own.toml", "--workers", "2")
    assert answer.status == 2
    assert "3 of 6 finished, 1 diverged, 2 blocked" in answer.err
    assert answer.err.count("blocked: its baseline diverged") == 2


def test_a_run_that_fails_by_itself_is_retried_on_request(tmp_path, command):
    (tmp_path / "own.toml").write_text(
        'arch = "MLP"\ndataset = "digits"\npe = 0\nnepochs = 0\npr = [0.5, 0.999999]\nnex = 100\n'
    )
    answer = command("sweep", "own.toml")
    assert answer.status == 2
    assert "pr=0.999999: failed: --pr 0.999999 leaves none of" in answer.err
    assert "1 of 2 finished, 1 failed" in answer.err
    again = command("sweep", "own.toml")
    assert again.status == 2
    assert "(failed before; --retry tries again)" in again.err
    (folder,) = (tmp_path / "results").glob("*pr=0.999999*")
    failed_at = (folder / "error.json").stat().st_mtime_ns
    retried = command("sweep", "own.toml", "--retry")
    assert retried.status == 2
    assert "failed before" not in retried.err
    assert (folder / "error.json").stat().st_mtime_ns > failed_at
    status = command("status", "results")
    assert "1 finished, 1 failed" in status.out
    assert "--pr 0.999999 leaves none of" in status.out


def test_a_run_whose_worker_always_dies_is_given_up(tmp_path, command, monkeypatch):
    """Every worker is killed as soon as it has its run."""
    from lossprune.sweep import driver, engines

    class Deadly(engines.LocalEngine):
        def submit(self, job):
            future = super().submit(job)
            for process in self._pools[0]._processes.values():
                process.kill()
            return future

    monkeypatch.setattr(engines, "LocalEngine", Deadly)
    (tmp_path / "own.toml").write_text('arch = "MLP"\ndataset = "digits"\npe = -1\nnepochs = 1\n')
    answer = command("sweep", "own.toml", "--workers", "1")
    assert answer.status == 2
    assert answer.err.count("its worker died") == driver._ATTEMPTS
    assert f"{driver._ATTEMPTS} times in a row" in answer.err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert command("sweep", "own.toml", "--workers", "1").status == 0


def test_a_damaged_record_is_told_and_stops_no_other_run(tmp_path, command):
    (tmp_path / "own.toml").write_text(
        'arch = "MLP"\ndataset = "digits"\nnepochs = 1\npe = -1\nseed = [1, 2]\n'
    )
    flags = ("--arch", "MLP", "--dataset", "digits", "--nepochs", 1, "--pe", -1)
    for seed in (1, 2):
        assert command("run", *flags, "--seed", seed).status == 0
    (record,) = tmp_path.glob("results/*seed=1*/record.json")
    record.write_text(record.read_text().replace('"epoch": 1', '"epoch": 3'))
    answer = command("sweep", "own.toml", "--workers", "1")
    assert answer.status == 2
    assert "1 of 2 finished (2 before), 1 failed" in answer.err
    assert "seed=1: failed: " in answer.err
    assert f"{record.relative_to(tmp_path)} is not a record of a run: its contents" in answer.err
    record.with_name("log.txt").write_bytes(b"\xff")
    status = command("status", "results")
    assert status.status == 0
    assert "results: 1 finished, 1 failed" in status.out
