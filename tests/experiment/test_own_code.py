"""Networks, data and criteria of one's own in runs and sweeps, and starts that are pruned."""

import itertools
import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lossprune
from lossprune.data import load
from lossprune.experiment import RunConfig, run
from lossprune.progress import Silent
from tests.experiment.test_resume import WORDS, result
from tests.processes import Processes, finish

OWN = """
import random
import lossprune
import torch
from torch import nn

torch.rand(5)  # drawn at import alone: it must not change what is drawn later

def build(shape, classes):
    width = shape[0]
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 40), nn.ReLU(), nn.Linear(40, classes))

def lazy():
    return nn.Sequential(nn.LazyLinear(40), nn.ReLU(), nn.Linear(40, 3))

def tanh():
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))

built = tanh()

def once():
    return built

def tokens():
    return nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(6 * 8, 3))

def points(count):
    labels = torch.arange(count) % 3
    return torch.randn(count, 6) + labels[:, None], labels

def load(seed):
    return points(240), points(60)

def words():
    whole = torch.randint(9, (300, 6)), torch.arange(300) % 3
    whole[0][:, 0] = whole[1]
    return {"train": [half[:240] for half in whole], "test": [half[240:] for half in whole]}

fisher = lossprune.Criterion("Fisher", lambda theta, g, h: (g * theta) ** 2, gradient=True)

def image(shape, hidden=4):
    return nn.Conv2d(1, hidden, 3)

def needs(depth):
    return nn.Linear(6, 3)

def narrow():
    return nn.Linear(6, 2)

def wrong():
    return nn.Linear(5, 3)

def ends():
    raise SystemExit(0)

number = 3
"""

_numbers = itertools.count()
QUICK = {"prune_epoch": 1, "epochs": 2, "sparsity": 0.8, "stages": 2, "exponential": True}


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """The name of a module of one's own in the working folder, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    name = f"own{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(OWN)
    return name


def config(own: str, **changes) -> RunConfig:
    given = {"arch": f"{own}:build", "dataset": f"{own}:load", "threads": 1, **QUICK, **changes}
    return RunConfig(**given)


def weights(folder: Path, name: str = "last_model.pt") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["state_dict"]


def test_killed_and_resumed_it_ends_as_if_never_stopped(own, tmp_path):
    """By the real command line, with network, data and criterion of one's own."""
    flags = shlex.split(
        f"run --arch {own}:build --dataset {own}:load --pm {own}:fisher --threads 1 --exp "
        "--pr 0.8 --pe 8 --pi 9 --nepochs 20"
    )
    finish([*flags, "--path", "undisturbed"], tmp_path / "log")
    for place, word in enumerate(("stage 4/9", "epoch 14/20")):
        process = Processes([*flags, "--path", "killed"], tmp_path / f"log{place}")
        process.wait_for(word, "Experiment already exists")
        process.kill()
        process.join(30)
    finish([*flags, "--path", "killed"], tmp_path / "last")
    assert any(word in (tmp_path / "last").read_text() for word in WORDS[1:])
    undisturbed = result(tmp_path / "undisturbed")
    assert result(tmp_path / "killed") == undisturbed
    assert undisturbed["record"]["config"]["pm"] == f"{own}:fisher"
    assert set(undisturbed["record"]["own"]) == {"arch", "dataset", "pm", "data"}


def test_the_seed_determines_network_and_data_and_the_global_state_is_left(own):
    before = torch.random.get_rng_state()
    one = run(config(own, path=Path("a")))
    assert torch.equal(torch.random.get_rng_state(), before)
    two = run(config(own, path=Path("b")))
    other = run(config(own, path=Path("b"), seed=2))
    assert one.start == two.start
    assert one.own == two.own
    assert other.start.weights_sha256 != one.start.weights_sha256
    assert other.own["data"] != one.own["data"]
    torch.manual_seed(1111)
    drawn = nn.Linear(6, 40).weight
    untrained = config(own, path=Path("c"), epochs=0, prune_epoch=-1)
    run(untrained)
    assert torch.equal(weights(untrained.folder)["1.weight"], drawn)


