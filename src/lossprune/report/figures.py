"""The report's figures as files: PNG to look at, SVG and PDF to print, the same bytes always."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from lossprune.report import drawing, series
from lossprune.report.drawing import Draw
from lossprune.report.labels import LABELS, Labels, file_slugs
from lossprune.report.layout import network_names
from lossprune.report.reading import Results

_TEXT_SIZE, _TITLE_SIZE = 9, 11  # all text, but for the title of a figure
_TITLE_INCHES, _LINE_INCHES, _SIGNS_PER_INCH = 0.24, 0.165, 13

STYLE: Any = {
    "font.size": _TEXT_SIZE,
    "axes.labelsize": _TEXT_SIZE,
    "axes.titlesize": _TEXT_SIZE,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.labelsize": _TEXT_SIZE,
    "ytick.labelsize": _TEXT_SIZE,
    "legend.fontsize": _TEXT_SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.dpi": 144,
    "text.parse_math": False,  # a name with dollar signs is no formula
    "svg.hashsalt": "lossprune",  # else the identifiers inside are random
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # TrueType: journals refuse the Type 3 of old
}

# No day and no version are written, so that the same results make the same bytes.
_METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def write_figures(results: Results, folder: Path, *, pdf: bool = False) -> list[Path]:
    """Draw every figure of every network that has the data for it, and return the files.

    As PNG and SVG, and if asked as PDF, which takes three times as long as both.
    """
    formats = [suffix for suffix in _METADATA if pdf or suffix != "pdf"]
    with mpl.rc_context(STYLE):
        return [
            path
            for name, figure in drawn_figures(results)
            for path in _save(figure, folder / name, formats)
        ]


def drawn_figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Give each figure with the name of its files, drawn in the style that is set."""
    slugs = file_slugs(network_names(results.runs))
    for name, data, draw in _all_figures(results):
        for network, part in data.groupby("network"):
            figure = Figure(figsize=(7.2, 3.4))
            draw(figure, part, LABELS[name])
            _entitle(figure, LABELS[name], str(network))
            yield f"{name}--{slugs[str(network)]}", figure


def _entitle(figure: Figure, labels: Labels, network: str) -> None:
    """Write above the panels what is drawn, of which network, and what the marks are."""
    width, height = figure.get_size_inches()
    signs = int(_SIGNS_PER_INCH * width)
    under = [*textwrap.wrap(network, signs), *textwrap.wrap(labels.marks, signs)]
    room = _TITLE_INCHES + _LINE_INCHES * len(under) + 0.08
    whole = height + room
    figure.set_size_inches(width, whole)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, height / whole))
    left, top = 0.06 / width, 1 - 0.06 / whole
    figure.text(left, top, labels.title, va="top", size=_TITLE_SIZE, weight="bold")
    figure.text(left, top - _TITLE_INCHES / whole, "\n".join(under), va="top")


def _save(figure: Figure, path: Path, formats: list[str]) -> list[Path]:
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # once is enough for all formats
    files = []
    for suffix in formats:
        files.append(path.with_name(f"{path.name}.{suffix}"))
        figure.savefig(files[-1], metadata=_METADATA[suffix])
    return files


def _all_figures(results: Results) -> Iterator[tuple[str, pd.DataFrame, Draw]]:
    runs = results.runs
    by_sparsity = series.by_sparsity(runs).dropna(subset="value")
    yield "error-against-sparsity", by_sparsity, drawing.draw_by_sparsity
    yield "loss-against-lambda", series.loss_by_reg(runs), drawing.draw_loss_by_reg
    yield "error-against-stages", series.error_by_stages(runs), drawing.draw_error_by_stages
    yield "predicted-against-realised", series.stage_changes(results), drawing.draw_stage_changes
    yield "loss-change-against-error-gap", series.change_and_gap(runs), drawing.draw_change_and_gap
    yield "layer-sparsity", series.layers(results), drawing.draw_layers
    yield "training-curves", series.training_curves(results), drawing.draw_curves
