"""What figures have in common: panels and their titles, places of labels, colours of criteria."""

import itertools
import re
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lossprune.report.layout import alone
from lossprune.report.palette import CRITERION_COLOURS, MOVED_COLOURS, OTHER_COLOUR

_LONGEST = 26  # signs of a line above a panel
_APART = 0.09  # of an axis: labels nearer than that run into each other


def make_panels(
    figure: Figure, names: list[str], y_label: str, width: float = 2.5, **options: Any
) -> dict[str, Axes]:
    """Give each name a panel, ten inches in a row; the first tells what is drawn upwards."""
    columns = min(len(names), int(10 / width))
    rows = -(-len(names) // columns)
    figure.set_size_inches(max(5.4, width * columns + 0.8), 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for spare in grid[len(names) :]:
        spare.set_visible(False)
    for axes, name in zip(grid, names, strict=False):
        axes.set_title(in_lines(name))
    grid[0].set_ylabel(y_label)
    return dict(zip(names, grid, strict=False))


def in_lines(title: str) -> str:
    """Break the title of a panel where it is too long, before what moves and the number of runs."""
    lines = [""]
    for part in re.split(r"(?=\+)|  (?=\()", title):
        if lines[-1] and len(lines[-1] + part) > _LONGEST:
            lines.append(part)
        else:
            lines[-1] += ("  " if part.startswith("(") else "") + part
    return "\n".join(lines)


def apart(values: list[float], share: float = _APART) -> list[float]:
    """Return those of falling values whose labels have room on a logarithmic axis.

    They take this share of it.
    """
    least = share * np.log(values[0] / values[-1])
    found = values[:1]
    for value in values[1:]:
        if np.log(found[-1] / value) >= least:
            found.append(value)
    return found


def decades(low: float, high: float) -> list[float]:
    """Return 0 and the powers of ten about it, every other one where they are many."""
    found = [0.0]
    for least in (-2, -3, -4):
        powers = [sign * 10.0**n for n in range(least, 7) for sign in (-1, 1)]
        found = sorted([0.0, *(power for power in powers if low <= power <= high)])
        if len(found) > 2:
            break
    return found if len(found) <= 6 else found[found.index(0) % 2 :: 2]


def fall_from_dense(axes: Axes, kept: list[float], label: str) -> None:
    """Let the weights kept, in percent, fall along the axis, with as many labels as have room."""
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = apart(sorted(kept, reverse=True))
    axes.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
    axes.set_xlabel(label)


def colours_of(criteria: list[str]) -> dict[str, str]:
    """Return the colour of each criterion: shades of one where more than the mask moves."""
    colours = {name: CRITERION_COLOURS.get(name, OTHER_COLOUR) for name in criteria}
    for criterion, shades in MOVED_COLOURS.items():
        moved = [name for name in criteria if alone(name) == criterion != name]
        colours |= dict(zip(moved, itertools.cycle(shades), strict=False))
    return {name: colour.light for name, colour in colours.items()}
