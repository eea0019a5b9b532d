"""Runs whose pruning moves weights and running statistics: ``--compensate``, ``--recalibrate``."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from torch import nn

import lossprune
from lossprune.cli import main
from lossprune.data import load
from lossprune.experiment import RunConfig
from lossprune.experiment.folder import MASK
from lossprune.experiment.network_file import load_weights_, read_network
from lossprune.experiment.stage_examples import StageExamples
from lossprune.pruning import Mask
from lossprune.pruning.requirements import RECALIBRATED
from tests.experiment.test_resume import result, the_run
from tests.experiment.test_several_processes import ROUNDING, assert_same_to_rounding
from tests.processes import Processes, finish

ARCH = f"{__name__}:normed"
FLAGS = shlex.split(
    f"run --arch {ARCH} --dataset digits --threads 1 --pm QM --exp --pr 0.9 --nex 150 --nepochs 3 "
    "--pe 1 --pi 3 --lr 0.05"
)
MOVING = ["--compensate", "--finish", "2", "--recalibrate", "stages"]


def normed(shape, classes):
    return nn.Sequential(
        *(nn.Conv2d(shape[0], 6, 3, bias=False), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(54, classes)),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed")
    assert main([*FLAGS, *MOVING, "--path", str(path)]) == 0
    return path


def test_killed_between_stages_it_ends_as_if_never_stopped(undisturbed, tmp_path, capfd):
    """Once while weights go, and once at the final mask; each goes on from moved weights."""
    flags = [*FLAGS, *MOVING, "--path", str(tmp_path / "killed")]
    for said in ("stage 2/5", "stage 4/5"):
        process = Processes(flags, tmp_path / said[:7])
        process.wait_for(said)
        process.kill()
        process.join(30)
        assert process.exitcode == 9, "it was done before it was killed"
    assert main(flags) == 0
    assert "going on after pruning stage" in capfd.readouterr().err
    assert result(tmp_path / "killed") == result(undisturbed)


def test_two_processes_move_weights_as_one_does(undisturbed, tmp_path):
    finish([*FLAGS, *MOVING, "--path", str(tmp_path / "two")], tmp_path / "log", 2)
    assert_same_to_rounding(tmp_path / "two", undisturbed)
    two, one = (
        [stage["compensation"] for stage in json.loads(text.read_text())["stages"]]
        for text in (the_run(path) / "record.json" for path in (tmp_path / "two", undisturbed))
    )
    for name in ("moved", "apart", "damping", "loss_without", "loss_apart"):
        expected = [step[name] for step in one]
        assert [step[name] for step in two] == pytest.approx(expected, rel=ROUNDING)


def test_the_pruned_network_is_that_of_the_library(undisturbed):
    """From the trained network on: the same mask, weights, statistics and records."""
    folder = the_run(undisturbed)
    flags = [*FLAGS, "--nepochs", "1", "--pe", "-1", "--path", str(undisturbed.parent / "dense")]
    assert main(flags) == 0
    data = load("digits", seed=1111)
    network = normed(data.shape, len(data.classes))
    weights, metadata, _ = read_network(the_run(undisturbed.parent / "dense") / "best_model.pt")
    load_weights_(network, ARCH, folder, weights, metadata)
    examples = StageExamples(data, 150, 1111)
    found = lossprune.prune(
        network,
        "QM",
        sparsity=0.9,
        data=examples,
        stages=3,
        reg=0.0,
        seed=1111,
        compensate=lossprune.Compensation(finish=2),
        recalibrate="stages",
        on_stage=lambda _, stage: setattr(examples, "stage", stage.stage + 1),
    )
    record = json.loads((folder / "record.json").read_text())
    assert found.mask == Mask.load(folder / MASK)
    steps = [stage["compensation"] for stage in record["stages"]]
    assert steps == [vars(stage.compensation) for stage in found.stages]
    assert any(step["moved"] for step in steps)
    found.apply_(network)
    scores = record["after_pruning"]["scores"]
    images, labels = data.inputs(data.test.images), data.test.labels
    with torch.no_grad():
        loss = nn.functional.cross_entropy(network.eval()(images), labels)
    assert scores["test_loss"] == pytest.approx(float(loss), rel=1e-4)
    assert scores["train_loss"] < record["stages"][2]["compensation"]["loss_without"]


def test_the_log_tells_the_loss_at_the_mask_alone(undisturbed):
    log = (the_run(undisturbed) / "log.txt").read_text()
    (first,) = [line for line in log.splitlines() if line.startswith("# stage 1/5: ")]
    stage = json.loads((the_run(undisturbed) / "record.json").read_text())["stages"][0]
    assert f"({stage['compensation']['loss_without']:.5f} at the mask alone)" in first


def test_statistics_alone_can_be_estimated_anew(tmp_path):
    """The mask is that of a plain run, and records of both are alike but for what follows."""
    flags = [*FLAGS, "--pe", "0", "--nepochs", "0", "--pm", "MP"]
    for name, added in (("plain", []), ("anew", ["--recalibrate", "end"])):
        assert main([*flags, *added, "--path", str(tmp_path / name)]) == 0
    plain, anew = (result(tmp_path / name) for name in ("plain", "anew"))
    assert plain["mask"] == anew["mask"]
    assert anew["record"]["config"] == {**plain["record"]["config"], "recalibrate": "end"}
    networks = [
        torch.load(the_run(tmp_path / name) / "best_model.pt", weights_only=True)["state_dict"]
        for name in ("plain", "anew")
    ]
    different = {key for key, value in networks[0].items() if not value.equal(networks[1][key])}
    assert different == {"1.running_mean", "1.running_var"}
    assert not any("compensation" in stage for stage in anew["record"]["stages"])


def test_a_network_without_statistics_is_told(tmp_path, capfd):
    words = "run --arch MLP --dataset digits --nepochs 0 --nex 20 --recalibrate end --path"
    assert main([*words.split(), str(tmp_path)]) == 0
    assert "--recalibrate end: MLP has no running statistics" in capfd.readouterr().err


def test_names_and_records_have_the_flags_only_where_they_are_asked_for():
    plain = RunConfig(arch="MLP")
    asked = replace(plain, compensate=True, finish=3, recalibrate="stages")
    assert not {"compensate", "finish", "recalibrate"} & set(plain.settings)
    assert asked.name == plain.name.replace(",dec=", ",compensate=True,dec=").replace(
        ",l2=", ",finish=3,l2="
    ).replace(",reg=", ",recalibrate=stages,reg=")
    assert asked.settings == {
        **plain.settings, "compensate": True, "finish": 3, "recalibrate": "stages"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"finish": 2}, "--finish 2 without --compensate: "),
        ({"compensate": True, "finish": -1}, "--finish must be a whole number from 0 to"),
        ({"compensate": True, "examples": 4}, "--nex 4 with --compensate: "),
        ({"recalibrate": "ends"}, "--recalibrate must be one of no, stages, end, got 'ends'; did"),
    ],
)
def test_what_cannot_be_is_one_sentence(changes, said):
    with pytest.raises(ValueError, match=said):
        RunConfig(**changes)


@pytest.mark.parametrize("recalibrate", ["no", *RECALIBRATED])
def test_the_library_knows_every_choice(recalibrate):
    assert RunConfig(recalibrate=recalibrate).recalibrate == recalibrate
