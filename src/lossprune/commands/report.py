"""``lossprune report``: results as tables, figures and one page."""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

from dataclasses import dataclass
from pathlib import Path

from lossprune.commands import EXIT_OK
from lossprune.experiment.log import legible
from lossprune.flags import MOST_EPOCHS, check_not_negative, check_whole, flag

_MOST_MB = 1000  # no browser opens a larger page
_MEGABYTE = 1_000_000


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
    pdf: bool = flag(False, "pdf", "write the figures as PDF too, for papers")
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, 1, MOST_EPOCHS)
        check_not_negative("embed_mb", self.embed_mb, _MOST_MB)
        if self.records is not None and self.records.is_dir():
            raise ValueError(f"--records must be a file to write, got the folder {self.records}")


def do(config: ReportConfig, results: str = "results") -> int:
    """Write the report, and say in a few lines what was read and written."""
    from lossprune.report.build import summarise_report, write_report

    written = write_report(
        Path(results),
        config.out,
        embed=config.embed_mb * _MEGABYTE,
        records=config.records,
        epochs=config.epochs,
        pdf=config.pdf,
    )
    print("\n".join(map(legible, summarise_report(written).splitlines())))
    return EXIT_OK
