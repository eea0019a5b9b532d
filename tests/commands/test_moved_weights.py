"""``lossprune prune --compensate --recalibrate``: what is written, told and deployed has moved."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import lossprune
from lossprune.commands.evaluation import loss_and_error
from lossprune.experiment.network_file import weights_sha256

OWN = """
import torch
from torch import nn

def build(shape=(6,), classes=3, generator=None):
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(*shape, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, classes)
    )

def batches():
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(3, 25, 6, generator=generator)
    return [(part, part[:, :3].argmax(1)) for part in inputs]

def load():
    inputs, targets = (torch.cat(part) for part in zip(*batches()))
    return {"train": (inputs[:50], targets[:50]), "test": (inputs[50:], targets[50:])}
"""
MOVING = ("--compensate", "--finish", 1, "--recalibrate", "stages")
FLAGS = ("--sparsity", 0.5, "--stages", 2, "--seed", 4)


@pytest.fixture
def own(command, tmp_path, monkeypatch):
    """The user's module, in the working folder."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    import own  # pyright: ignore[reportMissingImports]

    return own


def test_moved_weights_are_written_tested_told_and_deployed(own, command, tmp_path):
    data = ("--data", "own:batches", "--test", "own:batches")
    answer = command("prune", "own:build", *data, *FLAGS, *MOVING)
    assert answer.status == 0, answer.err
    network, loaded = own.build(), own.build()
    found = lossprune.prune(
        network,
        "QM",
        sparsity=0.5,
        stages=2,
        data=own.batches(),
        seed=4,
        compensate=lossprune.Compensation(finish=1),
        recalibrate="stages",
    )
    begun = weights_sha256(network.state_dict())
    errors = [
        loss_and_error(part, own.batches(), "cross_entropy", None)
        for part in (own.build(), found.apply_(network))
    ]
    folder = tmp_path / "pruned"
    record = json.loads((folder / "record.json").read_text())
    assert lossprune.load_sparse(folder / "network.safetensors", loaded) == found.mask
    for state in (loaded.state_dict(), load_file(folder / "state_dict.safetensors")):
        assert all(state[name].equal(it) for name, it in network.state_dict().items())
    assert record["network"]["weights_sha256"] == begun
    assert [record["test"][when]["loss"] for when in ("before", "after")] == [
        scores.loss for scores in errors
    ]
    steps = [stage["compensation"] for stage in record["stages"]]
    assert steps == [vars(stage.compensation) for stage in found.stages]
    assert "all examples of --data were read at each stage" in answer.out
    assert "running statistics of batch normalisation were estimated anew" in answer.out
    assert f"{steps[-1]['loss_without']:.5f} at its mask alone" in answer.out
    assert "surviving weights were moved in" in (folder / "table.md").read_text()
    assert answer.err.count(" at the mask alone)") == 3

    flags = ("--seconds", 0.01, "--batch", 4, "--threads", 1, "--engines", "none")
    answer = command("deploy", "pruned", *flags)
    assert answer.status == 0, answer.err
    deployed = own.build()
    lossprune.load_sparse(tmp_path / "deployed" / "network.safetensors", deployed)
    assert all(map(torch.equal, deployed.state_dict().values(), network.state_dict().values()))
    forms = json.loads((tmp_path / "deployed" / "record.json").read_text())["forms"]
    assert {form["accuracy"] for form in forms[1:]} == {1 - errors[1].error}


def test_examples_of_a_data_set_are_counted(own, command):
    answer = command("prune", "own:build", "--dataset", "own:load", *FLAGS, *MOVING)
    assert answer.status == 0, answer.err
    count = len(lossprune.data.load("own:load", seed=4).train)
    assert f"{count} examples were read at each stage, {3 * count} in all" in answer.out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--finish", 1), "--finish 1 without --compensate: "),
        (("--recalibrate", "ned"), "--recalibrate must be one of no, stages, end, got 'ned'; did"),
        (("--compensate", "--criterion", "MP"), "--compensate needs examples: give --data or"),
        (("--recalibrate", "end", "--criterion", "MP"), "--recalibrate end needs examples: "),
        (("--compensate", "--data", "own:few"), "stage 1 of 14: compensate sets one of every 5"),
    ],
)
def test_what_cannot_be_is_one_sentence(own, command, tmp_path, flags, told):
    own.few = lambda: [(torch.randn(4, 6), torch.arange(4) % 3)]
    answer = command("prune", "own:build", "--sparsity", 0.5, *flags)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.splitlines()[-1].startswith(f"error: {told}")
    assert not (tmp_path / "pruned").exists()
