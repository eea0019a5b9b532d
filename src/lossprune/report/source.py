"""Where records come from: a folder of results here, or one file of all (``records_file``)."""

import json
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from lossprune.experiment.folder import LOG, MASK, RECORD, RunFolder
from lossprune.experiment.record import RunRecord
from lossprune.pruning import Mask, PruningError
from lossprune.torch_state import count_cores, using_threads

T = TypeVar("T")

_PARALLEL_FROM = 500  # records; below that, starting processes takes longer than reading
_CHUNK = 50


class ResultsFolder:
    """Every ``record.json`` below a folder, however deep; it may be one run's own.

    Runs are named by their folders, relative to it.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = self.folder = path
        self.name = path.resolve().name
        self._runs = list(find_runs(path))
        if not self._runs:
            raise ValueError(f"no {RECORD} in {path} or below it: there is nothing to report")

    def read(self, take: Callable[[RunRecord], T]) -> Iterator[tuple[str, T | str]]:
        """Give every run and what ``take`` makes of its record, or the reason why it does not.

        Where there are many, several processes read: ``take`` must be picklable.
        """
        folders = [run.relative_to(self.path).as_posix() for run in self._runs]
        return zip(folders, self._taken(partial(_read, take)), strict=True)

    def _taken(self, read: Callable[[Path], T]) -> Iterator[T]:
        workers = min(count_cores(), 8)
        if len(self._runs) < _PARALLEL_FROM or workers < 2:
            yield from map(read, self._runs)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield from pool.map(read, self._runs, chunksize=_CHUNK)

    def records(self, folders: Collection[str]) -> Iterator[RunRecord]:
        """Read the records of these runs again, one at a time.

        Raises:
            ValueError: one has gone, or cannot be read any more.
        """
        for folder in folders:
            record = _record(self.path / folder)
            if record is None:
                raise ValueError(f"{self.path / folder / RECORD} has gone")
            yield record

    def layers(self, folders: Iterable[str]) -> Iterator[dict[str, float] | None]:
        """Read the sparsity of each layer from the masks; None of a run without one."""
        return (layer_sparsity(self.path / folder) for folder in folders)

    def texts(self, folders: Collection[str]) -> Iterator[tuple[str, str]]:
        """Read log and record of these runs as text; what cannot be read is empty."""
        for folder in folders:
            yield _text(self.path / folder / LOG), _text(self.path / folder / RECORD)


def layer_sparsity(folder: Path) -> dict[str, float] | None:
    """Return the fraction removed of each prunable parameter, in order; None without a mask.

    A damaged mask counts as none: the record alone carries the results.
    """
    with using_threads(1):  # thousands of small sums, for which others would only be waited for
        try:
            mask = Mask.load(folder / MASK)
        except (OSError, PruningError):
            return None
        return {name: 1 - float(kept.float().mean()) for name, kept in mask.items() if kept.numel()}


def find_runs(root: Path) -> Iterator[Path]:
    """Give the folders under ``root`` that hold a record, in the order of their names."""
    for folder, inside, files in os.walk(root):
        inside.sort()
        if RECORD in files:
            inside.clear()
            yield Path(folder)


def _read(take: Callable[[RunRecord], T], folder: Path) -> T | str:
    return attempt(take, partial(_record, folder))


def _record(folder: Path) -> RunRecord | None:
    """Read a record; what is no Unicode in it, as bytes of a path may be, is a question mark."""
    record = RunFolder(folder).record()
    if record is None:
        return None
    texts = record.environment, vars(record.start), record.message, record.training
    try:
        json.dumps(texts, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        contents = json.dumps(record.to_dict(), ensure_ascii=False).encode(errors="replace")
        return replace(RunRecord.from_json(contents.decode()), config=record.config)
    return record


def attempt(take: Callable[[RunRecord], T], load: Callable[[], RunRecord | None]) -> T | str:
    """Return what is made of a run's record, or the reason why there is nothing."""
    try:
        record = load()
        return f"{RECORD} has gone" if record is None else take(record)
    except ValueError as error:
        return str(error)
    except (TypeError, KeyError, AttributeError) as error:
        return f"{RECORD} holds something unexpected: {error}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
