import re

import pytest

from lossprune.cli import main
from lossprune.commands.demo import next_commands


@pytest.mark.slow
def test_the_demo_shows_that_locality_helps(command):
    answer = command("demo")
    assert answer.status == 0
    rows = [
        line.split()
        for line in answer.out.splitlines()
        if re.match(r" *(MP|LM|QM|OBD) +\d+ ", line)
    ]
    assert [(row[0], int(row[1])) for row in rows] == [
        (criterion, stages) for criterion in ("MP", "LM", "QM", "OBD") for stages in (1, 14)
    ]
    after_pruning = {(row[0], int(row[1])): float(row[3]) for row in rows}
    for criterion in ("LM", "QM", "OBD"):
        assert after_pruning[criterion, 14] < after_pruning[criterion, 1]
    for row in rows:
        before, pruned, tuned = (float(loss) for loss in row[2:5])
        assert before < tuned < pruned
        assert row[-1] == "0.9500"
    assert "\x1b" not in answer.out
    assert (
        len(re.findall(r"^  lossprune |^  \S*lossprune |^  \S+ (?:run|data) ", answer.out, re.M))
        == 3
    )


@pytest.mark.slow
@pytest.mark.full("the commands that the demo names")
def test_the_next_commands_work(command, mnist_path, tmp_path):
    """As printed, but for the data's place and with fewer epochs on MNIST."""
    digits, data, mnist = next_commands()
    assert command(*digits, "--threads", "1").status == 0
    assert "50,000" in command(*data, "--data_path", mnist_path).out
    place = ("--data_path", mnist_path, "--threads", "1")
    assert command(*mnist, *place, "--pe", "0", "--nepochs", "1", "--pi", "3").status == 0


def test_all_next_commands_have_known_flags(capsys):
    for arguments in next_commands():
        assert main([arguments[0], "--help"]) == 0
        text = capsys.readouterr().out
        for flag in (word for word in arguments if word.startswith("--")):
            assert flag in text