@pytest.mark.parametrize(
    ("arch", "dataset"), [("lazy", "load"), ("once", "load"), ("tokens", "words")]
)
def test_networks_and_data_of_many_kinds(own, arch, dataset):
    """Lazy modules, one that the module has built already, embeddings of whole numbers."""
    given = {"arch": f"{own}:{arch}", "dataset": f"{own}:{dataset}", "lr": 0.05}
    first = run(config(own, **given, path=Path("a")))
    again = run(config(own, **given, path=Path("b")))
    assert first.start == again.start  # what is trained is a copy
    assert first.best.scores == again.best.scores
    assert first.sparsity == pytest.approx(0.8, abs=5e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arch": "OWN:image"}, "OWN:image: it raised RuntimeError: "),
        ({"arch": "OWN:needs"}, "--arch OWN:needs needs an argument 'depth': it can have shape, "),
        ({"arch": "OWN:narrow"}, r"must give logits of shape \(examples, 3\), it gives \(2, 2\)"),
        ({"arch": "OWN:wrong"}, "OWN:wrong: it raised RuntimeError: "),
        ({"arch": "OWN:ends"}, "--arch OWN:ends: it raised SystemExit: 0 "),
        ({"arch": "OWN:load"}, "--arch OWN:load needs an argument 'seed'"),
        ({"arch": "OWN:number"}, "--arch OWN:number must be a function, it is an object of type"),
        ({"arch": "OWN:biuld"}, r"OWN has no 'biuld' \(did you mean 'build'\?\)"),
        ({"arch": "OWN.py:build"}, "--arch must be MODULE:FUNCTION, as Python imports it, got"),
        ({"arch": "nobody.has:this"}, "--arch nobody.has:this: no module 'nobody' in "),
        ({"criterion": "OWN:build"}, "--pm OWN:build must be a lossprune.Criterion, it is"),
        ({"dataset": "OWN:needs"}, "--dataset OWN:needs needs an argument 'depth': it can have "),
        ({"dataset": "OWN:lazy"}, "--dataset OWN:lazy: it must return"),
        ({"dataset": None}, "--dataset is missing: a network of your own, --arch OWN:build, "),
    ],
)
def test_a_mistake_is_one_sentence(own, changes, said, tmp_path):
    changes = {name: value and value.replace("OWN", own) for name, value in changes.items()}
    with pytest.raises(ValueError, match=said.replace("OWN", own)):
        run(config(own, **changes))
    assert not (tmp_path / "results").exists()


def stop_in(config: RunConfig, word: str) -> None:
    """Let a run stop where it says this."""

    class Stop(Silent):
        def note(self, text: str) -> None:
            if text.startswith(word):
                raise KeyboardInterrupt

        def advance(self, kind: str, done: int, total: int, text: str = "") -> None:
            if text:
                self.note(f"{kind} {done}")

    with pytest.raises(KeyboardInterrupt):
        run(config, Stop())


class Heard(Silent):
    """What a run says."""

    def __init__(self) -> None:
        self.notes = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("torch.randn(count, 6)", "torch.rand(count, 6)"), "was begun with other data than "),
        (("nn.Linear(width, 40)", "nn.Linear(width, 40, bias=False)"), "from another network than"),
        (("nn.ReLU()", "nn.Tanh()"), None),
    ],
)
def test_with_other_code_an_interrupted_run_does_not_go_on_unnoticed(own, changed, said, tmp_path):
    whole = config(own, epochs=4)
    stop_in(whole, "epoch 3")
    name = f"own{next(_numbers)}"  # the module of a new process
    (tmp_path / f"{name}.py").write_text(OWN.replace(*changed))
    (checkpoint,) = tmp_path.glob("results/*/checkpoint.pt")
    moved = config(name, epochs=4).folder
    checkpoint.parent.rename(moved)
    heard = Heard()
    if said is not None:
        with pytest.raises(ValueError, match=said):
            run(config(name, epochs=4))
        return
    run(config(name, epochs=4), heard)
    assert "note: the code of --arch has changed since this run began" in heard.notes


def test_examples_are_all_there_are(own):
    heard = Heard()
    few = run(config(own, examples=1000, path=Path("a")), heard)
    assert "--nex 1000: all 216 training examples are measured, as there are no more" in heard.notes
    all_of_them = run(config(own, examples=216, path=Path("b")))
    assert [stage["loss_after"] for stage in few.stages] == [
        stage["loss_after"] for stage in all_of_them.stages
    ]


@pytest.fixture
def pruned(own, tmp_path) -> tuple[Path, lossprune.Mask]:
    """A folder as ``lossprune prune`` writes it."""
    data = load(f"{own}:load", seed=1111)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
    mask = lossprune.prune(network, "MP", sparsity=0.75).mask
    (tmp_path / "pruned").mkdir()
    lossprune.save_sparse(network, mask, tmp_path / "pruned" / "network.safetensors")
    assert len(data.train) == 216
    return tmp_path / "pruned", mask


@pytest.mark.parametrize("train", ["dense", "auto"])
def test_a_pruned_start_is_fine_tuned_with_its_weights_removed(own, pruned, train):
    folder, mask = pruned
    tuned = config(own, prune_epoch=-1, epochs=4, start=folder, train=train)
    record = run(tuned)
    for name in ("best_model.pt", "last_model.pt"):
        for weight, kept in mask.items():
            assert (weights(tuned.folder, name)[weight][~kept] == 0).all()
            assert (weights(tuned.folder, name)[weight][kept] != 0).all()
    assert lossprune.Mask.load(tuned.folder / "mask.safetensors") == mask
    assert (record.removed, record.start.removed) == (mask.removed, mask.removed)
    assert record.sparsity == mask.sparsity
    assert "90 of 360 weights" not in (tuned.folder / "log.txt").read_text()
    assert "# start: 270 of 360 weights were removed" in (tuned.folder / "log.txt").read_text()
    assert record.epochs[-1].scores.train_loss < record.epochs[0].scores.train_loss


