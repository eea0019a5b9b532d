"""Many runs trained together: what they share is the work of an epoch, all else is their own."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import ceil, inf

import torch

from lossprune.experiment.config import RunConfig
from lossprune.experiment.environment import computing
from lossprune.experiment.folder import RunFolder
from lossprune.experiment.group_member import GroupMember, Result
from lossprune.experiment.group_size import most_together
from lossprune.experiment.prepare import Cache, dataset_key
from lossprune.experiment.record import RunRecord, Scores
from lossprune.experiment.runner import OpenRun
from lossprune.experiment.state import RunState
from lossprune.experiment.story import Request
from lossprune.training import (
    DivergedError,
    NotStackableError,
    TogetherTraining,
    choose_stack,
    worthwhile,
)

_SAVING = 0.05  # of the time, at most
_WRITERS = 8


def stackable(run: OpenRun) -> bool:
    """Whether the epoch that is due is better trained together with those of other runs.

    It is where a stack is no slower than one after the other.  On the CPU that is so of runs that
    would be trained densely: over its surviving weights alone a network is far faster by itself.
    """
    state = run.state
    alone = state.device.type == "cpu" and state.training.mode != "dense"
    return not alone and state.config.plain and worthwhile(state.network, state.dataset)


def run_together(
    configs: Sequence[RunConfig],
    *,
    cache: Cache | None = None,
    checkpoint_seconds: float = 0.0,
    patience: float = 0.0,
) -> list[Result]:
    """Do runs of one architecture, data set, batch size and device together, or what is left.

    Each comes out as it would alone, to rounding; stopped at any moment, it goes on from its own
    checkpoint, with the same others to the bit (on a CPU).  Runs that would not fit in memory at
    once are trained in parts, one after the other.

    Args:
        configs: the runs.
        cache: as in :func:`lossprune.experiment.run`; runs share batches where it keeps data sets.
        checkpoint_seconds: that go by between two checkpoints of the group, or more where writing
            them would take over 5 % of the time; 0: one after every epoch.
        patience: seconds to wait for folders that other processes hold.

    Returns:
        For each run its record, which says that it is still running where it is to be pruned next;
        or what kept it from being done: NotStackableError where all are to be done alone,
        FolderBusyError, or another error of :func:`lossprune.experiment.run`.
    """
    cache = cache or Cache({"dataset": 1})
    # Those of one data set come one after the other, so that they share it.
    places = sorted(range(len(configs)), key=lambda place: dataset_key(configs[place]))
    todo = [GroupMember(configs[place]) for place in places]
    members = dict(zip(places, todo, strict=True))
    deadline, most = time.monotonic() + patience, len(todo)
    with computing(configs[0], _unfinished(configs[0])):
        while todo:
            with ExitStack() as exits:
                part = _open_part(todo, most, exits, cache, deadline)
                try:
                    _train(part, checkpoint_seconds)
                except torch.OutOfMemoryError as error:
                    most = len(part) // 2  # each can go on from its checkpoint
                    if not most:
                        part[0].end(error)
                except Exception as error:  # of all of them
                    for member in part:
                        member.end(error)
            todo = [member for member in todo if member.result is None]
    return [members[place].outcome for place in range(len(configs))]


def _unfinished(config: RunConfig) -> RunRecord | None:
    """The record of a run, where it can be read; where not, the run itself will say so."""
    try:
        return RunFolder(config.folder).record()
    except ValueError:
        return None


def _open_part(
    todo: Sequence[GroupMember], most: int, exits: ExitStack, cache: Cache, deadline: float
) -> list[GroupMember]:
    """Open as many runs as can be trained at once; parts are of nearly the same size."""
    part: list[GroupMember] = []
    trained = 0
    for member in todo:
        if trained and trained >= most:
            break
        part.append(member)
        exits.callback(member.close)  # whatever happens
        member.open(cache, deadline)
        if member.going and not trained:
            left = len(todo) - len(part) + 1
            most = min(most, most_together(member.run))
            most = ceil(left / ceil(left / most))
        trained += member.going
    return part


def _train(members: Sequence[GroupMember], checkpoint_seconds: float) -> None:
    """Train runs that are open to their ends."""
    _train_at_a_pace([member for member in members if member.going], checkpoint_seconds)
    # Those that diverged after an epoch that was not saved go there once more, and save each.
    again = [member for member in members if member.wants(Request.CHECKPOINT)]
    for member in again:
        member.answer()
        member.let_go()
    _train_at_a_pace([member for member in again if member.going], inf)


def _train_at_a_pace(members: Sequence[GroupMember], checkpoint_seconds: float) -> None:
    if not members:
        return
    if not all(member.config.plain for member in members):
        raise NotStackableError("--amp and --compile are for runs that are trained alone")
    states = [member.run.state for member in members]
    stack = choose_stack(
        [state.network for state in states],
        [state.mask for state in states],
        [state.dataset for state in states],
        members[0].config.train,
    )
    pace = _Pace(checkpoint_seconds)
    while any(member.going for member in members):
        # After a kill between the checkpoints of two runs, one is ahead: it waits for the others,
        # so that those of one seed share their batches again.
        least = min(
            state.epoch for member, state in zip(members, states, strict=True) if member.going
        )
        now = [
            member.going and state.epoch == least
            for member, state in zip(members, states, strict=True)
        ]
        _do_epoch(stack, members, states, now)
        if pace.due:
            with pace:
                going = [place for place, member in enumerate(members) if member.going]
                stack.store(going)
                _write([members[place] for place in going], GroupMember.save)


def _do_epoch(
    stack: TogetherTraining,
    members: Sequence[GroupMember],
    states: Sequence[RunState],
    now: Sequence[bool],
) -> None:
    """Train an epoch of some runs; each takes what came of it."""
    began = time.perf_counter()
    results = _train_epoch(stack, states, now)
    seconds = (time.perf_counter() - began) / len(results)
    for place, scores in results.items():
        members[place].take((scores, seconds), stack.mode, stack.reason)
        members[place].let_go()
    best = [place for place in results if members[place].wants(Request.WEIGHTS_TO_COPY)]
    saving = [place for place in results if members[place].wants(Request.WEIGHTS_TO_SAVE)]
    stack.store([*best, *saving])
    for place in best:
        members[place].answer()
        members[place].let_go()
    _write([members[place] for place in saving], GroupMember.answer)


def _write(members: Sequence[GroupMember], action: Callable[[GroupMember], None]) -> None:
    """Let each run write its files, several at a time: most of it is waiting for the disk."""
    if members:
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(action, members))
    for member in members:
        member.let_go()


def _train_epoch(
    stack: TogetherTraining, states: Sequence[RunState], now: Sequence[bool]
) -> dict[int, Scores | DivergedError]:
    """Return what came of each active run, by position."""
    losses = stack.train_epoch(
        [state.optimizer for state in states],
        batch_size=states[0].config.batch_size,
        generators=[state.generator for state in states],
        active=now,
    )
    finite = [
        active and not isinstance(loss, DivergedError)
        for active, loss in zip(now, losses, strict=True)
    ]
    train, valid, test = (stack.evaluate(which, finite) for which in ("train", "valid", "test"))
    results: dict[int, Scores | DivergedError] = {}
    for index, loss in enumerate(losses):
        if isinstance(loss, DivergedError):
            results[index] = loss
        elif now[index]:
            a, b, c = train[index], valid[index], test[index]
            results[index] = Scores(a.loss, a.error, b.loss, b.error, c.loss, c.error)
    return results


class _Pace:
    """When to save: so seldom that it costs a small share of the time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began = time.perf_counter()
        self._next = self._began + seconds

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return time.perf_counter() >= self._next

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        now = time.perf_counter()
        pause = max(self._seconds, (now - self._began) / _SAVING) if self._seconds else 0.0
        self._next = now + pause
