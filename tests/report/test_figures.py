"""What the figures look like, by where matplotlib puts their parts."""

import itertools

import matplotlib as mpl
import pytest
from matplotlib.text import Text

from lossprune.report.figure_files import STYLE
from lossprune.report.figures import drawn_figures
from lossprune.report.reading import read_results
from tests.report.conftest import Maker


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Figures of one network at two sparsities, with the longest axes, by their names."""
    maker = Maker(tmp_path_factory.mktemp("figures") / "made")
    for sparsity, seed in itertools.product((0.8, 0.9), (1, 2, 3)):
        for criterion, stages in (("MP", 1), ("QM", 1), ("QM", 14), ("LM", 140)):
            error = 0.03 + 0.01 * seed + sparsity / 100
            maker.run(criterion, stages, 0.0, seed, sparsity=sparsity, error=error, epochs=269)
        for finish in (0, 10):
            moved = {"compensate": True, "finish": finish, "recalibrate": "stages"}
            maker.run("QM", 14, 0.0, seed, sparsity=sparsity, epochs=269, **moved)
    with mpl.rc_context(STYLE):
        drawn = dict(drawn_figures(read_results(maker.root)))
        for figure in drawn.values():
            figure.draw_without_rendering()
    return drawn


def seen_ticks(axes):
    low, high = axes.get_xlim()
    ticks = axes.xaxis.get_major_ticks()
    seen = [tick for tick in ticks if min(low, high) <= tick.get_loc() <= max(low, high)]
    return [tick.label1.get_window_extent() for tick in seen if not tick.label1.get_rotation()]


def test_no_text_lies_on_another_and_no_legend_on_what_is_drawn(figures):
    assert len(figures) == 1 + 2 * 6
    for name, figure in figures.items():
        panels = [axes for axes in figure.axes if axes.get_visible()]
        for axes in panels:
            labels = sorted(seen_ticks(axes), key=lambda box: box.x0)
            assert all(a.x1 < b.x0 for a, b in itertools.pairwise(labels)), name
        titles = [text.get_window_extent() for text in figure.texts]
        boxes = [axes.get_window_extent() for axes in panels]
        for legend in figure.legends:
            key = legend.get_window_extent()
            assert not any(key.overlaps(box) for box in boxes), name
            assert not any(key.overlaps(box) for box in titles), name


def test_texts_have_two_sizes_and_say_what_is_drawn(figures):
    for name, figure in figures.items():
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert {text.get_fontsize() for text in texts} == {9, 11}, name
        title, under = (text.get_text() for text in figure.texts)
        assert " against " in title or title in (
            "Weights kept, layer by layer", "Validation error while fine-tuning"
        )  # fmt: skip
        assert under.startswith("MLP on mnist")


@pytest.mark.parametrize(
    ("figure", "level"),  # of the network before pruning, as the maker has it
    [
        ("error-against-sparsity--mlp-on-mnist", 0.25),
        ("loss-against-lambda--mlp-on-mnist-80-removed", 0.25),
        ("error-against-stages--mlp-on-mnist-80-removed", 2.0),
        ("loss-change-against-error-gap--mlp-on-mnist-80-removed", 0.0),
        ("training-curves--mlp-on-mnist-80-removed", 2.0),
    ],
)
def test_a_dotted_line_is_the_dense_network(figures, figure, level):
    first = figures[figure].axes[0]
    dotted = [line for line in first.get_lines() if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in dotted if line.get_color() == "0.25"] == [
        [pytest.approx(level)] * 2
    ]
    (legend,) = figures[figure].legends
    assert "dense" in [text.get_text() for text in legend.get_texts()]


def test_sparsity_is_drawn_from_dense_to_sparse_with_every_seed(figures):
    panels = figures["error-against-sparsity--mlp-on-mnist"].axes
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == [
        "training loss after pruning",
        "test error after pruning, %",
        "test error, %, after 269 epochs",
    ]
    tuned = panels[-1]
    left, right = tuned.get_xlim()
    assert left > 20 > 10 > right
    assert [text.get_text() for text in tuned.get_xticklabels()] == ["20", "10"]
    dots = [tuple(dot) for marks in tuned.collections for dot in marks.get_offsets().tolist()]
    assert len(dots) == 2 * 3 * 6
    kinds = "MP", "LM", "QM", "moved", "moved and finished", "dense"
    assert len({line.get_color() for line in tuned.lines}) == len(kinds)
    assert (pytest.approx(20), pytest.approx(4.8)) in dots


def test_what_a_run_has_not_come_to_is_not_drawn_nor_counted(maker):
    for sparsity in (0.8, 0.9):
        maker.run(sparsity=sparsity, seed=1)
        maker.run(sparsity=sparsity, seed=2, status="running")
        maker.run(sparsity=sparsity, seed=3, status="diverged", loss=float("inf"))
    name, figure = next(drawn_figures(read_results(maker.root)))
    assert name == "error-against-sparsity--mlp-on-mnist"
    pruned, _, tuned = ([len(m.get_offsets()) for m in axes.collections] for axes in figure.axes)
    assert (pruned, tuned) == ([4], [2])
    assert figure.axes[0].get_ylim()[1] < 2
