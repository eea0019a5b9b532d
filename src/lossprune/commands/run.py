"""``lossprune run``: one run, with the flags of its :class:`RunConfig`."""

import hashlib
import sys

from lossprune.commands import EXIT_DIVERGED, EXIT_OK
from lossprune.experiment.config import RunConfig
from lossprune.experiment.folder import RunFolder
from lossprune.experiment.log import summarise
from lossprune.experiment.ranks import joined
from lossprune.experiment.record import RunRecord, RunStatus


def do(config: RunConfig) -> int:
    """Do the run, or go on with it; one that is finished is left as it is."""
    with joined() as ranks:
        record = RunFolder(config.folder, ranks).settled()
        if record is None:
            from lossprune.experiment import run
            from lossprune.progress import shown_progress
            from lossprune.user_code import blaming_users_code

            with shown_progress(ranks.first) as progress, blaming_users_code():
                progress.note(f"folder: {config.folder}")
                record = run(config, progress)
                progress.note(summarise(record))
        elif ranks.first:
            print("Experiment already exists!")
            _warn_of_another_start(config, record)
        if record.status == RunStatus.DIVERGED and ranks.first:
            print(f"diverged: {record.message}", file=sys.stderr)
    return EXIT_DIVERGED if record.status == RunStatus.DIVERGED else EXIT_OK


def _warn_of_another_start(config: RunConfig, record: RunRecord) -> None:
    """The folder's name tells only that there was a start network, not which."""
    if config.start is None or not config.start.is_file():
        return
    if hashlib.sha256(config.start.read_bytes()).hexdigest() != record.start.sha256:
        print(f"note: it began from another network than {config.start}", file=sys.stderr)
