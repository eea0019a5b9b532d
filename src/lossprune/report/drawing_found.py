"""How figures are drawn of what runs find on their way: budgets, and λ stage by stage."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, SymmetricalLogLocator

from lossprune.report.drawing import (
    DASHES,
    DENSE,
    legend_beside,
    method_text,
    n_of_runs,
    plot_methods,
)
from lossprune.report.labels import Labels
from lossprune.report.layout import criterion_order
from lossprune.report.panels import colours_of, fall_from_dense, make_panels

_TICKS = [100.0, 50.0, 20.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1]
_PANELS = {"loss": "validation loss", "error": "validation error, %"}


def draw_budget_curves(figure: Figure, data: pd.DataFrame, labels: Labels) -> None:
    """A line a run from the dense network on, by the share of weights kept; a dot where it ends."""
    shown = [name for name in _PANELS if data[name].notna().any()]
    panels = make_panels(figure, [_PANELS[name] for name in shown], "", width=5.0)
    colours = colours_of(criterion_order(data["criterion"]))
    methods = [key for key, _ in data.groupby(["stages", "schedule"])]
    legend: dict[str, Any] = {}
    for name, axes in zip(shown, panels.values(), strict=True):
        scale = 100 if name == "error" else 1
        dense = data[data["sparsity"] == 0].drop_duplicates("seed")[name].mean()
        if np.isfinite(dense):
            legend["dense"] = axes.axhline(scale * dense, **DENSE)
        for criterion, colour in colours.items():
            own = data[data["criterion"] == criterion]
            for key, part in own.groupby(["stages", "schedule"]):
                style: Any = {"color": colour, "ls": DASHES[methods.index(key) % len(DASHES)]}
                text = f"{criterion} {method_text(part)}{n_of_runs(part)}"
                for _, run in part.groupby("run"):
                    kept, value = 100 * (1 - run["sparsity"]), scale * run[name]
                    legend.setdefault(text, axes.plot(kept, value, lw=1.2, **style)[0])
                    end = run["reached"] == 1
                    axes.scatter(kept[end], value[end], s=30, color=colour, zorder=3)
        _fall(axes, data, labels.x)
    legend_beside(figure, legend)


def draw_regs_of_stages(figure: Figure, data: pd.DataFrame, labels: Labels) -> None:
    """λ by the share of weights kept, a panel a criterion, a colour a π; 0 is at the bottom."""
    panels = make_panels(figure, criterion_order(data["criterion"]), labels.y, sharey=True)
    positive = data.loc[data["chosen"] > 0, "chosen"]
    least = 10 ** np.floor(np.log10(positive.min())) if len(positive) else 1.0

    def plot(axes: Axes, part: pd.DataFrame, colour: str, _: str) -> Any:
        style: Any = {"marker": "o", "ms": 3, "lw": 1, "color": colour}
        lines = [
            axes.plot(100 * (1 - run["sparsity"]), run["chosen"], **style)[0]
            for _, run in part.groupby("run")
        ]
        return lines[0]

    plot_methods(figure, panels, data, plot)
    for axes in panels.values():
        axes.set_yscale("symlog", linthresh=least)
        axes.set_ylim(-0.3 * least, None)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=least))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        _fall(axes, data, labels.x)


def _fall(axes: Axes, data: pd.DataFrame, label: str) -> None:
    least = 100 * (1 - data["sparsity"].max())
    fall_from_dense(axes, [tick for tick in _TICKS if tick >= least], label)
