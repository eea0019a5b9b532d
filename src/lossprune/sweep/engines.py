"""Where runs are done.  Scheduling is ``concurrent.futures``' on one machine, and Ray's on many.

Either engine takes a job only while fewer than ``capacity()`` run.  Its ``places`` are how many
groups train side by side where a worker sees so many GPUs.  ``collect`` raises ``LostError`` where
a job was lost with its worker.  ``close`` ends at once what still runs: it can go on later.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lossprune.sweep.job import Job, LostError, Outcome
from lossprune.torch_state import usable_cores

_STARTS = 3

Outcomes = tuple[Outcome, ...]
"""Of each run of a job."""


def split_cores(workers: int) -> list[list[int]]:
    """Return the cores of each worker: equal shares of those this process may use.

    With more workers than cores several share one.
    """
    cores = usable_cores()
    if cores is None:
        return [[] for _ in range(workers)]
    share = max(1, len(cores) // workers)
    return [
        [cores[(slot * share + i) % len(cores)] for i in range(share)] for slot in range(workers)
    ]


class LocalEngine:
    """Processes on this machine, each pinned to its cores.

    Every worker is a process pool of one: so a worker that is killed takes one run with it, and it
    is known which, where a larger pool would end all of its workers.
    """

    patience = 0.0

    def __init__(self, workers: int) -> None:
        self._serves = "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if self._serves else "spawn")
        if self._serves:  # loads torch once, so that a worker starts in a moment
            # torch imports its compiler, for two seconds, with the first optimizer.
            self._context.set_forkserver_preload(["lossprune.sweep.worker", "torch._dynamo"])
        self._cores = split_cores(workers)
        self.threads = len(self._cores[0]) or max(1, (os.cpu_count() or 1) // workers)
        self._leashes: list[Connection | None] = [None] * workers
        self._pools = [self._pool(slot) for slot in range(workers)]
        self._slots: dict[Future[Outcomes], int] = {}

    def capacity(self) -> int:
        """Return the number of workers."""
        return len(self._pools)

    def places(self, gpus: int) -> int:
        """Return the number of workers, or of GPUs: two groups on one take turns."""
        return min(len(self._pools), gpus or len(self._pools))

    def submit(self, job: Job) -> "Future[Outcomes]":
        """Give a job to a worker that is free."""
        taken = set(self._slots.values())
        slot = next(slot for slot in range(len(self._pools)) if slot not in taken)
        future = self._given(slot, job)
        self._slots[future] = slot
        return future

    def _given(self, slot: int, job: Job) -> "Future[Outcomes]":
        for _ in range(_STARTS):
            self._serve()  # the worker starts with its first job
            try:
                return self._pools[slot].submit(_execute, job)
            except (BrokenProcessPool, EOFError, ConnectionError):
                # It died while it had nothing to do, or what starts it was killed.
                self._renew(slot)
                time.sleep(0.1)  # until the system knows that it is dead
        return self._pools[slot].submit(_execute, job)

    def collect(self, future: "Future[Outcomes]") -> Outcomes:
        """Return the outcomes; a worker that died is replaced."""
        slot = self._slots.pop(future)
        try:
            return future.result()
        except BrokenProcessPool:
            self._renew(slot)
            raise LostError("its worker died (killed, or out of memory)") from None

    def close(self) -> None:
        """End all workers."""
        self._serve()  # they are told what ends, and one that was killed is not missed aloud
        for leash in self._leashes:
            if leash is not None:
                leash.close()
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    def _renew(self, slot: int) -> None:
        self._serve()  # what the old pool held is given back to one that is there
        leash = self._leashes[slot]
        if leash is not None:
            leash.close()
        self._pools[slot].shutdown(wait=False)
        self._pools[slot] = self._pool(slot)

    def _pool(self, slot: int) -> ProcessPoolExecutor:
        theirs, self._leashes[slot] = self._context.Pipe(duplex=False)
        stderr = Connection(os.dup(2), readable=False) if self._serves else None
        return ProcessPoolExecutor(
            1, self._context, initializer=_begin, initargs=(theirs, stderr, self._cores[slot], slot)
        )

    def _serve(self) -> None:
        if self._serves:
            start_quietly()


class RayEngine:
    """Tasks on a Ray cluster, placed by Ray wherever the CPUs and GPUs of one run are free.

    The nodes share this library, ``--path`` and ``--data_path``.  They may come and go.

    Raises:
        ValueError: Ray is not installed, or there is no cluster at the address.
    """

    patience = 60.0  # the run of a lost node may be held until its process is gone

    def __init__(self, address: str, cpus: float, gpus: float) -> None:
        try:
            import ray
            from ray.exceptions import RayError
        except ImportError:
            raise ValueError(
                f"--ray {address}: Ray is not installed; install lossprune[ray]"
            ) from None
        _check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"--ray {address}: there is no cluster to join: {said}") from None
        self._ray, self._lost = ray, RayError
        self._share = {"CPU": cpus, "GPU": gpus}
        self.threads = max(1, int(cpus))
        self._task = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD"
        )(_execute)
        self._known = (0.0, 0)

    def capacity(self) -> int:
        """Return how many runs the cluster's nodes have room for; asked of it once a second."""
        asked, room = self._known
        if time.monotonic() - asked > 1.0:
            has = self._ray.cluster_resources()
            room = min(
                int(has.get(kind, 0) // share) for kind, share in self._share.items() if share
            )
            self._known = (time.monotonic(), room)
        return room

    def places(self, gpus: int) -> int:
        """Return how many runs the cluster has room for: each has its share of a GPU."""
        return max(1, self.capacity())

    def submit(self, job: Job) -> "Future[Outcomes]":
        """Hand a job to Ray; a node that shares the working folder finds modules of one's own."""
        return self._task.remote(replace(job, imports=str(Path.cwd()))).future()

    def collect(self, future: "Future[Outcomes]") -> Outcomes:
        """Return the outcomes; a run whose node or process was lost is known by Ray's error."""
        try:
            return future.result()
        except self._lost as error:
            raise LostError(f"its node or process was lost ({type(error).__name__})") from None

    def close(self) -> None:
        """Leave the cluster, which ends the tasks that it still does for us."""
        self._ray.shutdown()


Engine = LocalEngine | RayEngine


def _check_reachable(address: str) -> None:
    """Ray would try for minutes before it says that nobody is there."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not (host and port.isdecimal()):
        return  # "auto": Ray knows where
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--ray {address}: there is no cluster to join: {error}") from None


def _execute(job: Job) -> Outcomes:
    from lossprune.sweep.worker import execute

    return execute(job)


def _begin(leash: Connection, stderr: Connection | None, cores: list[int], slot: int) -> None:
    from lossprune.sweep.worker import begin

    begin(leash, stderr, cores, slot)


def start_quietly() -> None:
    """Start the servers of ``multiprocessing`` that start workers, or see that they are there.

    They are in the group of the terminal.  Ctrl-C reaches them while they load torch, and what is
    killed around them breaks their pipes: they would print Python's tracebacks of that, which say
    nothing about a sweep.  So they write nowhere, and neither they nor the workers, which are
    their children, see SIGINT: the driver alone decides.
    """
    from multiprocessing import forkserver, resource_tracker

    with _writing_nowhere(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one died and is started again
        resource_tracker.ensure_running()
        with _blocking_interrupts():
            forkserver.ensure_running()


@contextlib.contextmanager
def _writing_nowhere() -> Iterator[None]:
    """Lead both standard outputs of processes that are started meanwhile to nowhere."""
    with contextlib.ExitStack() as exits:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        exits.callback(os.close, nowhere)
        for output in (1, 2):
            with contextlib.suppress(OSError):  # it is closed
                kept = os.dup(output)
                exits.callback(os.close, kept)
                exits.callback(os.dup2, kept, output)
                os.dup2(nowhere, output)
        yield


@contextlib.contextmanager
def _blocking_interrupts() -> Iterator[None]:
    """Block SIGINT in processes that are started meanwhile; this one gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
