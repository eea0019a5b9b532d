"""Runs that say which weights compete: scope, pattern, parameters, exclude."""

import json
import re
import shlex
from dataclasses import replace

import pytest
import torch

import lossprune
from lossprune.cli import main
from lossprune.data import load
from lossprune.experiment import RunConfig
from lossprune.experiment.folder import BEST, MASK
from lossprune.experiment.group import run_together
from lossprune.experiment.network_file import read_network
from lossprune.experiment.prepare import Cache
from lossprune.experiment.runner import run
from lossprune.experiment.stage_examples import StageExamples
from lossprune.progress import Silent
from lossprune.pruning import Mask
from lossprune.sweep.board import label_runs
from lossprune.sweep.plan_file import parse_plan
from tests.experiment.test_resume import result, the_run

FLAGS = shlex.split(
    "run --arch MLP --dataset digits --threads 1 --pm QM --exp --nex 100 --nepochs 0 --pi 3"
)
CONFIG = RunConfig(
    arch="MLP",
    dataset="digits",
    criterion="QM",
    exponential=True,
    stages=3,
    examples=100,
    epochs=1,
    sparsity=0.5,
    threads=1,
)


def network():
    return lossprune.networks.NETWORKS["MLP"](
        shape=(1, 8, 8), generator=torch.Generator().manual_seed(1111)
    )


def pruned_by_the_library(model, **asked):
    examples = StageExamples(load("digits", seed=1111), 100, 1111)
    return lossprune.prune(
        model,
        "QM",
        data=examples,
        stages=3,
        reg=0.0,
        seed=1111,
        on_stage=lambda _, stage: setattr(examples, "stage", stage.stage + 1),
        **asked,
    )


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ("--pr 0.9 --scope layer", {"sparsity": 0.9, "scope": "layer"}),
        ("--pattern 2:4", {"sparsity": 0.5, "pattern": "2:4"}),
        ("--pr 0.9 --exclude 'fc3, fc1'", {"sparsity": 0.9, "exclude": ["fc3", "fc1"]}),
        (
            "--pr 0.8 --parameters fc[12]* --scope erdos-renyi --pattern unstructured",
            {"sparsity": 0.8, "parameters": "fc[12]*", "scope": "erdos-renyi"},
        ),
    ],
)
def test_the_mask_is_that_of_the_library(tmp_path, flags, asked):
    assert main([*FLAGS, *shlex.split(flags), "--path", str(tmp_path)]) == 0
    expected = pruned_by_the_library(network(), **asked).mask
    assert Mask.load(the_run(tmp_path) / MASK) == expected
    record = json.loads((the_run(tmp_path) / "record.json").read_text())
    assert (record["removed"], record["prunable"]) == (expected.removed, expected.total)


class Stop(BaseException):
    """What ends the process, but for the test."""


class StopsAfter(Silent):
    """Ends the process after a stage."""

    def advance(self, what, done, total, text=""):
        if what == "stage" and done == 2:
            raise Stop


def test_what_was_removed_before_stays_so_where_nothing_else_may_go(tmp_path, monkeypatch):
    """Of a pruned network some layers are pruned further, with a stop between two stages."""
    before = lossprune.prune(network(), "MP", sparsity=0.3).mask
    lossprune.save_sparse(network(), before, tmp_path / "start.safetensors")
    config = replace(
        CONFIG, start=tmp_path / "start.safetensors", exclude="fc3", path=tmp_path / "stopped"
    )
    with pytest.raises(Stop):
        run(config, StopsAfter())
    record = run(config)
    mask = Mask.load(config.folder / MASK)
    assert mask["fc3.weight"].equal(before["fc3.weight"])
    model = network()
    before.apply_(model)
    start = Mask({name: before[name] for name in ("fc1.weight", "fc2.weight")})
    expected = pruned_by_the_library(model, start=start, sparsity=0.5, exclude="fc3").mask
    assert all(mask[name].equal(kept) for name, kept in expected.items())
    assert (record.removed, record.prunable) == (mask.removed, before.total)
    weights, _, _ = read_network(config.folder / BEST)
    assert not any(weights[name][~kept].any() for name, kept in mask.items())
    undisturbed = replace(config, path=tmp_path / "undisturbed")
    run(undisturbed)
    assert result(tmp_path / "stopped") == result(tmp_path / "undisturbed")


