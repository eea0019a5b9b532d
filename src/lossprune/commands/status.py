"""``lossprune status``: how the runs of a results folder stand."""

from dataclasses import dataclass
from pathlib import Path

from lossprune.commands import EXIT_OK
from lossprune.flags import flag


@dataclass(frozen=True)
class StatusConfig:
    """Say what is finished, running, waiting, interrupted and failed in a folder of results."""

    debug: bool = flag(False, "debug", "show the traceback of an error")


def do(_: StatusConfig, results: str = "results") -> int:
    """Print how every run and plan of the folder stands."""
    from lossprune.sweep.status import describe_status

    print(describe_status(Path(results)))
    return EXIT_OK
