"""``lossprune compare``: what differs between two runs, or two sets of results."""

from dataclasses import dataclass
from pathlib import Path

from lossprune.commands import EXIT_OK
from lossprune.flags import flag


@dataclass(frozen=True)
class CompareConfig:
    """Say what differs between two runs, or two folders of results or files of their records."""

    debug: bool = flag(False, "debug", "show the traceback of an error")


def do(_: CompareConfig, *paths: str) -> int:
    """Print what differs in settings and in outcome."""
    if len(paths) != 2:
        raise ValueError(
            f"compare takes two runs or two folders of results, got {len(paths)}: "
            "lossprune compare A B"
        )
    from lossprune.report.comparison import compare

    print(compare(Path(paths[0]), Path(paths[1])))
    return EXIT_OK