def test_a_pruned_start_that_is_stopped_goes_on_to_the_same_bits(own, pruned):
    folder, mask = pruned
    whole = {"start": folder, "epochs": 6, "prune_epoch": 3, "sparsity": 0.9}
    run(config(own, **whole, path=Path("whole")))
    for word in ("epoch 2", "stage 1", "epoch 5"):
        stop_in(config(own, **whole, path=Path("stopped")), word)
    run(config(own, **whole, path=Path("stopped")))
    one, two = result(Path("whole")), result(Path("stopped"))
    assert one == two
    last = lossprune.Mask.load(config(own, **whole, path=Path("whole")).folder / "mask.safetensors")
    assert last.removed == 324
    assert all((last[name] <= kept).all() for name, kept in mask.items())
    assert one["record"]["stages"][0]["removed"] > mask.removed


def test_a_pruned_start_is_not_pruned_less(own, pruned):
    with pytest.raises(ValueError, match="is pruned already: start has 270 of 360 weights removed"):
        run(config(own, start=pruned[0], sparsity=0.5))


def test_values_alone_are_trained_and_it_says_so(own, pruned, tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
    pruned[1].apply_(network)
    torch.save(network.state_dict(), tmp_path / "values.pt")
    heard = Heard()
    record = run(config(own, start=Path("values.pt"), prune_epoch=-1), heard)
    assert heard.notes[0].startswith("note: 75% of the weights in values.pt are 0, and all are ")
    assert record.removed == 0


def test_a_sweep_of_ones_own(own, command, tmp_path):
    """With baselines, in groups and alone, and the page."""
    (tmp_path / "plan.toml").write_text(
        f'arch = "{own}:build"\ndataset = "{own}:load"\npe = 0\nnepochs = 1\npr = 0.8\n'
        f'pm = ["MP", "{own}:fisher"]\nseed = [1, 2]\n[baseline]\n'
    )
    answer = command("sweep", "plan.toml", "--workers", "1")
    assert answer.status == 0, answer.err
    assert "6 of 6 finished" in answer.err
    assert "6 finished" in command("status", "results").out
    assert command("report", "results", "--out", "page").status == 0
    assert f"{own}:fisher" in (tmp_path / "page" / "index.html").read_text()
    assert command("compare", "results", "results").status == 0
    for path in tmp_path.glob("results/*pe=-1*/record.json"):  # the baselines, in a group
        assert json.loads(path.read_text())["training"][0]["mode"] == "stacked"
    (folder,) = tmp_path.glob(f"results/*pm={own}:fisher,*seed=1")
    record = json.loads((folder / "record.json").read_text())
    alone = run(
        config(
            own,
            criterion=f"{own}:fisher",
            start=Path(record["start"]["path"]),
            **{"prune_epoch": 0, "epochs": 1, "stages": 1, "exponential": False, "seed": 1},
            path=Path("alone"),
        )
    )
    assert alone.best.scores.test_loss == pytest.approx(
        record["best"]["scores"]["test_loss"], rel=1e-5
    )
    assert alone.removed == record["removed"] == 288


def test_one_folder_is_not_for_two_starts(own, command, tmp_path):
    for name in ("one.pt", "two.pt"):
        torch.save({}, tmp_path / name)
    (tmp_path / "plan.toml").write_text(
        f'arch = "{own}:build"\ndataset = "{own}:load"\nmodel_0 = ["one.pt", "two.pt"]\npe = 0\n'
    )
    answer = command("sweep", "plan.toml", "--dry_run")
    assert answer.status == 2
    assert "model_0 one.pt and two.pt give runs of the same folder" in answer.err


def test_a_data_set_of_torch_is_the_same(own, tmp_path):
    """What is read example by example and what is given as tensors."""
    labels = torch.arange(60) % 3
    inputs = torch.randn(60, 4, dtype=torch.float64)
    (tmp_path / f"{own}b.py").write_text("given = None\ndef load():\n    return given\n")
    read = []
    module = __import__("importlib").import_module
    load_own = f"{own}b:load"
    with pytest.raises(ValueError, match="it returned None"):
        load(load_own, seed=1)
    for given in ((inputs, labels), TensorDataset(inputs, labels), (inputs.numpy(), labels.int())):
        module(f"{own}b").given = {"train": given, "val": given, "test": given}
        read.append(load(load_own, seed=1))
    for other in read[1:]:
        assert torch.equal(other.train.images, read[0].train.images)
        assert torch.equal(other.test.labels, labels)
    batch, _ = next(read[0].batches(read[0].train, 60))
    assert torch.equal(batch, inputs.float())
    batch.zero_()  # of the network, not of the data set
    assert torch.equal(read[0].train.images, inputs.float())
