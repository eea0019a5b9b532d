"""The report's figures as files: PNG to paste and SVG to print, the same bytes every time."""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from lossprune.report import series
from lossprune.report.layout import criterion_order
from lossprune.report.palette import CRITERION_COLOURS, METHOD_COLOURS, OTHER_COLOUR
from lossprune.report.reading import Results
from lossprune.report.table import reg_text

_LONGEST_SLUG = 100

_STYLE: Any = {
    "figure.constrained_layout.use": True,
    "font.size": 9,
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
}

Draw = Callable[[Figure, pd.DataFrame], None]
Plot = Callable[[Axes, pd.DataFrame, str, str], Any]  # rows in a colour, by a label, to a handle


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Draw every figure of every network that has the data for it, and return the files."""
    files = []
    with mpl.rc_context(_STYLE):
        for name, data, draw in _all_figures(results):
            for network, part in data.groupby("network"):
                figure = Figure(figsize=(7.2, 3.4))
                draw(figure, part)
                figure.suptitle(str(network), fontsize=9)
                files += _save(figure, folder / f"{name}--{slug(str(network))}")
    return files


def slug(text: str) -> str:
    """Return a text as a part of a file name; of a long one its beginning and a digest.

    >>> slug("MLP on mnist, 98.847 % removed")
    'mlp-on-mnist-98.847-removed'
    """
    slugged = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
    if len(slugged) <= _LONGEST_SLUG:
        return slugged
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]
    return f"{slugged[:_LONGEST_SLUG]}-{digest}"


def _save(figure: Figure, path: Path) -> list[Path]:
    png, svg = path.with_name(path.name + ".png"), path.with_name(path.name + ".svg")
    figure.savefig(png, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]


def _all_figures(results: Results) -> Iterator[tuple[str, pd.DataFrame, Draw]]:
    runs = results.runs
    yield "loss-against-lambda", series.loss_by_reg(runs), _draw_loss_by_reg
    yield "error-against-stages", series.error_by_stages(runs), _draw_error_by_stages
    yield "predicted-against-realised", series.stage_changes(results), _draw_stage_changes
    yield "loss-change-against-error-gap", series.change_and_gap(runs), _draw_change_and_gap
    yield "layer-sparsity", series.layers(results), _draw_layers
    yield "training-curves", series.training_curves(results), _draw_curves


def _panels(figure: Figure, names: list[str], y_label: str, **options: Any) -> dict[str, Axes]:
    """One panel a name, four in a row at most; the first tells what is drawn upwards."""
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure.set_size_inches(max(4.2, 2.5 * columns), 0.5 + 2.7 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for spare in grid[len(names) :]:
        spare.set_visible(False)
    for axes, name in zip(grid, names, strict=False):
        axes.set_title(name, fontsize=9, loc="left", fontweight="bold")
    grid[0].set_ylabel(y_label)
    return dict(zip(names, grid, strict=False))


def _plot_methods(
    figure: Figure,
    panels: dict[str, Axes],
    data: pd.DataFrame,
    plot: Plot,
    labels: dict[str, Any] | None = None,
) -> None:
    """Plot each π and schedule in the panel of each criterion; one legend names all handles."""
    labels = labels or {}
    groups = list(data.groupby(["stages", "schedule"]))
    for criterion, axes in panels.items():
        for place, ((stages, schedule), part) in enumerate(groups):
            part = part[part["criterion"] == criterion]
            if part.empty:
                continue
            label = f"π {stages}" + (" linear" if schedule == "linear" else "")
            colour = METHOD_COLOURS[place % len(METHOD_COLOURS)].light
            labels.setdefault(label, plot(axes, part, colour, label))
    figure.legend(labels.values(), labels.keys(), loc="outside right upper")


def _colour(criterion: str) -> str:
    return CRITERION_COLOURS.get(criterion, OTHER_COLOUR).light


def _draw_loss_by_reg(figure: Figure, data: pd.DataFrame) -> None:
    magnitude = data[data["criterion"] == "MP"]  # λ does not change its order: a level, no panel
    data = magnitude if len(magnitude) == len(data) else data[data["criterion"] != "MP"]
    regs = sorted(data["reg"].unique())
    criteria = criterion_order(data["criterion"])
    panels = _panels(figure, criteria, "training loss after pruning", sharey=True)
    labels: dict[str, Any] = {}
    for criterion, axes in panels.items():
        for _, (level, n) in magnitude[["mean", "count"]].iterrows():
            labels[f"MP (n = {int(n)})"] = axes.axhline(level, color=_colour("MP"), ls="--", lw=1.2)
        axes.set_xticks(range(len(regs)), [reg_text(reg) for reg in regs], rotation=45)
        axes.set_xlabel("λ" + _n_text(data[data["criterion"] == criterion]["count"]))

    def plot(axes: Axes, part: pd.DataFrame, colour: str, label: str) -> Any:
        part = part.sort_values("reg")
        x = [regs.index(reg) for reg in part["reg"]]
        (line,) = axes.plot(x, part["mean"], "o-", color=colour, label=label)
        axes.fill_between(x, part["min"], part["max"], color=colour, alpha=0.15, lw=0)
        return line

    _plot_methods(figure, panels, data, plot, labels)


def _title_with_n(axes: Axes, criterion: str, data: pd.DataFrame) -> None:
    own = data[data["criterion"] == criterion]
    seeds = own.groupby(["stages", "schedule"])["seed"].nunique()
    axes.set_title(criterion + _n_text(seeds), fontsize=9, loc="left", fontweight="bold")


def _n_text(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"  (n = {low})" if low == high else f"  (n = {low}–{high})"


def _draw_error_by_stages(figure: Figure, data: pd.DataFrame) -> None:
    tunings = sorted(data["tuning"].unique())
    panels = _panels(figure, tunings, "test error after fine-tuning, %", sharey=True)
    stages = sorted(data["stages"].unique())
    for tuning, axes in panels.items():
        here = data[data["tuning"] == tuning]
        for offset, criterion in enumerate(criterion_order(here["criterion"])):
            part = here[here["criterion"] == criterion].sort_values("stages")
            x = np.array([stages.index(count) for count in part["stages"]]) + 0.06 * offset - 0.09
            mean = 100 * part["mean"].to_numpy()
            reach = np.abs(100 * part[["min", "max"]].to_numpy().T - mean)
            style = {"fmt": "o-", "color": _colour(criterion), "capsize": 2}
            label = criterion + _n_text(part["count"])
            axes.errorbar(x, mean, yerr=reach, label=label, **style)  # type: ignore[arg-type]
        axes.set_xticks(range(len(stages)), [str(count) for count in stages])
        axes.set_xlabel("stages π")
        axes.legend()


def _draw_stage_changes(figure: Figure, data: pd.DataFrame) -> None:
    data = data[np.isfinite(data["predicted_change"].astype(float))]
    if data.empty:
        figure.text(0.5, 0.5, "no criterion here predicts a change", ha="center")
        return
    both = data[["predicted_change", "realised_change"]].to_numpy(dtype=float)
    ends = [np.nanmin(both), np.nanmax(both)]
    criteria = criterion_order(data["criterion"])
    panels = _panels(figure, criteria, "realised ΔL of a stage", sharex=True, sharey=True)
    for criterion, axes in panels.items():
        _title_with_n(axes, criterion, data)
        axes.plot(ends, ends, color="0.5", lw=0.8, ls="--")
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.tick_params(axis="x", labelrotation=60, labelsize=7)
        axes.set_xlabel("predicted ΔL of a stage")

    def plot(axes: Axes, part: pd.DataFrame, colour: str, _: str) -> Any:
        x, y = part["predicted_change"], part["realised_change"]
        return axes.scatter(x, y, s=8, color=colour, alpha=0.6)

    _plot_methods(figure, panels, data, plot)


def _draw_change_and_gap(figure: Figure, data: pd.DataFrame) -> None:
    found = {
        tuning: rho for (_, tuning), rho in series.correlations(data.assign(tuned=True)).items()
    }
    y_label = "error gap after fine-tuning, points"
    panels = _panels(figure, sorted(data["tuning"].unique()), y_label)
    for tuning, axes in panels.items():
        here = data[data["tuning"] == tuning]
        for criterion in criterion_order(here["criterion"]):
            part = here[here["criterion"] == criterion]
            x, y = part["loss_change"], 100 * part["error_gap"]
            axes.scatter(x, y, s=12, color=_colour(criterion), alpha=0.7, label=criterion)
        rho = found[tuning]
        text = f"{tuning}: ρ = {rho.rho:.2f} [{rho.low:.2f}, {rho.high:.2f}], n = {rho.n}"
        axes.set_title(text, fontsize=8, loc="left")
        axes.set_xlabel("ΔL by pruning")
        axes.set_ylabel(y_label)
        axes.legend()


def _draw_layers(figure: Figure, data: pd.DataFrame) -> None:
    panels = _panels(figure, criterion_order(data["criterion"]), "weights kept, %", sharey=True)

    def plot(axes: Axes, part: pd.DataFrame, colour: str, label: str) -> Any:
        kept = 100 * (1 - part.groupby("position")["sparsity"].mean())
        return axes.plot(kept.index, kept, "o-", color=colour, label=label)[0]

    _plot_methods(figure, panels, data, plot)
    names = data.drop_duplicates("position").sort_values("position")["layer"].tolist()
    ticks = range(0, len(names), max(1, len(names) // 8))
    short = [names[place].removesuffix(".weight") for place in ticks]
    for criterion, axes in panels.items():
        _title_with_n(axes, criterion, data)
        axes.set_xticks(list(ticks), short, rotation=60, ha="right", fontsize=7)
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(0, 120)
        axes.yaxis.set_major_formatter("{x:g}")


def _draw_curves(figure: Figure, data: pd.DataFrame) -> None:
    panels = _panels(figure, criterion_order(data["criterion"]), "validation error, %", sharey=True)

    def plot(axes: Axes, part: pd.DataFrame, colour: str, label: str) -> Any:
        mean = 100 * part.groupby("epoch")["valid_error"].mean()
        return axes.plot(mean.index, mean, color=colour, label=label)[0]

    _plot_methods(figure, panels, data, plot)
    for criterion, axes in panels.items():
        _title_with_n(axes, criterion, data)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 7)))
