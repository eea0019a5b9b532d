"""``lossprune run``: one run, with the flags of its :class:`RunConfig`."""

import hashlib
import sys
import time

from lossprune.commands import EXIT_DIVERGED, EXIT_OK
from lossprune.experiment.config import RunConfig
from lossprune.experiment.folder import RECORD, RunFolder, start_file
from lossprune.experiment.log import summarise
from lossprune.experiment.ranks import Ranks, joined, leave
from lossprune.experiment.record import RunRecord, RunStatus


def do(config: RunConfig) -> int:
    """Do the run, or go on with it; one that is finished is left as it is.

    Raises:
        ValueError: as :func:`lossprune.experiment.run`; or a finished run in the same folder began
            from another start network.
    """
    with joined() as ranks:
        record = RunFolder(config.folder, ranks).settled()
        if record is None:
            record = _run(config, ranks)
        else:
            with ranks.together():
                _check_start(config, record)
            if ranks.first:
                print("Experiment already exists!")
                print(_told_result(config, record), file=sys.stderr)
        if record.status == RunStatus.DIVERGED and ranks.first:
            print(f"diverged: {record.message}", file=sys.stderr)
    status = EXIT_DIVERGED if record.status == RunStatus.DIVERGED else EXIT_OK
    if ranks.world > 1:
        leave(status)
    return status


def _run(config: RunConfig, ranks: Ranks) -> RunRecord:
    from lossprune.experiment import run
    from lossprune.progress import shown_progress
    from lossprune.user_code import blaming_users_code

    with shown_progress(ranks.first) as progress, blaming_users_code():
        progress.note(f"folder: {config.folder}")
        record = run(config, progress)
        progress.note(summarise(record))
    return record


def _check_start(config: RunConfig, record: RunRecord) -> None:
    """Raise ValueError where the result is of another start network than the one given.

    The folder's name tells only that there was one, not which.  A file that has gone says nothing.
    """
    file = None if config.start is None else start_file(config.start)
    if file is None or not file.is_file():
        return
    if hashlib.sha256(file.read_bytes()).hexdigest() == record.start.sha256:
        return
    from lossprune.experiment.start import holds_start

    if not holds_start(file, record):
        raise ValueError(
            f"the result in {config.folder} began from another start network "
            f"({record.start.path}) than --model_0 {config.start}; give --path another folder"
        )


def _told_result(config: RunConfig, record: RunRecord) -> str:
    """Return where the result is, of when, and what it was."""
    try:
        written = time.localtime((config.folder / RECORD).stat().st_mtime)
        when = time.strftime(" on %Y-%m-%d at %H:%M", written)
    except OSError:
        when = ""
    scores = "" if record.best is None else f", test error {record.best.scores.test_error:.2%}"
    return f"{record.status}{when}{scores}: {config.folder}"
