"""``lossprune sensitivity`` on a network of one's own, and the mistakes it may meet."""

import csv
import json
import re
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lossprune
from tests.terminal import screens

MODULE = """
import lossprune
import torch
from torch import nn

def build(shape=(1, 8, 8), classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, classes))

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.eye(64))

    def forward(self, x):
        return x.flatten(1) @ self.mix

def build_mixed():
    return nn.Sequential(Mixed(), nn.Linear(64, 10))

def batches():
    digits = lossprune.data.load("digits", seed=1111)
    return digits.batches(digits.train, 100)

def others():
    digits = lossprune.data.load("digits", seed=1111)
    return digits.batches(digits.valid, 100)
"""
FILES = ["record.json", "sensitivity.csv", "sensitivity.png", "sensitivity.svg", "table.md"]


@pytest.fixture
def layers(command, tmp_path):
    """A module of the working folder, and weights beside it that know the digits."""
    (tmp_path / "layers.py").write_text(MODULE)
    digits = lossprune.data.load("digits", seed=1111)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        for inputs, targets in digits.batches(digits.train, 100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
    save_file(network.state_dict(), tmp_path / "trained.safetensors")
    yield network
    sys.modules.pop("layers", None)
    while str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def data(split="train"):
    digits = lossprune.data.load("digits", seed=1111)
    return digits.batches(getattr(digits, split), 100)


def said(answer) -> str:
    assert (answer.status, answer.out) == (2, "")
    (line,) = answer.err.splitlines()
    return line.removeprefix("error: ")


def test_a_terminal_of_80_columns_shows_both_tables_and_the_folder_all(layers, tmp_path):
    flags = "--dataset digits --weights trained.safetensors --max-loss-increase 0.05 --threads 1"
    words = [sys.executable, "-m", "lossprune", "sensitivity", "layers:build", *flags.split()]
    *_, seen = screens(words, 80)
    found = lossprune.sensitivity(layers, data())
    rows = [line.split() for line in seen if line.startswith(("1.weight", "3.weight"))]
    table = [
        re.findall(r"[+-][\d.]+", line) for line in seen if re.match(r"│? ?[13]\.weight", line)
    ]
    for change, shown in (("realised_change", table[:2]), ("predicted_change", table[2:])):
        for layer, cells in zip(found.layers, shown, strict=True):
            assert cells == [f"{getattr(point, change):+z.3f}" for point in layer.points]
    assert [row[-1] for row in rows[:2]] == [f"{layer.within(0.05):g}" for layer in found.layers]
    assert not any("a wider terminal" in line for line in seen)

    folder = tmp_path / "sensitivity"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert all(any(f"  {name} " in line for line in seen) for name in FILES)
    record = json.loads((folder / "record.json").read_text())
    assert record["format"] == "lossprune sensitivity 1"
    assert record["settings"]["build"] == "layers:build"
    assert record["network"]["class"] == "Sequential"
    assert record["loss"] == pytest.approx(found.loss, rel=1e-6)
    written = json.loads(json.dumps(found.to_dict()))["layers"]
    for layer, expected in zip(record["layers"], written, strict=True):
        assert (layer["name"], layer["shape"]) == (expected["name"], expected["shape"])
        for point, other in zip(layer["points"], expected["points"], strict=True):
            assert point == pytest.approx(other, rel=1e-4, abs=1e-6)
    with (folder / "sensitivity.csv").open(newline="") as file:
        points = list(csv.DictReader(file))
    assert [float(point["realised_change"]) for point in points] == [
        point["realised_change"] for layer in record["layers"] for point in layer["points"]
    ]
    assert (folder / "table.md").read_text().count("| 3.weight |") == 2
    assert ">layers:build</text>" in (folder / "sensitivity.svg").read_text()


def test_flags_reach_the_library(command, layers, tmp_path):
    flags = "--data layers:batches --validation layers:others --criterion MP --estimator None"
    more = "--sparsities 0.2,0.75 --examples 300 --exclude 3 --weights trained.safetensors"
    answer = command("sensitivity", "layers:build", *flags.split(), *more.split())
    assert answer.status == 0, answer.err
    assert answer.err.startswith("layer 1/1: loss +")
    found = lossprune.sensitivity(
        layers,
        data(),
        "MP",
        sparsities=(0.2, 0.75),
        examples=300,
        exclude="3",
        estimator=None,
        validation=data("valid"),
    )
    folder = tmp_path / "sensitivity"
    record = json.loads((folder / "record.json").read_text())
    assert (record["loss"], record["examples"]) == (pytest.approx(found.loss, rel=1e-6), 250)
    assert [layer["name"] for layer in record["layers"]] == ["1.weight"]
    for point, expected in zip(
        record["layers"][0]["points"], found["1.weight"].points, strict=True
    ):
        assert point["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert point["removed"] == expected.removed
        assert point["predicted_change"] is None
    assert "no prediction: no curvature was asked for" in answer.out
    assert "diagonal Hessian" not in answer.out + (folder / "table.md").read_text()
    assert "at 0.75 the loss rises most with 1.weight pruned\n" in answer.out

    assert "--overwrite replaces it" in said(
        command("sensitivity", "layers:build", "--dataset", "digits")
    )
    more = "--dataset digits --criterion random --sparsities 0.5 --overwrite --max-loss-increase 0"
    answer = command("sensitivity", "layers:build", *more.split())
    assert answer.status == 0, answer.err
    assert sorted(path.name for path in folder.iterdir()) == FILES
    other = json.loads((folder / "record.json").read_text())
    assert [layer["points"][0]["sparsity"] for layer in other["layers"]] == [0.5, 0.5]


def test_a_network_that_guesses_and_matrices_left_out_are_told(command, layers):
    flags = "--dataset digits --examples 100 --sparsities 0.5 --estimator monte-carlo:2"
    answer = command("sensitivity", "layers:build", *flags.split())
    assert answer.status == 0, answer.err
    assert "is it trained, and are its weights loaded? (--weights FILE)\n" in answer.out
    answer = command("sensitivity", "layers:build_mixed", *flags.split(), "--overwrite")
    assert "no layers here; --parameters '*,0.mix' takes them in\n" in answer.out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("", "examples are needed to measure the loss on: give --data or --dataset"),
        ("--data a:b --dataset digits", "--dataset is given instead of --data"),
        ("--dataset digit", "--dataset must be one of"),
        ("--dataset digits --sparsities 0.9,0.5", "--sparsities must be rising numbers between"),
        ("--dataset digits --sparsities 0,0.5", "such as 0.5,0.9, got '0,0.5'"),
        ("--dataset digits --sparsities 0.5,1", "got '0.5,1'"),
        ("--dataset digits --sparsities 0.5,nan", "got '0.5,nan'"),
        ("--dataset digits --sparsities half", "got 'half'"),
        ("--dataset digits --criterion QMM", "--criterion must be one of"),
        ("--dataset digits --max_loss_increase -1", "--max_loss_increase must be a number of at"),
        ("--dataset digits --estimator None", "criterion 'QM' needs the curvature"),
        (
            "--dataset digits --validation nothing:here",
            "--validation nothing:here: no module 'nothing' in",
        ),
        ("--dataset digits --pattern 2:4 --sparsities 0.9", "sparsities must be that of pattern"),
        ("--dataset digits --out trained.safetensors", "trained.safetensors is a file"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(command, layers, tmp_path, flags, told):
    assert told in said(command("sensitivity", "layers:build", *flags.split()))
    assert not (tmp_path / "sensitivity").exists()
