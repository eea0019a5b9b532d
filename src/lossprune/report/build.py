"""Results → a folder with tables, figures and a page."""

from dataclasses import dataclass
from pathlib import Path

from lossprune.pruning.names import counted
from lossprune.report.figures import write_figures
from lossprune.report.follow_up import write_plans
from lossprune.report.page import write_page
from lossprune.report.reading import Results, read_results
from lossprune.report.records_file import check_arrow, write_records
from lossprune.report.settings import MAY_BE_FOUND
from lossprune.report.table import with_words, write_table
from lossprune.report.tables import all_tables


@dataclass(frozen=True)
class Written:
    """What a report came to: what was read, the files, the page first, and the file of records."""

    results: Results
    files: tuple[Path, ...]
    records: Path | None = None


def write_report(
    path: Path,
    out: Path,
    *,
    embed: float,
    records: Path | None = None,
    epochs: int | None = None,
    pdf: bool = False,
) -> Written:
    """Report a folder of results, or a file of their records.

    Args:
        path: of either.
        out: the folder to write into.
        embed: bytes of compressed logs and records inside the page.
        records: a file to write all records into, if any.
        epochs: take longer fine-tunings as if they had ended after so many, if given.
        pdf: write the figures as PDF as well.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: there is no record that can be used, or the report cannot be written.
    """
    if records is not None:
        check_arrow()
    results = read_results(path, epochs)
    tables = all_tables(results.runs)
    try:
        for folder in (out / "tables", out / "figures"):
            folder.mkdir(parents=True, exist_ok=True)
        files = [path for table in tables for path in write_table(table, out / "tables")]
        files.append(out / "tables" / "runs.csv")
        told = with_words(results.runs, MAY_BE_FOUND)
        told.to_csv(files[-1], index=False, lineterminator="\n")
        files += write_plans(results.runs, out)
        figures = write_figures(results, out / "figures", pdf=pdf)
        names = [path.relative_to(out).as_posix() for path in figures]
        page = write_page(results, tables, out, names, embed)
    except OSError as error:
        raise ValueError(f"cannot write --out {out}: {error.strerror or error}") from error
    if records is not None:
        write_records(results, records)
    return Written(results, (page, *files, *figures), records)


def summarise_report(written: Written) -> str:
    """Return what was read and written, in a few lines."""
    runs, left_out = written.results.runs, written.results.left_out
    status = runs["status"].value_counts()
    told = [
        f"{status[name]} {name}" for name in ("finished", "running", "diverged") if name in status
    ]
    lines = [f"{counted(len(runs), 'run')}: {', '.join(told)}"]
    lines += [f"left out {item.path}: {item.reason}" for item in left_out[:5]]
    if len(left_out) > 5:
        lines.append(f"left out {len(left_out) - 5} more; the page lists them all")
    others = len(written.files) - 1
    lines.append(f"wrote {written.files[0]} and {others} tables and figures beside it")
    if written.records is not None:
        lines.append(f"wrote all records into {written.records}")
    return "\n".join(lines)
