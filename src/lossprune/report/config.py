"""The flags of ``lossprune report`` and ``lossprune compare``."""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

from dataclasses import dataclass
from pathlib import Path

from lossprune.flags import MOST_EPOCHS, check_not_negative, check_whole, flag

_MOST_MB = 1000  # no browser opens a larger page


@dataclass(frozen=True)
class ReportConfig:
    """Turn a folder of results, or a file of their records, into tables, figures and one page.

    Raises:
        ValueError: a value that its flag does not accept.
    """

    out: Path = flag(Path("report"), "out", "folder to write into")
    embed_mb: float = flag(
        4.0, "embed_mb", "megabytes of logs and records inside the page; the others are linked"
    )
    records: Path | None = flag(
        None, "records", "Parquet file to write all records into; report reads it like the folder"
    )
    epochs: int | None = flag(
        None, "epochs", "take longer fine-tunings as if they had ended after so many epochs"
    )
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, 1, MOST_EPOCHS)
        check_not_negative("embed_mb", self.embed_mb, _MOST_MB)
        if self.records is not None and self.records.is_dir():
            raise ValueError(f"--records must be a file to write, got the folder {self.records}")


@dataclass(frozen=True)
class CompareConfig:
    """Say what differs between two runs, or two folders of results or files of their records."""

    debug: bool = flag(False, "debug", "show the traceback of an error")
