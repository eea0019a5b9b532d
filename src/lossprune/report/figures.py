"""The report's figures as files: PNG to look at, SVG and PDF to print, the same bytes always."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from lossprune.report import drawing, drawing_found, series
from lossprune.report.drawing import Draw
from lossprune.report.figure_files import FORMATS, STYLE, entitle, save_figure
from lossprune.report.labels import LABELS, file_slugs
from lossprune.report.layout import network_names
from lossprune.report.reading import Results


def write_figures(results: Results, folder: Path, *, pdf: bool = False) -> list[Path]:
    """Draw every figure of every network that has the data for it, and return the files.

    As PNG and SVG, and if asked as PDF, which takes three times as long as both.
    """
    formats = [suffix for suffix in FORMATS if pdf or suffix != "pdf"]
    with mpl.rc_context(STYLE):
        return [
            path
            for name, figure in drawn_figures(results)
            for path in save_figure(figure, [folder / f"{name}.{suffix}" for suffix in formats])
        ]


def drawn_figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Give each figure with the name of its files, drawn in the style that is set."""
    slugs = file_slugs(network_names(results.runs))
    for name, data, draw in _all_figures(results):
        for network, part in data.groupby("network"):
            figure = Figure(figsize=(7.2, 3.4))
            draw(figure, part, LABELS[name])
            entitle(figure, LABELS[name], str(network))
            yield f"{name}--{slugs[str(network)]}", figure


def _all_figures(results: Results) -> Iterator[tuple[str, pd.DataFrame, Draw]]:
    runs = results.runs
    by_sparsity = series.by_sparsity(runs).dropna(subset="value")
    yield "error-against-sparsity", by_sparsity, drawing.draw_by_sparsity
    yield "loss-against-lambda", series.loss_by_reg(runs), drawing.draw_loss_by_reg
    yield "error-against-stages", series.error_by_stages(runs), drawing.draw_error_by_stages
    curves = series.budget_curves(results)
    yield "validation-against-sparsity", curves, drawing_found.draw_budget_curves
    yield "lambda-of-stages", series.regs_of_stages(results), drawing_found.draw_regs_of_stages
    yield "predicted-against-realised", series.stage_changes(results), drawing.draw_stage_changes
    yield "loss-change-against-error-gap", series.change_and_gap(runs), drawing.draw_change_and_gap
    yield "layer-sparsity", series.layers(results), drawing.draw_layers
    yield "training-curves", series.training_curves(results), drawing.draw_curves
