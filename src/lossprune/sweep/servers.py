"""The processes from which workers come, and why nothing is heard of them."""

import contextlib
import os
import signal
import warnings
from collections.abc import Iterator


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
