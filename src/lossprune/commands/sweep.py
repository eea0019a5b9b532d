"""``lossprune sweep``: all runs of a plan."""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossprune.commands import EXIT_DIVERGED, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK
from lossprune.data import DATA_PATH, DATA_PATH_HELP
from lossprune.experiment.config import DEVICES
from lossprune.flags import (
    MOST_WORKERS,
    check,
    check_not_negative,
    check_one_of,
    check_threads,
    check_whole,
    flag,
)
from lossprune.pruning.names import counted
from lossprune.sweep.job import RunPhase
from lossprune.sweep.plan import PlannedRun, select
from lossprune.sweep.plan_file import parse_choices, read_plan
from lossprune.text_table import print_lines
from lossprune.torch_state import count_cores

_MOST_SHARE = 1024  # CPUs or GPUs: no node has more


@dataclass(frozen=True)
class SweepConfig:
    """Do all runs of a plan, on this machine or a cluster.

    Raises:
        ValueError: a value that its flag does not accept.
    """

    seeds: str | None = flag(None, "seeds", "seeds to keep, such as 1111,1112; none: all")
    only: str | None = flag(None, "only", "runs to keep, such as pm=QM,pi=14")
    overrides: str | None = flag(
        None, "set", "flags to set on every run, such as nepochs=50; baseline.nepochs=100 on those"
    )
    dry_run: bool = flag(False, "dry_run", "list every run's folder and command, and the count")
    retry: bool = flag(False, "retry", "try runs again that failed for a reason of their own")
    workers: int | None = flag(
        None, "workers", "processes on this machine; if not given, one for every two cores"
    )
    ray: str | None = flag(None, "ray", "address of a Ray cluster to use instead, or auto")
    cpus_per_run: float = flag(1.0, "cpus_per_run", "CPUs of the cluster for a run")
    gpus_per_run: float = flag(0.0, "gpus_per_run", "GPUs of the cluster for a run; may be 0.5")
    stack: str = flag(
        "auto",
        "stack",
        "runs to train together at most; auto: as many as fit in memory; 1: each alone",
    )
    tensorboard: bool = flag(False, "tensorboard", "write TensorBoard files to PATH/tensorboard")
    path: Path = flag(Path("results"), "path", "folder of all results")
    data_path: Path = flag(DATA_PATH, "data_path", DATA_PATH_HELP)
    mirror: str | None = flag(None, "mirror", "base URL to download a missing data set from")
    device: str = flag("auto", "device", "auto, cpu or cuda; auto takes CUDA where there is one")
    threads: int | None = flag(None, "threads", "CPU threads of a run; if not given, its cores")
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_whole("workers", self.workers, 1, MOST_WORKERS)
        check_threads(self.threads)
        whole = self.stack.isdecimal() and len(self.stack) < 10 and int(self.stack) >= 1
        good = self.stack == "auto" or whole
        check("stack", self.stack, good, "auto or a whole number from 1 to 999,999,999")
        check_one_of("device", self.device, DEVICES)
        for name in ("cpus_per_run", "gpus_per_run"):
            check_not_negative(name, getattr(self, name), _MOST_SHARE)
        if self.cpus_per_run == 0 and self.gpus_per_run == 0:
            raise ValueError("--cpus_per_run and --gpus_per_run must not both be 0")
        if self.ray is not None and self.workers is not None:
            raise ValueError("--ray and --workers are two engines: give one of them")


def plan_runs(config: SweepConfig, source: str) -> tuple[PlannedRun, ...]:
    """Return the runs that the command stands for.

    Raises:
        ValueError, FileNotFoundError: as :func:`read_plan` and the flags say.
    """
    plan = read_plan(source).changed(parse_choices(config.overrides, "set"))
    absolute = config.ray is not None  # the nodes have working folders of their own
    common: dict[str, Any] = {
        "path": config.path.absolute() if absolute else config.path,
        "data_path": config.data_path.absolute() if absolute else config.data_path,
        "mirror": config.mirror,
    }
    for name in ("device", "threads"):
        if name not in plan.axes:
            common[name] = getattr(config, name)
    return select(plan.expand(**common), _seeds(config.seeds), parse_choices(config.only, "only"))


def _seeds(text: str | None) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")] if text else []
    except ValueError:
        raise ValueError(
            f"--seeds must be whole numbers, such as 1111,1112, got {text!r}"
        ) from None


def do(config: SweepConfig, source: str) -> int:
    """Do the sweep and return the exit status: 0, 2 where runs failed, 3 where some diverged."""
    runs = plan_runs(config, source)
    if config.dry_run:
        return _list(runs)
    if config.tensorboard:
        _check_tensorboard()
    from lossprune.sweep.driver import Driver
    from lossprune.sweep.status import note_plan
    from lossprune.sweep.view import shown

    note_plan(config.path, read_plan(source).name, [run.config.folder for run in runs])
    engine = _engine(config, len(runs))
    tensorboard = config.path.absolute() / "tensorboard" if config.tensorboard else None
    driver: Driver | None = None
    try:
        with shown() as view:
            driver = Driver(
                runs,
                engine,
                view,
                retry=config.retry,
                tensorboard=tensorboard,
                stack=None if config.stack == "auto" else int(config.stack),
            )
            driver.finish()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        engine.close()
    return _conclude(driver)


def _engine(config: SweepConfig, runs: int) -> Any:
    from lossprune.sweep.engines import LocalEngine, RayEngine

    if config.ray is not None:
        return RayEngine(config.ray, config.cpus_per_run, config.gpus_per_run)
    return LocalEngine(min(config.workers or max(1, count_cores() // 2), runs))


def _check_tensorboard() -> None:
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        raise ValueError(
            "--tensorboard: TensorBoard is not installed; install lossprune[tensorboard]"
        )


def _list(runs: Sequence[PlannedRun]) -> int:
    for run in runs:
        print(run.config.folder)
        print(f"  {run.command}")
    baselines = sum(not run.config.prunes for run in runs)
    kinds = counted(baselines, "baseline"), counted(len(runs) - baselines, "pruning")
    print(f"{counted(len(runs), 'run')}: {', '.join(kinds)}")
    return EXIT_OK


def _conclude(driver: Any) -> int:
    board = driver.board
    lines = [board.summary()]
    if board.best is not None:
        lines.append(board.told_best())
    print_lines(lines, sys.stderr)
    if driver.stopped:
        raise ValueError(driver.stopped)
    if board.count(RunPhase.FAILED) or board.count(RunPhase.BLOCKED):
        print("error: some runs failed; lossprune status says which and why", file=sys.stderr)
        return EXIT_ERROR
    return EXIT_DIVERGED if board.count(RunPhase.DIVERGED) else EXIT_OK
