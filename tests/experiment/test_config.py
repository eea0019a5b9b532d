from dataclasses import replace
from pathlib import Path

import pytest

from lossprune.experiment import RunConfig

README_BASELINE = (
    "arch=MLP,dec=1.0,dec_every=1,exp=False,l2=0.0005,lr=0.01,model_0=None,nepochs=800,nex=1000,"
    "pe=-1,pi=1,pm=MP,pr=0.956,reg=0.0,seed=1111"
)


def test_the_readmes_baseline_has_the_published_name():
    config = RunConfig(arch="MLP", epochs=800, lr=0.01, seed=1111, prune_epoch=-1)
    assert config.name == README_BASELINE


def test_numbers_are_named_as_python_prints_them():
    config = RunConfig(reg=1e-5, sparsity=0.98847, stages=140, exponential=True, start=Path("x.pt"))
    assert config.name == (
        "arch=VGG11,dec=1.0,dec_every=1,exp=True,l2=0.0005,lr=0.01,model_0=True,nepochs=200,"
        "nex=1000,pe=0,pi=140,pm=MP,pr=0.98847,reg=1e-05,seed=1111"
    )
    assert "reg=100.0" in replace(config, reg=1e2).name


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"dataset": "mnist"}, README_BASELINE),
        ({"dataset": "digits"}, README_BASELINE.replace(",dec=", ",dataset=digits,dec=")),
        ({"device": "cpu"}, README_BASELINE),
        ({"threads": 2}, README_BASELINE),
        ({"data_path": Path("elsewhere")}, README_BASELINE),
        ({"num_workers": 0}, README_BASELINE),
        ({"mirror": "http://localhost"}, README_BASELINE),
        ({"debug": True}, README_BASELINE),
    ],
)
def test_later_flags_are_named_only_where_they_change_the_result(changes, name):
    config = RunConfig(arch="MLP", epochs=800, prune_epoch=-1)
    assert replace(config, **changes).name == name


def test_a_name_that_no_file_system_takes_has_its_first_flags_and_a_hash():
    config = RunConfig(arch="my.own:" + "n" * 80, dataset="my.own:" + "d" * 40)
    name = config.name
    assert name.startswith(f"arch={config.arch},dataset={config.dataset},dec=1.0")
    assert 200 < len(name) <= 240
    other = replace(config, seed=7)
    assert other.name == name.replace("seed=1111", "seed=7")
    assert replace(config, sparsity=0.5).name[-16:] != name[-16:]
    assert len(replace(config, arch="my.own:" + "é" * 200).name.encode()) <= 240


def test_the_network_implies_the_data_set():
    assert RunConfig(arch="MLP").dataset_name == "mnist"
    assert RunConfig(arch="PreActResNet18").dataset_name == "cifar10"
    assert RunConfig(arch="MLP", dataset="digits").dataset_name == "digits"


def test_the_defaults_are_the_published_ones():
    assert RunConfig().settings == {
        "amp": "off",
        "arch": "VGG11",
        "batch_size": 100,
        "compile": False,
        "dataset": "cifar10",
        "dec": 1.0,
        "dec_every": 1,
        "estimator": "exact",
        "exp": False,
        "image_size": 0,
        "l2": 0.0005,
        "lr": 0.01,
        "model_0": None,
        "nepochs": 200,
        "nex": 1000,
        "pe": 0,
        "pi": 1,
        "pm": "MP",
        "pr": 0.956,
        "reg": 0.0,
        "seed": 1111,
        "train": "auto",
    }


def test_the_way_of_training_is_named_where_it_is_asked_for():
    assert "train" not in RunConfig().name
    assert RunConfig(train="dense").name.endswith(",seed=1111,train=dense")
    with pytest.raises(ValueError, match="--train must be one of auto, dense, sparse, got 'fast'"):
        RunConfig(train="fast")


def test_an_estimator_is_named_where_it_is_not_the_default():
    assert "estimator" not in RunConfig().name
    assert ",estimator=monte-carlo:5," in RunConfig(estimator="monte-carlo:5").name


@pytest.mark.parametrize("estimator", ["exct", "monte-carlo:0", "tolerance:1", "exact:0"])
def test_a_wrong_estimator_is_refused(estimator):
    with pytest.raises(ValueError, match=f"--estimator.*{estimator}"):
        RunConfig(estimator=estimator)


def test_the_folder_lies_under_the_path():
    assert RunConfig(path=Path("out/")).folder == Path("out") / RunConfig().name
