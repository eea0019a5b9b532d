"""The report's page: one HTML file that needs nothing else."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import lossprune
from lossprune.experiment.folder import LOG, RECORD
from lossprune.report import palette
from lossprune.report.page_data import as_json, embedded_details, page_data
from lossprune.report.reading import Results
from lossprune.report.table import Table

SCRIPTS = (
    *("charts.js", "runs.js", "headlines.js", "figures.js", "sparsity.js"),
    *("found.js", "tables.js", "detail.js", "page.js"),
)
"""The page's one script, in the order in which its parts are read."""

_PARTS = Path(__file__).parent / "templates"


def write_page(
    results: Results, tables: tuple[Table, ...], out: Path, figures: list[str], embed: float
) -> Path:
    """Write ``index.html`` into ``out`` and return it.

    Args:
        results: what was read.
        tables: as :func:`lossprune.report.tables.all_tables` makes them.
        out: the folder.
        figures: files beside the page, relative to it.
        embed: bytes of compressed logs and records inside the page; the other runs link to theirs,
            where they are at hand.
    """
    data = page_data(results, tables, figures)
    folder = results.source.folder
    beside = None if folder is None else Path(os.path.relpath(folder, out)).as_posix()
    data["root"] = None if beside is None else quote(beside)
    data["files"] = {"log": LOG, "record": RECORD}
    page = out / "index.html"
    page.write_text(
        _environment()
        .get_template("page.html.j2")
        .render(
            counts=_counts(results),
            left_out=results.left_out,
            name=results.source.name,
            version=lossprune.__version__,
            data=Markup(as_json(data)),
            details=embedded_details(results, embed),
            style=Markup(palette.style()) + _part("page.css"),
            script=Markup().join(map(_part, SCRIPTS)),
        ),
        encoding="utf-8",
        newline="\n",
    )
    return page


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("lossprune.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _part(name: str) -> Markup:
    return Markup((_PARTS / name).read_text(encoding="utf-8"))


def _counts(results: Results) -> dict[str, Any]:
    status = results.runs["status"].value_counts()
    return {
        "runs": len(results.runs),
        "finished": int(status.get("finished", 0)),
        "unfinished": int(status.get("running", 0)),
        "diverged": int(status.get("diverged", 0)),
        "left out": len(results.left_out),
    }
