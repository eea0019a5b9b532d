"""The figure of ``lossprune.sensitivity``: a panel a layer, realised beside predicted."""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from lossprune.pruning import LayerSensitivity, Sensitivity
from lossprune.report.figure_files import FORMATS, STYLE, entitle, save_figure
from lossprune.report.labels import Labels
from lossprune.report.palette import METHOD_COLOURS
from lossprune.report.panels import apart, decades
from lossprune.text_table import without_middle

_WIDTH = 10.0  # inches, of all panels in a row
_FEW = 3  # panels in a row whose text has the size of all figures
_SMALL = 8  # points, of the text of more
_SIGNS = 105  # of a title in bold, as wide as an inch at a point
_LABEL = 0.3  # inches that the label of a sparsity takes
_LINEAR = 100  # below this part of the largest change its axis is linear, as 0 is in it
_COLOUR = METHOD_COLOURS[2].light
_MEDIAN: Any = {"color": "0.6", "lw": 1.0}
_LIMIT: Any = {"color": "0.25", "ls": ":", "lw": 1.2}


def draw_sensitivity(
    found: Sensitivity,
    *files: Path | str,
    network: str = "",
    max_loss_increase: float | None = None,
) -> list[Path]:
    """Draw the change of the loss against the sparsity of each layer alone, and return the files.

    A panel a layer, in the network's order and on the same axes: solid what was realised, dashed
    what was predicted, grey the middle of all layers, and coloured what is above that.

    Args:
        found: what :func:`lossprune.sensitivity` returned.
        files: to write, as PNG, SVG or PDF, as each name ends.
        network: what the figure calls it.
        max_loss_increase: drawn as a line; panels then tell up to which sparsity a layer costs
            less.

    Raises:
        ValueError: a file's name ends otherwise.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if path.suffix.removeprefix(".") not in FORMATS:
            raise ValueError(f"a figure is a .png, .svg or .pdf file, got {str(path)!r}")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 3.0))
        labels = _labels(found, max_loss_increase)
        _draw(figure, found, labels, max_loss_increase)
        entitle(figure, labels, network)
        return save_figure(figure, paths)


def _labels(found: Sensitivity, limit: float | None) -> Labels:
    examples = f"{found.examples:,} example{'' if found.examples == 1 else 's'}"
    marks = f"by {found.criterion}; loss of the dense network {found.loss:.4g} over {examples}"
    if limit is not None:
        marks += f"; at the right above each: the largest sparsity that costs at most {limit:g}"
    if found.no_prediction:
        marks += f"; no prediction: {found.no_prediction}"
    return Labels(
        "Change of the loss against the sparsity of one layer, all others dense",
        marks,
        "sparsity",
        "change of the loss ΔL",
    )


def _draw(figure: Figure, found: Sensitivity, labels: Labels, limit: float | None) -> None:
    columns = _columns(len(found))
    rows = -(-len(found) // columns)
    width = _WIDTH / columns
    figure.set_size_inches(_WIDTH, max(1.3, min(0.75 * width, 2.4)) * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    middle = np.median(
        [[point.realised_change for point in layer.points] for layer in found.layers], axis=0
    )
    handles: dict[str, Any] = {}
    for layer, axes in zip(found.layers, grid, strict=False):
        handles |= _draw_layer(axes, layer, middle)
        if limit is not None:
            handles[f"ΔL = {limit:g}"] = axes.axhline(limit, **_LIMIT)
        _entitle_panel(axes, layer, limit, columns)
        axes.tick_params(labelsize=_SMALL if columns > _FEW else None)
    for spare in grid[len(found) :]:
        spare.set_visible(False)
    for lowest in grid[max(0, len(found) - columns) : len(found)]:
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel(labels.x)
    _scale(grid[0], found, columns)
    figure.supylabel(labels.y, size=STYLE["font.size"])
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))


def _columns(layers: int) -> int:
    """How many panels a row has: about as many as there are rows, of a page's width."""
    return min(layers, 4 if layers <= 12 else 5 if layers <= 20 else 6)


def _draw_layer(axes: Axes, layer: LayerSensitivity, middle: np.ndarray) -> dict[str, Any]:
    kept = [1 - point.sparsity for point in layer.points]
    realised = np.array([point.realised_change for point in layer.points])
    above: Any = {"where": realised > middle, "interpolate": True, "alpha": 0.2, "lw": 0}
    axes.fill_between(kept, middle, realised, color=_COLOUR, **above)
    (median,) = axes.plot(kept, middle, **_MEDIAN)
    (solid,) = axes.plot(kept, realised, "o-", color=_COLOUR, ms=3)
    drawn = {"realised": solid}
    changes = [point.predicted_change for point in layer.points]
    predicted = [change for change in changes if change is not None]
    if len(predicted) == len(kept):
        (drawn["predicted"],) = axes.plot(kept, predicted, ls="--", color=_COLOUR, lw=1.3)
    return {**drawn, "realised, median of the layers": median}


def _entitle_panel(axes: Axes, layer: LayerSensitivity, limit: float | None, columns: int) -> None:
    size: Any = _SMALL if columns > _FEW else STYLE["axes.titlesize"]
    reached = ""
    if limit is not None:
        within = layer.within(limit)
        reached = f"{within:g}" if within else f"< {layer.points[0].sparsity:g}"
        axes.set_title(reached, loc="right", size=size, pad=4, weight="normal")
    signs = int(_SIGNS * _WIDTH / columns / size) - len(reached)
    axes.set_title(without_middle(layer.name.removesuffix(".weight"), signs), size=size, pad=4)


def _scale(axes: Axes, found: Sensitivity, columns: int) -> None:
    """Set both axes, which all panels share."""
    kept = [1 - sparsity for sparsity in found.sparsities]
    axes.set_xscale("log")
    axes.set_xlim(kept[0] * 1.08, kept[-1] / 1.08)
    shown = apart(kept, _LABEL / _WIDTH * columns)
    axes.set_xticks(shown, [f"{1 - part:g}" for part in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    values = [0.0]
    for point in found.rows():
        values += [point["realised_change"], point["predicted_change"] or 0.0]
    low, high = min(values), max(values)
    unit = 10.0 ** math.floor(math.log10(max(-low, high))) if low < high else 1.0
    linear = unit / _LINEAR
    axes.set_yscale("symlog", linthresh=linear)
    axes.set_ylim(1.5 * low - 0.3 * linear, 1.5 * high + 0.3 * linear)
    ticks = [unit * power for power in decades(low / unit, high / unit)]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
