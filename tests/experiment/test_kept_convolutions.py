"""Runs of convolutional networks that are fine-tuned over their kept weights alone."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lossprune.experiment import RunConfig, run
from lossprune.experiment.folder import MASK
from lossprune.kernels.compiler import compiler_available
from lossprune.progress import Silent
from lossprune.pruning import Mask
from tests.compilers import hide_compilers
from tests.experiment.test_resume import result
from tests.experiment.test_run import network

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

OWN = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1, bias=False)

    def forward(self, x):
        return x + self.conv(self.norm(x).relu())

def build(shape, classes):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), Block(), nn.MaxPool2d(2), Block(), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, classes),
    )

def plain(shape, classes):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, classes),
    )

def hooked(shape, classes):
    network = build(shape, classes)
    network[0].register_forward_hook(lambda *_: None)
    return network
"""

_numbers = itertools.count()


@pytest.fixture
def config(tmp_path, monkeypatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    name = f"own_convolutions{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(OWN)
    return RunConfig(
        arch=f"{name}:build",
        dataset="digits",
        criterion="LM",
        sparsity=0.9,
        stages=1,
        examples=100,
        epochs=4,
        prune_epoch=1,
        lr=0.05,
        threads=1,
        path=Path("results"),
    )


class Stop(Silent):
    """Stops the run after an epoch, before that is saved."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def advance(self, what: str, done: int, total: int, text: str = "") -> None:
        if (what, done) == ("epoch", self.epoch):
            raise KeyboardInterrupt


def test_it_is_the_dense_run_to_rounding(config):
    found, dense = run(config), run(replace(config, train="dense"))
    (way,) = found.training
    assert (way["from_epoch"], way["mode"]) == (2, "sparse")
    assert way["reason"].endswith("4 layers over kept weights alone")
    assert found.removed == dense.removed
    assert found.best.epoch == dense.best.epoch
    rows = [(found.after_pruning, dense.after_pruning), (found.best, dense.best)]
    for one, other in [*rows, *zip(found.epochs, dense.epochs, strict=True)]:
        assert one.scores.train_loss == pytest.approx(other.scores.train_loss, rel=1e-4)
        assert one.scores.test_error == pytest.approx(other.scores.test_error, abs=1.5 / 250)
    mask = Mask.load(config.folder / MASK)
    for name in ("best_model.pt", "last_model.pt"):
        own, other = (
            network(folder / name)
            for folder in (config.folder, replace(config, train="dense").folder)
        )
        for key, value in other.items():
            torch.testing.assert_close(own[key], value, atol=1e-3, rtol=1e-4)
        assert not any(own[key][~kept].any() for key, kept in mask.items())


def test_stopped_it_goes_on_to_the_bit(config):
    """From an epoch over kept weights, whose momentum it takes up."""
    run(config)
    stopped = replace(config, path=Path("stopped"))
    with pytest.raises(KeyboardInterrupt):
        run(stopped, Stop(3))
    run(stopped)
    assert result(stopped.path) == result(config.path)


def test_a_run_that_began_without_a_compiler_goes_on_as_it_began(config, monkeypatch):
    """Compacted, though it would be sparse by now."""
    config = replace(config, arch=config.arch.replace("build", "plain"), sparsity=0.95)
    with monkeypatch.context() as machine:
        hide_compilers(machine)
        with pytest.raises(KeyboardInterrupt):
            run(config, Stop(3))
    assert [way["mode"] for way in run(config).training] == ["compacted"]
    anew = run(replace(config, path=Path("anew")))
    assert [way["mode"] for way in anew.training] == ["sparse"]


def test_what_cannot_be_trained_so_is_refused_at_once(config):
    hooked = replace(config, arch=config.arch.replace("build", "hooked"), train="sparse")
    with pytest.raises(ValueError, match=r"--train sparse cannot train .*hooked: it has hooks"):
        run(hooked)
    assert not hooked.folder.exists()


def test_asked_for_it_is_done_where_it_does_not_pay(config):
    found = run(replace(config, sparsity=0.2, epochs=2, train="sparse"))
    assert [way["mode"] for way in found.training] == ["sparse"]
