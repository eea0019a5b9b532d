"""How figures look, their titles and their files: the same bytes always."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lossprune.report.labels import Labels

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
FORMATS: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def entitle(figure: Figure, labels: Labels, network: str) -> None:
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


def save_figure(figure: Figure, files: Sequence[Path]) -> list[Path]:
    """Write the figure into files, each in the format that its name ends with, and return them."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # once is enough for all formats
    for file in files:
        figure.savefig(file, metadata=FORMATS[file.suffix.removeprefix(".")])
    return list(files)
