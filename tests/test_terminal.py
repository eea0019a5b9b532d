"""What a person sees on a terminal, narrow or wide, and in a notebook."""

import re
import sys

import pytest

from tests.terminal import screens

RUN = "run --arch MLP --dataset digits --threads 1 --nepochs 6 --pe 2 --pm QM --pi 14"
COUNTS = """
import time
from lossprune.progress import shown_progress
with shown_progress() as progress:
    progress.note("training a network")
    for epoch in range(1, 3):
        progress.advance("epoch", epoch, 200, "validation error 12.3%, training loss 0.512")
        for examples in range(0, 1001, 100):
            progress.advance("examples", examples, 1000)
            time.sleep(0.03)
        progress.close("examples")
print("done")
"""
COLUMNS = ["layer", "shape", "weights", "kept", "removed", "sparsity", "dead units"]
TABLE = f"""
from lossprune.text_table import print_table
name = "encoder.layers.11.attention.self.query.weight"
columns = {COLUMNS}
row = [name, "1024 × 1024", "1,048,576", "104,858", "943,718", "0.90000", "1,024 of 1,024"]
print_table("A table", columns, [row, ["[fc]", *row[1:]]], spare=["shape", "removed"])
"""
BAR = r" *\w+ +[━╸─]+ +(\d+/\d+)(  \d.* left)?"


def test_a_run_shows_bars_while_it_goes_and_none_at_the_end(tmp_path):
    words = [sys.executable, "-m", "lossprune", *RUN.split(), "--path", str(tmp_path / "r")]
    seen = list(screens(words, 80))
    bars = [line for screen in seen for line in screen if "─" in line or "━" in line]
    assert all(re.match(BAR, line) for line in bars)
    assert any(re.match(r"epoch +[━╸─]+ +[1-5]/6 .*validation error \d", line) for line in bars)
    assert any(re.match(r"  stage +[━╸─]+ +\d+/14", line) for line in bars)
    end = seen[-1]
    assert not set(bars) & set(end)
    told = [line.split(" ")[0] for line in end]
    assert {"folder:", "start:", "pruned:", "finished", "best"} <= set(told)


@pytest.mark.parametrize("columns", [60, 80, 120, 160])
def test_count_and_time_left_have_a_place_on_any_terminal(columns):
    seen = list(screens([sys.executable, "-c", COUNTS], columns))
    middle = max((s for s in seen if any("2/200" in line for line in s)), key=len)
    assert middle[0] == "training a network"
    assert re.match(r"epoch +[━╸─]+ +2/200  \d+ (s|min) left", middle[1])
    assert re.match(r"  examples +[━╸─]+ +\d+/1000", middle[2])
    assert ("validation error 12.3%" in middle[1]) == (columns >= 80)
    assert ("training loss 0.512" in middle[1]) == (columns >= 120)
    assert len(middle) <= 4  # no line goes on in the next one
    assert seen[-1] == ["training a network", "done", ""]


def test_in_a_notebook_nothing_is_drawn_anew():
    """A notebook shows a command on a terminal without a cursor; Jupyter says that it is one."""
    seen = list(screens([sys.executable, "-c", COUNTS], 80, JPY_PARENT_PID="1"))
    assert seen[-1][0] == "training a network"
    assert [line.split(":")[0] for line in seen[-1][1:]] == [
        "epoch 1/200",
        "epoch 2/200",
        "done",
        "",
    ]


@pytest.mark.parametrize("columns", [60, 80, 100, 120])
def test_a_table_breaks_no_word(columns):
    *_, end = screens([sys.executable, "-c", TABLE], columns)
    words = set(" ".join(re.sub(r"[│┃─━]", " ", line) for line in end).split())
    spared = {"shape", "removed", "943,718"} if columns == 80 else set()
    assert {*COLUMNS[:-1], "dead", "1,048,576", "943,718", "0.90000", "[fc]"} - spared <= words
    assert ("a wider terminal shows shape, removed, too" in end) == bool(spared)
    name = next(word for word in words if word.startswith("encoder."))
    assert name.endswith("weight")
    assert len(name) >= 24
    assert ("…" in name) == (columns < 120)
