"""Several processes for one run, as ``torchrun`` starts them: who each is, and how they agree.

The first process (rank 0) alone touches the run's folder and speaks; what the others need of it,
they are told.  No torch here before they are joined, so that a wrong flag is answered at once.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# One process may have to fetch or decode a large data set while the others wait for it.
_PATIENCE = timedelta(hours=12)
# torchrun ends all processes soon after one has failed: who tells why must not be cut short.
_GRACE = 5.0  # seconds
_LOOK_EVERY = 0.5  # seconds between two looks whether the launcher is still there
_NOTHING, _CONTENTS, _FAILED = range(3)


class ElsewhereError(Exception):
    """Another process of the run failed and says why; this one ends, and has nothing to add."""


@dataclass(frozen=True)
class Ranks:
    """One process among those of a run.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process reads and writes the run's folder, and speaks for all."""
        return self.rank == 0

    def from_first(self, make: Callable[[], bytes | None]) -> bytes | None:
        """Return on every process what ``make()`` returns on the first, where alone it is called.

        Raises:
            Exception: what ``make`` raised, on the first process; ElsewhereError on the others.
        """
        if self.world == 1:
            return make()
        made, kind, error = None, _NOTHING, None
        if self.first:
            try:
                made = make()
                kind = _NOTHING if made is None else _CONTENTS
            except Exception as raised:
                kind, error = _FAILED, raised
        kind, contents = _told_by_first(kind, made or b"")
        if error is not None:
            raise error
        if kind == _FAILED:
            raise ElsewhereError
        return contents if kind == _CONTENTS else None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave a block together: an error of one process ends it on all.

        Nothing in the block may wait for another process.

        Raises:
            Exception: that of the failed process of the lowest number, there; ElsewhereError on
                the others.
        """
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        lowest = self._lowest(self.rank if error is not None else self.world)
        if error is not None and lowest == self.rank:
            raise error
        if lowest < self.world:
            raise ElsewhereError from error

    def _lowest(self, number: int) -> int:
        if self.world == 1:
            return number
        import torch
        import torch.distributed as dist

        lowest = torch.tensor(number)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return int(lowest)


ALONE = Ranks()


def _told_by_first(kind: int, contents: bytes) -> tuple[int, bytes]:
    """Send a number and some bytes from the first process to all."""
    import torch
    import torch.distributed as dist

    header = torch.tensor([kind, len(contents)])
    dist.broadcast(header, src=0)
    kind, size = header.tolist()
    if dist.get_rank() == 0:
        payload = torch.frombuffer(bytearray(contents), dtype=torch.uint8) if size else None
    else:
        payload = torch.empty(size, dtype=torch.uint8)
    if payload is None or not size:
        return kind, b""
    dist.broadcast(payload, src=0)
    return kind, payload.numpy().tobytes()


def launched() -> bool:
    """Return whether a launcher such as torchrun started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def leave_word() -> None:
    """Wait, where another process is about to say why all of them end; then end as well."""
    time.sleep(_GRACE)


def tell_launcher(sentence: str) -> None:
    """Let torchrun's report say why it ends, wherever it sends what its processes print."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        said = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": said}), encoding="utf-8")


@contextmanager
def alike() -> Iterator[None]:
    """Let the first process alone tell an error that every process meets alike, as a wrong flag."""
    try:
        yield
    except Exception as error:
        if launched() and os.environ.get("RANK", "0") != "0":
            raise ElsewhereError from error
        raise


def current() -> Ranks:
    """Return this process among those of the ``torch.distributed`` group, if there is one."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that the launcher started; alone, where there was none.

    They talk by gloo, tensors on GPUs by NCCL.  Of an error inside, whichever process meets one
    first tells it; one whose launcher is killed ends as well.

    Raises:
        ValueError: the launcher's environment lacks something.
        ElsewhereError: another process failed first.
        ConnectionError: another process was killed.
    """
    if not launched():
        yield ALONE
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: "
            "start several processes with torchrun"
        )
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    with _ending_with_launcher():
        store, rank, world = next(iter(rendezvous("env://", timeout=_PATIENCE)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=_PATIENCE,
        )
        try:
            ranks = Ranks(rank, world)
            yield ranks
            ranks._lowest(rank)  # a launcher may end all when one has ended: none goes before all
        except ElsewhereError:
            raise
        except Exception as error:
            if not _fails_first(store):
                raise ElsewhereError from error
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise ConnectionError(
                    "another process of the run was killed, or its machine lost; "
                    "the same command goes on from the last checkpoint"
                ) from error
            raise
        finally:
            dist.destroy_process_group()


def _fails_first(store: Any) -> bool:
    """Whether no other process has failed before this one.

    Who fails says so before it closes its connections, so that others who fail for that come later.
    """
    with suppress(RuntimeError):  # the store went with the first process, which has told why
        return store.add("failed", 1) == 1
    return False


@contextmanager
def _ending_with_launcher() -> Iterator[None]:
    """End this process at once when torchrun does, which kill -9 leaves no time to end it."""
    parent, done = os.getppid(), threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_EVERY):
            if os.getppid() != parent:
                os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def leave(status: int) -> NoReturn:
    """End this process, one of several whose group is no more, at once.

    Threads of torch's that outlive the group may want the interpreter while it ends.  They would
    abort it ("terminate called without an active exception"), and the launcher would report a run
    as failed that is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def own_device(kind: str) -> "torch.device":
    """Return this process's device of a kind: of the GPUs of its machine the one of its number.

    Raises:
        ValueError: there are fewer GPUs than processes here.
    """
    import torch

    if kind != "cuda" or not launched():
        return torch.device(kind)
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= gpus:
        raise ValueError(
            f"--device cuda: each process takes a GPU of its own, and there are {gpus} here; "
            f"give torchrun --nproc-per-node {gpus}"
        )
    torch.cuda.set_device(number)
    return torch.device(kind, number)
