"""Commands of lossprune in processes of their own, one or several, that start in a moment.

They are children of a process that has torch loaded and no threads of its own; ``kill -9`` ends
them as it would any other.
"""

import multiprocessing
import os
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "torch._dynamo",  # which the first optimizer imports
        "lossprune.cli",
        "lossprune.data.digits",
        "lossprune.experiment.group",
        "lossprune.report.build",
        "lossprune.sweep.worker",
    ]
)

COMMAND = """
import os, resource, sys
from pathlib import Path
from lossprune.cli import main
if largest_file:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1)
os.dup2(log, 2)
os.chdir(folder)
os.environ.update(environment)
left = stop
def stopping(operation):
    def instead(path, *args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os._exit(9)
        return operation(path, *args, **kwargs)
    return instead
if left:
    Path.replace, Path.unlink = stopping(Path.replace), stopping(Path.unlink)
sys.exit(main(arguments))
"""


def begin(program: str, **names: Any) -> BaseProcess:
    """Start a program that finds these values under these names."""
    process = FORKSERVER.Process(target=exec, args=(program, names))
    process.start()
    return process


class Processes:
    """A command of one process, or of several as torchrun would start them.

    Args:
        arguments: of the command.
        log: the file that takes what all of them say.
        count: of processes.
        stop: the first process ends as if killed before it writes its file of this number; 0: not.
        folders: that each process is in; the current one if not given.
        largest_file: bytes that a file of theirs may have; 0: as many as there is room for.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        count: int = 1,
        *,
        stop: int = 0,
        folders: list[Path] | None = None,
        largest_file: int = 0,
    ) -> None:
        self.log = log
        self.members = []
        port = str(free_port()) if count > 1 else ""
        for rank in range(count):
            environment = dict(os.environ)
            if count > 1:
                launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
                environment |= {name: str(value) for name, value in launched.items()}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = begin(
                COMMAND,
                log=str(log),
                folder=str(folders[rank] if folders else Path.cwd()),
                arguments=arguments,
                environment=environment,
                stop=stop if rank == 0 else 0,
                largest_file=largest_file,
            )
            self.members.append(process)
        self.pid = self.members[0].pid

    def join(self, seconds: float) -> None:
        """Wait so long for the end of all."""
        ends = time.monotonic() + seconds
        for member in self.members:
            member.join(max(0, ends - time.monotonic()))

    def kill(self) -> None:
        """Kill -9 all of them."""
        for member in self.members:
            member.kill()

    @property
    def exitcode(self) -> int | None:
        """None while one runs, 0 where all ended well."""
        codes = [member.exitcode for member in self.members]
        return None if None in codes else max(map(abs, codes))

    @property
    def said(self) -> str:
        """What they have said so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, *words: str, seconds: float = 60) -> None:
        """Wait until they have said one of these words."""
        ends = time.monotonic() + seconds
        while not any(word in self.said for word in words):
            assert time.monotonic() < ends, f"none of {words} in {seconds} s: {self.said}"
            time.sleep(0.002)


def finish(arguments: list[str], log: Path, count: int = 1) -> None:
    """Do a command to its end, which must be a good one."""
    processes = Processes(arguments, log, count)
    processes.join(120)
    assert processes.exitcode == 0, processes.said


def free_port() -> int:
    """Return a port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
