"""Engines in their processes: what is told of those that end, hang or are not there."""

import sys

import pytest

from benchmarks.break_even import break_even
from lossprune.deployment.engines.process import Engine, EngineError, Ready, timed_in_turn

VERSION = 'print(\'{"version": "1"}\', flush=True)\n'
ENDS = {
    "import nowhere": "ModuleNotFoundError: No module named 'nowhere'",
    "import other": "it is not installed",
    "import os; os.abort()": "it ended by SIGABRT",
    "import sys; sys.stderr.write('some error\\nbye\\n')": "some error",
    "": "it ended with exit status 0",
    "import time; time.sleep(60)": "no answer in 1 s",
}


@pytest.mark.parametrize(("program", "told"), ENDS.items())
def test_an_engine_that_does_not_answer_is_told_in_one_line(program, told, tmp_path):
    with pytest.raises(EngineError) as caught:
        Engine("other", [sys.executable, "-c", program], tmp_path / "log", patience=1)
    assert str(caught.value) == told


def test_what_cannot_be_started_is_told_in_one_line(tmp_path):
    with pytest.raises(EngineError, match=r"^no/python cannot be started: No such file"):
        Engine("other", ["no/python"], tmp_path / "log")


ANSWERS = """
import sys, time
for line in sys.stdin:
    word, name, *calls = line.split()
    if name == "ends" and word == "time":
        sys.exit("error: no more")
    wait = {"slower": 0.3, "slow": 0.02}.get(name, 0.001)
    time.sleep(wait * int(calls[0]) if calls else 0)
    print('{"first_call_s": %f}' % wait if word == "ready" else [wait] * int(calls[0]), flush=True)
"""


def test_slow_networks_are_called_less_often_and_lost_ones_left_out(tmp_path):
    command = [sys.executable, "-c", VERSION + ANSWERS]
    rows = {}
    for name in ("slower", "slow", "fast", "ends"):
        engine = Engine(name, command, tmp_path / name)
        assert engine.version == "1"
        engine.ready(name)
        rows[name] = Ready(engine, name)
    taken, lost = timed_in_turn(rows, budget=0.05)
    for row in rows.values():
        row.engine.end()
    assert lost == {"ends": "error: no more"}
    assert {name: set(seconds) for name, seconds in taken.items()} == {
        "slower": {0.3},
        "slow": {0.02},
        "fast": {0.001},
    }
    assert len(taken["slower"]) == 1
    assert len(taken["slow"]) <= 3 < len(taken["fast"])


def test_break_even_is_where_the_line_crosses_one():
    assert break_even({0.0: 0.5, 0.75: 2.0}) == pytest.approx(0.5)
    assert break_even({0.0: 0.5, 0.75: 2.0, 0.9: 0.8, 0.99: 3.0}) > 0.9
    assert break_even({0.5: 1.5, 0.9: 2.0}) == 0.5
    assert break_even({0.5: 0.2, 0.9: 0.9}) is None
    assert break_even({}) is None