def test_runs_of_one_process_share_no_statistics_of_other_weights(tmp_path):
    cache = Cache({"statistics": 4, "dataset": 1})
    for exclude in ("none", "fc3", "fc1"):
        config = replace(CONFIG, exclude=exclude, path=tmp_path / exclude, epochs=0)
        run(config, cache=cache)
        alone = replace(config, path=tmp_path / f"{exclude} alone")
        run(alone)
        assert result(config.path) == result(alone.path)


def test_runs_of_other_weights_are_trained_together(tmp_path):
    changes = [{}, {"scope": "layer"}, {"exclude": "fc3"}, {"pattern": "2:4"}]
    configs = [replace(CONFIG, path=tmp_path, **asked) for asked in changes]
    records = run_together(configs)
    assert [record.training[-1]["mode"] for record in records] == ["stacked"] * 4
    for config in configs:
        weights, _, _ = read_network(config.folder / "last_model.pt")
        mask = Mask.load(config.folder / MASK)
        assert not any(weights[name][~kept].any() for name, kept in mask.items())
        assert ("fc3.weight" in mask) == (config.exclude == "none")


def test_names_and_records_have_the_flags_only_where_they_are_asked_for():
    asked = replace(CONFIG, scope="layer", pattern="2:4", parameters="fc1, fc2", exclude="fc2*")
    told = {"scope": "layer", "pattern": "2:4", "parameters": "fc1,fc2", "exclude": "fc2*"}
    assert not told.keys() & CONFIG.settings.keys()
    assert asked.settings == {**CONFIG.settings, **told}
    assert "parameters=fc1+fc2," in asked.name


def test_a_pattern_says_its_sparsity():
    assert RunConfig(pattern="1:4").sparsity == 0.75
    assert RunConfig(pattern="1:4", sparsity=0.75).sparsity == 0.75
    assert type(RunConfig().sparsity) is float


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--pattern 2:4 --pr 0.956", "--pr 0.956 with --pattern 2:4: such a pattern removes 0.5"),
        ("--pattern 4:2", "--pattern must be"),
        ("--pattern 2:7", "--pattern '2:7' needs layers whose number of inputs"),
        ("--scope layers", "--scope must be one of global, layer, .*did you mean layer?"),
        ("--scope uniform --pr 0.999", "--pr 0.999 removes 50150 weights, but scope 'uniform'"),
        ("--exclude fc4", "--exclude='fc4' matches no weight that can be pruned"),
        ("--parameters a/b", "--parameters must be names of parameters"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, capfd, flags, said):
    assert main([*FLAGS, *shlex.split(flags), "--path", str(tmp_path)]) == 2
    (told,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(said, told), told
    assert not list(tmp_path.iterdir())


def test_a_plan_compares_them():
    plan = """
    arch = "MLP"
    pm = "QM"
    pattern = ["unstructured", "2:4"]
    scope = ["global", "layer"]
    exclude = ["none", "fc1,fc2"]
    """
    runs = parse_plan(plan, "mine").expand()
    assert [run.config.sparsity for run in runs] == [0.956] * 4 + [0.5] * 4
    assert len({run.config.folder for run in runs}) == 8
    assert "exclude=fc1,fc2 pattern=2:4 pr=0.5 scope=layer" in label_runs(runs).values()
    assert runs[-1].command.endswith(
        "--pr 0.5 --pm QM --scope layer --pattern 2:4 --exclude fc1,fc2"
    )
