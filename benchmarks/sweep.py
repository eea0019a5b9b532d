"""What a sweep saves, and what it costs to schedule.

``python -m benchmarks.sweep`` measures, on real MNIST and with the same two cores for both:

- ``speed``: the 82 prunings of one seed evaluated right after pruning (``--nepochs 0``), once by
  ``lossprune sweep mlp-mnist --workers 2`` and once by separate ``experiments.py`` processes, one
  after the other, as the README's loop has them.  Of the loop, ``--lambdas`` of the nine λ of each
  criterion and π are run, spread evenly, and each of them stands for the ones left out.
- ``overhead``: 500 short runs on the bundled digits: the time that the workers did not spend on
  runs, and the memory of the driver along the way.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.hardware import hardware
from lossprune.experiment import RunConfig
from lossprune.experiment.folder import RunFolder
from lossprune.flags import words_of
from lossprune.sweep.board import Board
from lossprune.sweep.driver import Driver
from lossprune.sweep.engines import LocalEngine
from lossprune.sweep.job import Outcome
from lossprune.sweep.plan import PlannedRun
from lossprune.sweep.plan_file import parse_choices, parse_plan, read_plan

ROOT = Path(__file__).parents[1]
SPEEDUP_LIMIT, OVERHEAD_LIMIT = 5.0, 0.05

SHORT = """
arch = "MLP"
dataset = "digits"
nepochs = 0
pe = 0
pr = 0.95
nex = 200
exp = true
pm = ["LM", "QM"]
pi = [1, 2]
reg = [{regs}]
device = "cpu"
[baseline]
nepochs = 2
"""


class Sampling:
    """A view that samples the driver's memory as runs end, and adds up what the workers worked."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.rss: list[int] = []
        self.busy = 0.0
        self.first_end = 0.0
        self.last_end = 0.0

    def begin(self, board: Board) -> None:
        pass

    def tick(self, board: Board) -> None:
        pass

    def note(self, text: str) -> None:
        print(text)

    def ended(self, label: str, outcome: Outcome, folder: RunFolder, board: Board) -> None:
        now = time.perf_counter()
        if not self.first_end:  # the baseline: from here on every worker has been started
            self.first_end = now
        self.busy += outcome.busy
        self.last_end = now
        self.rss.append(self.process.memory_info().rss)


def measure_overhead(folder: Path, runs: int) -> dict[str, Any]:
    regs = ", ".join(str(1e-4 * (1 + i)) for i in range(runs // 4))
    planned = parse_plan(SHORT.format(regs=regs), "short").expand(path=folder)
    engine, view = LocalEngine(2), Sampling()
    began = time.perf_counter()
    try:
        # The baseline alone first, and one run a worker, so that starting them is told apart.
        Driver(planned[:3], engine, Sampling()).finish()
        warm = time.perf_counter()
        board = Driver(planned, engine, view).finish()
    finally:
        engine.close()
    done = time.perf_counter()
    wall = done - warm
    return {
        "runs": board.ended,
        "wall_s": wall,
        "start_s": warm - began,
        "busy_s": view.busy,
        "overhead": 2 * wall / view.busy - 1,
        "rss_mib": {
            str(at): round(view.rss[at] / 2**20, 1)
            for at in (10, len(view.rss) // 2, len(view.rss) - 1)
        },
    }


def measure_speed(folder: Path, data_path: Path, lambdas: int, epochs: int) -> dict[str, Any]:
    plan = read_plan("mlp-mnist").changed(
        parse_choices(f"seed=1111,nepochs=0,baseline.nepochs={epochs}", "set")
    )
    common = {"data_path": data_path}
    swept, looped = folder / "swept", folder / "looped"
    baseline, *prunings = plan.expand(path=swept, **common)
    _command(["experiments.py", *words_of(RunConfig, vars(baseline.config))])
    looped.mkdir()
    shutil.copytree(baseline.config.folder, looped / baseline.config.name)
    began = time.perf_counter()
    sweep = ["-m", "lossprune.cli", "sweep", "mlp-mnist", "--workers", "2"]
    sets = ["--seeds", "1111", "--set", f"nepochs=0,baseline.nepochs={epochs}"]
    _command([*sweep, *sets, "--path", str(swept), "--data_path", str(data_path)])
    sweep_s = time.perf_counter() - began
    groups: dict[tuple[str, int], list[PlannedRun]] = {}
    for run in plan.expand(path=looped, **common)[1:]:
        groups.setdefault((run.config.criterion, run.config.stages), []).append(run)
    seconds: dict[str, list[float]] = {}
    for (criterion, stages), runs in groups.items():
        count = min(lambdas, len(runs))
        # As the README has them: no number of threads is given, each takes both cores.
        chosen = [runs[(2 * i + 1) * len(runs) // (2 * count)] for i in range(count)]
        seconds[f"{criterion} {stages}"] = [_timed(run) for run in chosen]
    loop_s = sum(
        statistics.mean(seconds[f"{criterion} {stages}"]) * len(runs)
        for (criterion, stages), runs in groups.items()
    )
    return {
        "prunings": len(prunings),
        "finished": sum(RunFolder(run.config.folder).settled() is not None for run in prunings),
        "sweep_s": sweep_s,
        "loop_s": loop_s,
        "loop_runs_timed": sum(map(len, seconds.values())),
        "loop_seconds": seconds,
        "speedup": loop_s / sweep_s,
    }


def _timed(run: PlannedRun) -> float:
    began = time.perf_counter()
    _command(["experiments.py", *words_of(RunConfig, vars(run.config))])
    return time.perf_counter() - began


def _command(words: Sequence[str]) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("what", nargs="*", default=["speed", "overhead"])
    parser.add_argument("--data_path", type=Path, default=None, help="folder that holds MNIST")
    parser.add_argument("--lambdas", type=int, default=9, help="of nine, to time in the loop")
    parser.add_argument("--epochs", type=int, default=3, help="of the baseline")
    parser.add_argument("--runs", type=int, default=500, help="of the overhead's plan")
    parser.add_argument("--out", type=Path, default=Path("measurements/sweep.json"))
    given = parser.parse_args()
    data = given.data_path or Path(os.environ.get("LOSSPRUNE_DATA", ROOT.parent / "shared/data"))
    result: dict[str, Any] = {"command": "python -m benchmarks.sweep", "hardware": hardware()}
    print(hardware())
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        if "overhead" in given.what:
            result["overhead"] = found = measure_overhead(Path(folder) / "short", given.runs)
            print(
                f"{found['runs']} short runs, 2 workers: {found['wall_s']:.1f} s, workers at work "
                f"{found['busy_s']:.1f} s: overhead {found['overhead']:.1%} "
                f"(limit {OVERHEAD_LIMIT:.0%}); start {found['start_s']:.1f} s; "
                f"driver MiB after n runs {found['rss_mib']}"
            )
        if "speed" in given.what:
            absolute = data.absolute()
            result["speed"] = found = measure_speed(
                Path(folder).absolute(), absolute, given.lambdas, given.epochs
            )
            print(
                f"{found['finished']} of {found['prunings']} prunings: sweep "
                f"{found['sweep_s']:.1f} s, loop {found['loop_s']:.1f} s (from "
                f"{found['loop_runs_timed']} timed): {found['speedup']:.2f} times as fast "
                f"(limit {SPEEDUP_LIMIT})"
            )
            for name, times in found["loop_seconds"].items():
                print(f"  loop {name:<8} {statistics.mean(times):.2f} s a run, n = {len(times)}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
