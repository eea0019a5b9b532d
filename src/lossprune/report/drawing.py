"""How each figure is drawn: from the rows of one network, as ``series`` has them, into a figure.

A dotted line is the network before pruning, where what is drawn has such a value.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from lossprune.report import series
from lossprune.report.labels import MEASURES, Labels
from lossprune.report.layout import criterion_order
from lossprune.report.palette import CRITERION_COLOURS, METHOD_COLOURS
from lossprune.report.panels import colours_of, decades, fall_from_dense, in_lines, make_panels
from lossprune.report.table import reg_text, stages_text

Draw = Callable[[Figure, pd.DataFrame, Labels], None]
Plot = Callable[[Axes, pd.DataFrame, str, str], Any]  # rows in a colour, by a label, to a handle

DENSE: Any = {"color": "0.25", "ls": ":", "lw": 1.4}
DASHES, _MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")


def draw_by_sparsity(figure: Figure, data: pd.DataFrame, labels: Labels) -> None:
    """Mean over seeds and each seed, by the share of weights kept, a line a criterion and π."""
    of_loss = data["measure"] == series.LOSS
    data = data.assign(shown=data["value"].where(of_loss, 100 * data["value"]))
    places = data.drop_duplicates(["measure", "tuning"])[["measure", "tuning"]].to_numpy().tolist()
    names = [MEASURES[measure] + tuning for measure, tuning in places]
    panels = make_panels(figure, names, "", width=3.3)
    kept = (100 * (1 - data["sparsity"].unique())).tolist()
    stages = [key for key, _ in data.groupby(["stages", "schedule"])]
    legend: dict[str, Any] = {}
    for (measure, tuning), axes in zip(places, panels.values(), strict=True):
        here = data[(data["measure"] == measure) & (data["tuning"] == tuning)]
        dense = here.drop_duplicates("seed")["dense_value"].mean()
        legend["dense"] = _draw_dense(axes, dense if measure == series.LOSS else 100 * dense)
        for criterion, colour in colours_of(criterion_order(data["criterion"])).items():
            own = here[here["criterion"] == criterion]
            for key, part in own.groupby(["stages", "schedule"]):
                place = stages.index(key) % len(DASHES)
                style: Any = {"color": colour, "marker": _MARKERS[place]}
                mean = part.groupby(100 * (1 - part["sparsity"]))["shown"].mean()
                (line,) = axes.plot(mean.index, mean, ls=DASHES[place], **style)
                x = 100 * (1 - part["sparsity"])
                axes.scatter(x, part["shown"], s=14, alpha=0.55, lw=0, **style)
                name = f"{criterion} {method_text(part)}"
                legend.setdefault(name + _n_of_seeds(part), line)
        fall_from_dense(axes, kept, labels.x)
    legend_beside(figure, legend)


def plot_methods(
    figure: Figure,
    panels: dict[str, Axes],
    data: pd.DataFrame,
    plot: Plot,
    legend: dict[str, Any] | None = None,
) -> None:
    """Plot each π and schedule in the panel of each criterion; one legend names all handles."""
    legend = legend or {}
    groups = list(data.groupby(["stages", "schedule"]))
    for criterion, axes in panels.items():
        for place, (_, part) in enumerate(groups):
            part = part[part["criterion"] == criterion]
            if part.empty:
                continue
            label = method_text(part)
            colour = METHOD_COLOURS[place % len(METHOD_COLOURS)].light
            legend.setdefault(label, plot(axes, part, colour, label))
    legend_beside(figure, legend)


def legend_beside(figure: Figure, handles: dict[str, Any]) -> None:
    """Name the handles beside the panels: in one the legend would lie on what is drawn."""
    figure.legend(handles.values(), handles.keys(), loc="outside right center")


def _draw_dense(axes: Axes, level: float) -> Any:
    return axes.axhline(level, **DENSE)


def method_text(rows: pd.DataFrame) -> str:
    """Return the π and schedule that rows have in common."""
    first = rows.iloc[0]
    linear = " linear" if first["schedule"] == "linear" else ""
    return f"π {stages_text(first['stages'])}{linear}"


def draw_loss_by_reg(figure: Figure, data: pd.DataFrame, labels: Labels) -> None:
    """Mean and range over seeds by λ, a panel a criterion, a line a π; MP is a level."""
    magnitude = data[data["criterion"] == "MP"]  # λ does not change its order: a level, no panel
    data = magnitude if len(magnitude) == len(data) else data[data["criterion"] != "MP"]
    regs = sorted(data["reg"].unique())
    criteria = criterion_order(data["criterion"])
    panels = make_panels(figure, criteria, labels.y, sharey=True)
    legend: dict[str, Any] = {}
    grey = CRITERION_COLOURS["MP"].light
    for criterion, axes in panels.items():
        for _, (level, n) in magnitude[["mean", "count"]].iterrows():
            legend[f"MP (n = {int(n)})"] = axes.axhline(level, color=grey, ls="--", lw=1.2)
        legend["dense"] = _draw_dense(axes, data["dense"].iloc[0])
        axes.set_xticks(range(len(regs)), [reg_text(reg) for reg in regs], rotation=45)
        axes.set_xlabel(labels.x + _n_text(data[data["criterion"] == criterion]["count"]))

    def plot(axes: Axes, part: pd.DataFrame, colour: str, label: str) -> Any:
        part = part.sort_values("reg")
        x = [regs.index(reg) for reg in part["reg"]]
        (line,) = axes.plot(x, part["mean"], "o-", color=colour, label=label)
        axes.fill_between(x, part["min"], part["max"], color=colour, alpha=0.15, lw=0)
        return line

    plot_methods(figure, panels, data, plot, legend)


def _title_with_n(axes: Axes, criterion: str, data: pd.DataFrame) -> None:
    own = data[data["criterion"] == criterion]
    seeds = own.groupby(["stages", "schedule"])["seed"].nunique()
    axes.set_title(in_lines(criterion + _n_text(seeds)))


def n_of_runs(rows: pd.DataFrame) -> str:
    """Return how many runs these rows are of, for a legend."""
    return f"  (n = {rows['run'].nunique()})"


def _n_of_seeds(rows: pd.DataFrame) -> str:
    return _n_text(rows.groupby(["stages", "sparsity"], dropna=False)["seed"].nunique())


def _n_text(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"  (n = {low})" if low == high else f"  (n = {low}–{high})"


def draw_error_by_stages(figure: Figure, data: pd.DataFrame, labels: Labels) -> None:
    """Mean over seeds and each seed, by π, a panel a tuning, a line a criterion."""
    panels = make_panels(figure, sorted(data["tuning"].unique()), labels.y, width=3.6, sharey=True)
    stages, criteria = sorted(data["stages"].unique()), criterion_order(data["criterion"])
    colours = colours_of(criteria)
    legend: dict[str, Any] = {}
    for tuning, axes in panels.items():
        here = data[data["tuning"] == tuning]
        legend["dense"] = _draw_dense(axes, 100 * here["dense"].iloc[0])
        for place, criterion in enumerate(criteria):
            own = here[here["criterion"] == criterion]
            for linear, part in own.groupby(own["schedule"] == "linear"):
                # Side by side, so that no seed hides another's.
                aside = 0.07 * (place - (len(criteria) - 1) / 2)
                at = part["stages"].map(stages.index) + aside
                error = 100 * part["best_test_error"]
                mean = error.groupby(at).mean()
                style: Any = {"color": colours[criterion]}
                (line,) = axes.plot(mean.index, mean, "o--" if linear else "o-", **style)
                axes.scatter(at, error, s=14, alpha=0.55, lw=0, **style)
                name = criterion + (" linear" if linear else "")
                legend.setdefault(name + _n_of_seeds(part), line)
        axes.set_xticks(range(len(stages)), [stages_text(count) for count in stages])
        axes.set_xlabel(labels.x)
    legend_beside(figure, legend)


def draw_stage_changes(figure: Figure, data: pd.DataFrame, labels: Labels) -> None:
    """A dot a stage of a run, a panel a criterion, a colour a π; on the dashed line ΔL is exact."""
    data = data[np.isfinite(data["predicted_change"].astype(float))]
    if data.empty:
        figure.text(0.5, 0.5, "no criterion here predicts a change", ha="center")
        return
    both = data[["predicted_change", "realised_change"]].to_numpy(dtype=float)
    ends = [np.nanmin(both), np.nanmax(both)]
    criteria = criterion_order(data["criterion"])
    panels = make_panels(figure, criteria, labels.y, sharex=True, sharey=True)
    for criterion, axes in panels.items():
        _title_with_n(axes, criterion, data)
        axes.plot(ends, ends, color="0.5", lw=0.8, ls="--")
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.set_yscale("symlog", linthresh=1e-3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator(decades(*ends)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", labelrotation=60)
        axes.set_xlabel(labels.x)

    def plot(axes: Axes, part: pd.DataFrame, colour: str, _: str) -> Any:
        x, y = part["predicted_change"], part["realised_change"]
        return axes.scatter(x, y, s=8, color=colour, alpha=0.6)

    plot_methods(figure, panels, data, plot)


def draw_change_and_gap(figure: Figure, data: pd.DataFrame, labels: Labels) -> None:
    """A dot a run, a panel a tuning, a colour a criterion; the dense network has no gap."""
    found = {
        tuning: rho for (_, tuning), rho in series.correlations(data.assign(tuned=True)).items()
    }
    panels = make_panels(figure, sorted(data["tuning"].unique()), labels.y, width=4.4)
    legend: dict[str, Any] = {}
    for tuning, axes in panels.items():
        here = data[data["tuning"] == tuning]
        legend["dense"] = _draw_dense(axes, 0)
        for criterion, colour in colours_of(criterion_order(data["criterion"])).items():
            part = here[here["criterion"] == criterion]
            if part.empty:
                continue
            x, y = part["loss_change"], 100 * part["error_gap"]
            dots = axes.scatter(x, y, s=12, color=colour, alpha=0.7)
            legend.setdefault(criterion, dots)
        rho = found[tuning]
        text = f"ρ = {rho.rho:.2f} [{rho.low:.2f}, {rho.high:.2f}], n = {rho.n}"
        axes.set_title(f"{tuning}: {text if np.isfinite(rho.rho) else f'n = {rho.n}'}")
        axes.set_xlabel(labels.x)
    legend_beside(figure, legend)


def draw_layers(figure: Figure, data: pd.DataFrame, labels: Labels) -> None:
    """Mean over seeds by layer, a panel a criterion, a line a π."""
    panels = make_panels(figure, criterion_order(data["criterion"]), labels.y, sharey=True)

    def plot(axes: Axes, part: pd.DataFrame, colour: str, label: str) -> Any:
        kept = 100 * (1 - part.groupby("position")["sparsity"].mean())
        return axes.plot(kept.index, kept, "o-", color=colour, label=label)[0]

    plot_methods(figure, panels, data, plot)
    names = data.drop_duplicates("position").sort_values("position")["layer"].tolist()
    ticks = range(0, len(names), max(1, len(names) // 8))
    short = [names[place].removesuffix(".weight") for place in ticks]
    aslant: Any = {"rotation": 60, "ha": "right"} if len("".join(short)) > 20 else {}
    for criterion, axes in panels.items():
        _title_with_n(axes, criterion, data)
        axes.set_xticks(list(ticks), short, **aslant)
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(0, 120)
        axes.yaxis.set_major_formatter("{x:g}")


def draw_curves(figure: Figure, data: pd.DataFrame, labels: Labels) -> None:
    """Mean over seeds by epoch, a panel a criterion, a line a π."""
    panels = make_panels(figure, criterion_order(data["criterion"]), labels.y, sharey=True)
    dense = 100 * data["dense"].iloc[0]
    legend: dict[str, Any] = {}
    for axes in panels.values():
        if dense > 0:  # a logarithmic axis has no place for 0
            legend["dense"] = _draw_dense(axes, dense)

    def plot(axes: Axes, part: pd.DataFrame, colour: str, label: str) -> Any:
        mean = 100 * part.groupby("epoch")["valid_error"].mean()
        return axes.plot(mean.index, mean, color=colour, label=label)[0]

    plot_methods(figure, panels, data, plot, legend)
    for criterion, axes in panels.items():
        _title_with_n(axes, criterion, data)
        axes.set_xlabel(labels.x)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 5, 10]))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 7)))
