"""The side that computes: one run after the other in a process that keeps what they share."""

import contextlib
import errno
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

import lossprune.experiment.runner
from lossprune.experiment import FolderBusyError, RunFolder, RunRecord
from lossprune.experiment.config import RunConfig
from lossprune.experiment.folder import when_free
from lossprune.experiment.group import run_together, stackable
from lossprune.experiment.prepare import Cache
from lossprune.experiment.record import RunStatus
from lossprune.experiment.runner import OpenRun
from lossprune.sweep.job import ERROR, Job, Outcome, RunPhase, note_failure
from lossprune.training import NotStackableError
from lossprune.user_code import blaming_users_code

# Of each kind, what consecutive runs of a plan use: one data set a seed, and for every criterion
# the first statistics of one start network, which are as large as it.
_KEPT = {"dataset": 2, "network": 2, "scores": 64, "statistics": 4}
# A short stage takes less time than making it safe. A run that is killed repeats as much.
_CHECKPOINT_SECONDS = 2.0
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@functools.cache
def process_cache() -> Cache:
    """Return what the runs of this process share."""
    return Cache(_KEPT)


def execute(job: Job) -> tuple[Outcome, ...]:
    """Do the runs of a job, or what is left of them; never raises."""
    if job.imports is not None and job.imports not in sys.path:
        sys.path.insert(0, job.imports)
    began = time.perf_counter()
    one = len(job.configs) == 1
    outcomes = (_execute(job, job.configs[0]),) if one else _execute_together(job)
    share = (time.perf_counter() - began) / len(outcomes)
    return tuple(replace(outcome, busy=share) for outcome in outcomes)


def _execute(job: Job, config: RunConfig) -> Outcome:
    gpus = 0

    def leave(going: OpenRun) -> bool:
        nonlocal gpus
        gpus = torch.cuda.device_count() if going.state.device.type == "cuda" else 0
        return job.leaves and stackable(going)

    def attempt() -> RunRecord:
        with blaming_users_code():
            return lossprune.experiment.runner.run(
                config,
                cache=process_cache(),
                checkpoint_seconds=_CHECKPOINT_SECONDS,
                leave=leave,
            )

    try:
        record = when_free(attempt, time.monotonic() + job.patience)
    except Exception as error:
        return _conclude(job, config, error)
    if record.status != RunStatus.RUNNING:
        return _conclude(job, config, record)
    with contextlib.suppress(OSError):
        (config.folder / ERROR).unlink(missing_ok=True)
    if gpus:  # the group may be trained by another process
        torch.cuda.empty_cache()
    return Outcome(RunPhase.DUE, gpus=gpus)


def _execute_together(job: Job) -> tuple[Outcome, ...]:
    try:
        results = run_together(
            job.configs,
            cache=process_cache(),
            checkpoint_seconds=_CHECKPOINT_SECONDS,
            patience=job.patience,
        )
    except Exception as error:
        results = [error] * len(job.configs)
    return tuple(map(functools.partial(_conclude, job), job.configs, results))


def _conclude(job: Job, config: RunConfig, result: RunRecord | Exception) -> Outcome:
    """Return the outcome of a run that a worker is done with, and leave word of a failure."""
    if isinstance(result, FolderBusyError):
        return Outcome(RunPhase.BUSY, str(result), again=True)
    if isinstance(result, NotStackableError):
        return Outcome(RunPhase.ALONE, str(result))
    folder = RunFolder(config.folder)
    try:
        if isinstance(result, Exception):
            raise result
        if result.status == RunStatus.RUNNING:
            return Outcome(RunPhase.LEFT)
        (folder.path / ERROR).unlink(missing_ok=True)
        if job.tensorboard is not None:
            from lossprune.sweep.tensorboard import write_events

            write_events(result, job.tensorboard / config.name)
        return Outcome.of(result)
    except Exception as error:
        outcome = _failure(error)
        note_failure(folder, outcome, traceback.format_exc())
        return outcome


def _failure(error: Exception) -> Outcome:
    """An error of the system may pass; what a run's own settings cause comes again."""
    lacking = (OSError, MemoryError, torch.OutOfMemoryError)
    cause = error.__cause__ if isinstance(error.__cause__, lacking) else error
    system = isinstance(cause, lacking) and not isinstance(cause, FileNotFoundError)
    message = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (ValueError, OSError)):
        message = f"{type(error).__name__}: {message}"
    full = isinstance(cause, OSError) and cause.errno in _NO_SPACE
    return Outcome(RunPhase.FAILED, message, again=system, full=full)


def begin(leash: Connection, stderr: Connection | None, cores: Sequence[int], slot: int) -> None:
    """Make this process a worker: on its own cores, and ended when the driver ends.

    Args:
        leash: a pipe whose other end only the driver holds.
        stderr: where the driver writes its messages, if the process has not got it already.
        cores: to run on; none: wherever the system puts it.
        slot: the number of this worker; it takes the GPU of that number, counted around.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the driver decides
    if stderr is not None:
        os.dup2(stderr.fileno(), 2)
    threading.Thread(target=_end_with, args=(leash,), daemon=True).start()
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    if torch.cuda.is_available():
        torch.cuda.set_device(slot % torch.cuda.device_count())


def _end_with(leash: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        leash.recv()
    os._exit(1)  # as if killed: a run survives that, and no finalizer may hang
