"""Small runs of ImageNet's shape: photographs, a ResNet, Monte-Carlo curvature."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lossprune.data import load
from lossprune.networks import NETWORKS
from lossprune.pruning import Mask
from tests.data.photographs import write_photographs
from tests.processes import finish

SIZE = 32
# Losses of single precision, summed in another order, before and after two steps of training.
ROUNDING = 1e-3
CLASSES = 10
RUN = (
    *("run", "--arch", "ResNet18", "--dataset", "imagenet", "--image_size", SIZE),
    *("--pm", "QM", "--estimator", "monte-carlo:2", "--pi", "2", "--exp", "--reg", "1e-3"),
    *("--pr", "0.8", "--nex", "8", "--batch_size", "25", "--threads", "1", "--num_workers", "0"),
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """10 classes of 6 training images, one to test."""
    folder = tmp_path_factory.mktemp("imagenet")
    return write_photographs(folder / "photographs", classes=CLASSES, train=6, val=1)


@pytest.fixture(autouse=True)
def _cache(photographs, monkeypatch):
    monkeypatch.setenv("LOSSPRUNE_CACHE", str(photographs.parent / "cache"))


def checkpoint():
    """A ResNet-18 whose running statistics are those of some inputs."""
    network = NETWORKS["ResNet18"](
        shape=(3, SIZE, SIZE), classes=CLASSES, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        network.train()(torch.randn(50, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)))
    return network.state_dict()


def test_prune_and_fine_tune_from_anyones_checkpoint(command, photographs, tmp_path):
    """As others save them: wrapped in data parallel, or of before batch norm counted batches."""
    weights = checkpoint()
    save_file({f"module.{name}": weight for name, weight in weights.items()}, "ddp.safetensors")
    old = {name: weight for name, weight in weights.items() if "num_batches" not in name}
    torch.save(old, "old.pt")
    flags = (*RUN, "--data_path", photographs)
    first = command(*flags, "--nepochs", 1, "--model_0", "ddp.safetensors")
    assert first.status == 0, first.err
    (folder,) = (tmp_path / "results").iterdir()
    assert ",batch_size=25,dataset=imagenet," in folder.name
    assert ",image_size=32," in folder.name
    record = json.loads((folder / "record.json").read_text())
    total = sum(weight.numel() for name, weight in weights.items() if weight.ndim > 1)
    assert record["prunable"] == total
    assert record["removed"] == round(0.8 * total)
    assert len(record["stages"]) == 2
    assert len(record["epochs"]) == 1
    mask = Mask.load(folder / "mask.safetensors")
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"} <= set(mask)
    last = torch.load(folder / "last_model.pt", weights_only=True)
    assert last["metadata"]["shape"] == [3, SIZE, SIZE]
    for name, kept in mask.items():
        assert not last["state_dict"][name][~kept].any()
    assert not torch.equal(last["state_dict"]["bn1.running_mean"], weights["bn1.running_mean"])
    second = command(*flags, "--pe", -1, "--nepochs", 0, "--model_0", "old.pt")
    assert second.status == 0, second.err
    (other,) = (path for path in (tmp_path / "results").iterdir() if path != folder)
    same = json.loads((other / "record.json").read_text())
    assert same["best"]["scores"] == record["before_pruning"]["scores"]


def test_training_is_scored_on_every_25th_image_before_and_after(command, photographs, tmp_path):
    assert command(*RUN, "--data_path", photographs, "--pe", -1, "--nepochs", 0).status == 0
    (folder,) = (tmp_path / "results").iterdir()
    record = json.loads((folder / "record.json").read_text())
    photos = load("imagenet", photographs, seed=1111, image_size=SIZE)
    network = NETWORKS["ResNet18"](shape=photos.shape, classes=CLASSES)
    last = torch.load(folder / "last_model.pt", weights_only=True)
    network.load_state_dict(last["state_dict"])
    every = slice(None, None, 25)
    with torch.no_grad():
        logits = network.eval()(photos.inputs(photos.train.images[every]))
    loss = torch.nn.functional.cross_entropy(logits, photos.train.labels[every])
    assert record["best"]["scores"]["train_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_cache_can_be_made_beforehand(command, photographs):
    answer = command("data", "imagenet", "--data_path", photographs, "--image_size", SIZE)
    lines = answer.out.splitlines()
    assert "images     3 × 32 × 32 (channels × height × width)" in lines
    assert "train      58 examples" in lines
    assert "test       10 examples" in lines


@pytest.mark.full("two processes of one run, beside many that decode one folder")
def test_two_processes_decode_once_and_do_one_run(command, photographs, tmp_path, monkeypatch):
    """The same run as of one process: pruning, fine-tuning and batch norms over whole batches."""
    flags = [str(word) for word in (*RUN, "--data_path", photographs, "--nepochs", 1)]
    save_file(checkpoint(), "start.safetensors")
    # An estimator that draws nothing: Monte-Carlo labels depend on the number of processes.
    # Steps so small that losses do not diverge: else rounding, which processors do unlike, grows.
    flags += ["--model_0", "start.safetensors", "--estimator", "empirical-fisher", "--lr", "1e-5"]
    assert command(*flags, "--path", "one").status == 0
    monkeypatch.setenv("LOSSPRUNE_CACHE", str(tmp_path / "cache"))
    finish([*flags, "--path", "two"], tmp_path / "log", 2)
    assert len(list((tmp_path / "cache").glob("*/images.u8"))) == 1
    alone, together = (
        json.loads(next((tmp_path / name).glob("*/record.json")).read_text())
        for name in ("one", "two")
    )
    assert together["environment"]["processes"] == 2
    assert together["removed"] == alone["removed"]
    for moment in ("before_pruning", "after_pruning", "last"):
        expected = pytest.approx(alone[moment]["scores"], rel=ROUNDING)
        assert together[moment]["scores"] == expected
