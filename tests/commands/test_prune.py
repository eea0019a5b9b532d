"""``lossprune prune`` on a network of one's own, and every mistake it may meet."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import lossprune
from lossprune.cli import main
from lossprune.pruning import CRITERIA, LOSSES, SCOPES

MODULE = """
import torch

from torch import nn

made = []

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

class WithCopy(Net):
    def __init__(self):
        super().__init__()
        self.average = Net()

class Own(Net):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.eye(12))
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        return super().forward(self.norm(x) @ self.mix)

def build():
    return Net()

def build_own():
    return Own()

def build_convolutions():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

def images():
    return [(inputs[:, :1].expand(-1, 36).reshape(-1, 1, 6, 6), y) for inputs, y in batches()]

def build_with_copy():
    return WithCopy()

def batches():
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(25, 12, generator=generator), torch.arange(25) % 3) for _ in range(4)]

def build_for(shape, classes, generator):
    net = nn.Sequential(nn.Linear(*shape, 20), nn.Tanh(), nn.Linear(20, classes))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return net

def load():
    inputs, targets = (torch.cat(part) for part in zip(*batches()))
    return {"train": (inputs[:80], targets[:80]), "test": (inputs[80:], targets[80:])}

def several():
    return [(x, torch.stack([x[:, 0] > 0, x[:, 1] > 1, y == 0], 1).float()) for x, y in batches()]

def hidden(targets):
    return torch.where(targets < 0, -100, targets)

def tokens():
    g = torch.Generator().manual_seed(3)
    return [
        (torch.randn(n, 4, 12, generator=g), hidden(torch.randint(-1, 3, (n, 4), generator=g)))
        for n in (10, 60, 30)
    ]

def wide():
    return [(torch.zeros(7, 9), torch.zeros(7).long())]

def none():
    return []

def generated():
    made.append(1)
    yield from batches()

def pairs():
    return [{"x": x, "y": y} for x, y in batches()]

def forward(model, batch):
    return model(batch["x"]), batch["y"]

def broken():
    raise KeyError("no such layer")

def broken_later():
    yield from batches()[:1]
    raise OSError("the disk is gone")

def number():
    return 3

answer = 42
"""

_numbers = itertools.count()


@pytest.fixture
def mine(command, tmp_path):
    """The name of a fresh module in the working folder; Python would remember an old one."""
    name = f"mine{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    yield name
    sys.modules.pop(name, None)
    while str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def said(answer) -> str:
    assert answer.status == 2
    assert answer.out == ""
    lines = answer.err.splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1].removeprefix("error: ")


FLAGS = ("--sparsity", 0.9, "--stages", 3, "--reg", 1e-3, "--examples", 60)


@pytest.mark.parametrize("taken", [False, True])
def test_matrices_that_are_left_out_are_told_and_taken_in(command, mine, tmp_path, taken):
    flags = ["--criterion", "MP", "--sparsity", 0.5]
    if taken:
        flags += ["--parameters", "*,mix"]
    answer = command("prune", f"{mine}:build_own", *flags)
    assert answer.status == 0, answer.err
    removed = 222 if taken else 150
    assert f"of all 491 parameters of the network: {removed / 491:.1%} removed" in answer.out
    assert ("144 numbers in mix are in matrices" in answer.out) == (not taken)
    assert ("--parameters '*,mix' takes them in" in answer.out) == (not taken)
    record = json.loads((tmp_path / "pruned" / "record.json").read_text())
    assert record["model_parameters"] == 491
    assert record["model_sparsity"] == removed / 491
    norm = {"norm.weight": {"kind": "normalisation", "shape": [12], "size": 12}}
    mix = {} if taken else {"mix": {"kind": "matrix", "shape": [12, 12], "size": 144}}
    assert record["skipped"] == mix | norm


def test_what_is_found_on_the_way_is_what_the_library_finds(command, mine, tmp_path):
    data = "--data", f"{mine}:batches", "--validation", f"{mine}:batches", "--examples", 60
    auto = "--reg", "auto", "--stages", "auto", "--max-loss-increase", 0.2
    answer = command("prune", f"{mine}:build", *data, *auto)
    assert answer.status == 0, answer.err
    user = sys.modules[mine]
    with torch.random.fork_rng():
        torch.manual_seed(1111)
        network = user.build()
    expected = lossprune.prune(
        network,
        "QM",
        data=user.batches(),
        validation=user.batches(),
        examples=60,
        reg="auto",
        stages="auto",
        max_loss_increase=0.2,
        seed=1111,
    )
    assert lossprune.Mask.load(tmp_path / "pruned" / "mask.safetensors") == expected.mask
    stages = json.loads((tmp_path / "pruned" / "record.json").read_text())["stages"]
    assert [stage["reg"] for stage in stages] == [stage.reg for stage in expected.stages]
    points = [point["removed"] for stage in stages for point in stage["points"]]
    assert points == [point.removed for point in expected.curve]
    before, after = expected.curve[0].loss, expected.mask.removed
    reached = next(point.loss for point in expected.curve if point.removed == after)
    assert f"validation loss {before:.4f} before pruning, {reached:.4f} after" in answer.out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--reg", "best", "--sparsity", 0.9], "--reg must be a number or auto, got 'best'"),
        (["--stages", "many", "--sparsity", 0.9], "--stages must be a whole number or auto"),
        ([], "--sparsity is missing"),
        (["--max_error_increase", -1], "max_error_increase must be a number of at least 0"),
        (["--sparsity", 0.9, "--seconds", 1], 'seconds=1.0 is for stages="auto"'),
    ],
)
def test_what_cannot_be_found_is_told(command, mine, flags, told):
    answer = command("prune", f"{mine}:build", "--data", f"{mine}:batches", *flags)
    assert told in said(answer)


def test_it_writes_what_the_library_finds(command, mine, tmp_path):
    state = torch.get_rng_state()
    answer = command("prune", f"{mine}:build", "--data", f"{mine}:batches", *FLAGS)
    assert answer.status == 0, answer.err
    assert torch.equal(torch.get_rng_state(), state)
    user = sys.modules[mine]
    with torch.random.fork_rng():
        torch.manual_seed(1111)
        network = user.build()
    expected = lossprune.prune(
        network, "QM", sparsity=0.9, stages=3, reg=1e-3, examples=60, data=user.batches()
    )
    folder = tmp_path / "pruned"
    assert sorted(path.name for path in folder.iterdir()) == [
        "mask.safetensors",
        "network.safetensors",
        "record.json",
        "state_dict.safetensors",
        "table.md",
    ]
    mask = lossprune.Mask.load(folder / "mask.safetensors")
    assert mask == expected.mask
    other = user.build()
    assert lossprune.load_sparse(folder / "network.safetensors", other) == mask
    mask.apply_(network)
    assert all(
        torch.equal(p, q) for p, q in zip(other.parameters(), network.parameters(), strict=True)
    )
    plain = load_file(folder / "state_dict.safetensors")
    assert plain.keys() == network.state_dict().keys()
    assert all(torch.equal(plain[name], tensor) for name, tensor in network.state_dict().items())

    record = json.loads((folder / "record.json").read_text())
    assert record["settings"]["criterion"] == "QM"
    assert record["removed"] == 270
    assert record["prunable"] == 300
    assert [row["loss_after"] for row in record["stages"]] == [
        stage.loss_after for stage in expected.stages
    ]
    rows = {line.split()[0]: line.split() for line in answer.out.splitlines() if line}
    for row, (name, kept) in zip(record["layers"], mask.items(), strict=True):
        first = name == "first.weight"
        # A hidden unit is reached where something enters and something leaves it.
        alive = mask["first.weight"].any(1) & mask["second.weight"].any(0)
        reached = alive if first else (mask["second.weight"] & alive).any(1)
        count, dead, units = int(kept.sum()), int((~reached).sum()), len(reached)
        assert (row["name"], row["kept"], row["removed"]) == (name, count, kept.numel() - count)
        assert row["sparsity"] == 1 - count / kept.numel()
        assert (row["units"], row["dead_units"]) == (units, dead)
        assert rows[name][6:8] == [str(kept.numel() - count), f"{1 - count / kept.numel():.5f}"]
        assert rows[name][8:] == [str(dead), "of", str(units)]
    table, *notes = (folder / "table.md").read_text().split("\n\n")
    assert table.count("\n") == 4
    assert "`network.safetensors`: pruned weights: lossprune.load_sparse(path, network)" in notes
    files = answer.out.partition("written in pruned:\n")[2].splitlines()
    assert len(files) == 5
    assert max(map(len, files)) <= 80
    stages = [line.split(":")[0] for line in answer.err.splitlines()]
    assert stages == ["stage 1/3", "stage 2/3", "stage 3/3"]


def test_generators_are_asked_again_and_forward_reads_any_batch(command, mine):
    masks = []
    for flags in (
        ("--data", f"{mine}:batches"),
        ("--data", f"{mine}:generated"),
        ("--data", f"{mine}:pairs", "--forward", f"{mine}:forward"),
    ):
        out = f"out{len(masks)}"
        assert command("prune", f"{mine}:build", *flags, *FLAGS, "--out", out).status == 0
        masks.append(lossprune.Mask.load(Path(out) / "mask.safetensors"))
    assert masks[0] == masks[1] == masks[2]
    assert len(sys.modules[mine].made) == 3


def test_weights_scope_pattern_and_parameters_reach_the_pruning(command, mine, tmp_path):
    command("prune", f"{mine}:build", "--criterion", "MP", "--pattern", "2:4")
    mask = lossprune.Mask.load(tmp_path / "pruned" / "mask.safetensors")
    assert mask.sparsity == 0.5
    assert (mask["first.weight"].view(20, 3, 4).sum(2) == 2).all()

    user = sys.modules[mine]
    network = user.build()
    save_file(network.state_dict(), tmp_path / "plain.safetensors")
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    lossprune.save_sparse(network, lossprune.Mask.dense(network), tmp_path / "small.safetensors")
    flags = ("--criterion", "MP", "--sparsity", 0.5, "--scope", "layer", "--parameters", "second.*")
    expected = lossprune.prune(network, "MP", sparsity=0.5, parameters="second.*").mask
    for number, name in enumerate(("plain.safetensors", "plain.pt", "small.safetensors")):
        out = f"out{number}"
        answer = command("prune", f"{mine}:build", *flags, "--weights", name, "--out", out)
        assert answer.status == 0, answer.err
        assert lossprune.Mask.load(tmp_path / out / "mask.safetensors") == expected
    save_file({"first.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    wrong = command(
        "prune", f"{mine}:build", *flags, "--weights", "other.safetensors", "--out", "x"
    )
    assert said(wrong).startswith(
        "--weights: other.safetensors does not hold this Net: "
        "'first.weight' has shape (2, 2), the network (20, 12)"
    )


TESTED = {
    "cross_entropy": ("batches", lambda z, t: (F.cross_entropy(z, t), z.argmax(1) != t)),
    "bce_with_logits": (
        "several", lambda z, t: (F.binary_cross_entropy_with_logits(z, t), (z > 0) != (t == 1))
    ),
    "token_cross_entropy": (
        "tokens",
        lambda z, t: (F.cross_entropy(z[t >= 0], t[t >= 0]), (z.argmax(2) != t)[t >= 0]),
    ),
    "next_token": (
        "tokens",
        lambda z, t: (
            F.cross_entropy(z[:, :-1][t[:, 1:] >= 0], t[:, 1:][t[:, 1:] >= 0]),
            (z[:, :-1].argmax(2) != t[:, 1:])[t[:, 1:] >= 0],
        ),
    ),
    "mse": ("several", lambda z, t: (F.mse_loss(z, t), None)),
}  # fmt: skip


@pytest.mark.parametrize("loss", TESTED)
def test_loss_and_error_on_test_data_before_and_after(command, mine, tmp_path, loss):
    data, oracle = TESTED[loss]
    flags = ("--loss", loss, "--test", f"{mine}:{data}", "--memory", "64M", "--device", "cpu")
    answer = command("prune", f"{mine}:build", *FLAGS[:2], "--criterion", "MP", *flags)
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "pruned" / "record.json").read_text())
    user = sys.modules[mine]
    with torch.random.fork_rng():
        torch.manual_seed(1111)
        network = user.build()
    inputs, targets = (torch.cat(part) for part in zip(*getattr(user, data)(), strict=True))
    mask = lossprune.Mask.load(tmp_path / "pruned" / "mask.safetensors")
    told = []
    for when in ("before", "after"):
        found = record["test"][when]
        with torch.no_grad():
            expected, wrong = oracle(network(inputs), targets)
        assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
        assert found["examples"] == len(inputs) == 100
        error = None if wrong is None else float(wrong.double().mean())
        assert found["error"] == (error if error is None else pytest.approx(error))
        told += [f"{found['loss']:.4f}"] + ([] if error is None else [f"{error:.2%}"])
        mask.apply_(network)
    (line,) = (line for line in answer.out.splitlines() if line.startswith("test loss"))
    assert all(word in line for word in told)
    assert line in (tmp_path / "pruned" / "table.md").read_text()


def test_a_data_set_as_runs_take_it_is_pruned_and_tested_on(command, mine, tmp_path):
    flags = ("--dataset", f"{mine}:load", "--examples", 40, "--stages", 2, "--sparsity", 0.8)
    answer = command("prune", f"{mine}:build_for", *flags)
    assert answer.status == 0, answer.err
    assert "note: the network's loss before pruning is 1.2" in answer.out
    assert "is it trained, and are its weights loaded? (--weights FILE)" in answer.out
    record = json.loads((tmp_path / "pruned" / "record.json").read_text())
    user = sys.modules[mine]
    network = user.build_for((12,), 3, torch.Generator().manual_seed(1111))
    inputs, targets = user.load()["test"]
    mask = lossprune.Mask.load(tmp_path / "pruned" / "mask.safetensors")
    for when in ("before", "after"):
        with torch.no_grad():
            error = float((network(inputs).argmax(1) != targets).double().mean())
        assert record["test"][when]["error"] == pytest.approx(error)
        mask.apply_(network)
    # A run prunes on the same examples of each stage.
    flags = ("--dataset", f"{mine}:load", "--nex", 40, "--pi", 2, "--exp", "--pr", 0.8)
    more = ("--arch", f"{mine}:build_for", "--pm", "QM", "--reg", 0.01, "--pe", 0, "--nepochs", 1)
    assert command("run", *flags, *more).status == 0
    (folder,) = (tmp_path / "results").iterdir()
    assert lossprune.Mask.load(folder / "mask.safetensors") == mask


def test_it_goes_on_from_an_earlier_mask(command, mine, tmp_path):
    flags = ("prune", f"{mine}:build", "--criterion", "MP")
    assert command(*flags, "--sparsity", 0.5).status == 0
    more = ("--sparsity", 0.9, "--stages", 2, "--out", "more", "--start")
    assert command(*flags, *more, "pruned/mask.safetensors").status == 0
    record = json.loads((tmp_path / "more" / "record.json").read_text())
    assert [stage["removed"] for stage in record["stages"]] == [233, 270]  # 300 (1 − √0.05) first
    assert record["settings"]["start"] == "pruned/mask.safetensors"
    first, second = (
        lossprune.Mask.load(tmp_path / out / "mask.safetensors") for out in ("pruned", "more")
    )
    assert not any((second[name] & ~kept).any() for name, kept in first.items())
    assert "--start: no mask at no" in said(
        command(*flags, *more[:4], "--out", "x", "--start", "no")
    )


def test_parts_that_are_not_used_are_named_in_table_note_and_record(command, mine, tmp_path):
    answer = command("prune", f"{mine}:build_with_copy", "--data", f"{mine}:batches", *FLAGS)
    assert answer.status == 0, answer.err
    assert "\naverage.first.weight (unused) " in answer.out
    assert "\nfirst.weight  " in answer.out
    assert (
        "\nnote: the outputs do not depend on average.first.weight, average.second.weight in "
        "evaluation mode (300 of 600 prunable weights): they count in the sparsity, and criteria "
        "that look at the loss remove them first; --exclude average leaves them out\n"
    ) in answer.out
    record = json.loads((tmp_path / "pruned" / "record.json").read_text())
    assert record["unused"] == ["average.first.weight", "average.second.weight"]
    assert "Warning" not in answer.err


def test_a_size_of_the_file(command, mine, tmp_path):
    flags = ["--bytes", "1.4K", "--stages", "2", "--criterion", "LM"]
    answer = command("prune", f"{mine}:build", "--data", f"{mine}:batches", *flags)
    assert answer.status == 0, answer.err
    pruned = tmp_path / "pruned"
    assert 1433 - 20 < (pruned / "network.safetensors").stat().st_size <= 1433
    mask = lossprune.Mask.load(pruned / "mask.safetensors")
    assert 0 < mask.removed < mask.total
    assert json.loads((pruned / "record.json").read_text())["settings"]["most_bytes"] == "1.4K"


def test_a_share_of_the_multiply_adds(command, mine, tmp_path):
    flags = ["--multiply_adds", ".25", "--scope", "multiply-adds", "--stages", "2"]
    answer = command("prune", f"{mine}:build_convolutions", "--data", f"{mine}:images", *flags)
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "pruned" / "record.json").read_text())
    # A convolution of 4 × 9 weights at 16 places, and 64 × 3 weights at one.
    mask = lossprune.Mask.load(tmp_path / "pruned" / "mask.safetensors")
    left = 16 * int(mask["0.weight"].sum()) + int(mask["3.weight"].sum())
    share = left / 768
    assert record["cost"] == {"unit": "multiply-adds", "dense": 768, "left": left, "share": share}
    assert 192 - 16 < left <= 192
    assert [stage["cost"] for stage in record["stages"]][-1] == pytest.approx(share)
    percent = f"{100 * share:.2f} %"
    told = f"{left} of 768 multiply-adds of the prunable weights are left ({percent})"
    assert f"\n{told}" in answer.out
    assert told in (tmp_path / "pruned" / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "prune takes MODULE:BUILD, such as mine.networks:build"),
        ("--sparsity .5", "prune takes MODULE:BUILD, such as mine.networks:build"),
        ("MINE:build", "--sparsity is missing: the fraction of the weights to remove"),
        ("MINE:build --bytes x", "--bytes must be a number of bytes of at least 1, such as"),
        ("MINE:build --bytes 1K --sparsity .5", "--bytes is given instead of --sparsity"),
        ("MINE:build --bytes 1 --criterion MP", "does not hold even where all 300 prunable"),
        ("MINE:build --multiply_adds 0", "--multiply_adds must be a share that is left, a number"),
        ("MINE:build --multiply_adds .5 --sparsity .5", "instead of --sparsity and --pattern"),
        ("MINE:build --multiply_adds .5 --criterion MP", "counts on an example: give --data or"),
        ("MINE:build --sparsity .5 --scope multiply-adds", "--scope multiply-adds counts on an"),
        ("MINE:build --sparsity 1", "--sparsity must be a number in [0, 1), got 1.0"),
        (
            "MINE:build --sparsity .5 --criterion qm",
            f"--criterion must be one of {', '.join(CRITERIA)}",
        ),
        ("MINE:build --sparsity .5 --scope layers", f"--scope must be one of {', '.join(SCOPES)}"),
        ("MINE:build --sparsity .5 --dataset MINE:lod", "--dataset MINE:lod: MINE has no 'lod'"),
        ("MINE:build --sparsity .5 --dataset minst", "--dataset must be one of"),
        ("MINE:build --sparsity .5 --dataset MINE:load --data MINE:batches", "given instead of"),
        ("MINE:build --sparsity .5 --device gpu", "--device must be one of auto, cpu, cuda, got"),
        ("MINE:build --sparsity .5 --memory 2X", "--memory must be a number of bytes of at least"),
        ("MINE:build --sparsity .5 --memory 0", "--memory must be a number of bytes of at least"),
        ("MINE:build --sparsity .5 --criterion MP --test MINE:tset", "--test MINE:tset: "),
        (
            "MINE:build --sparsity .5 --criterion MP --test MINE:wide",
            "on a test batch of (7, 9",
        ),
        (
            "MINE:build --sparsity .5 --criterion MP --test MINE:none",
            "to judge by hold no examples",
        ),
        ("MINE:build --sparsity .5 --stages 0", "--stages must be a whole number from 1 to"),
        ("MINE --sparsity .5", "MODULE:BUILD must be MODULE:FUNCTION, such as"),
        ("MINE:biuld --sparsity .5", "has no 'biuld' (did you mean 'build'?)"),
        ("MINE.x:build --sparsity .5", "no module "),
        ("MINX:build --sparsity .5", "(did you mean 'MINE'?)"),
        ("MINE:answer --sparsity .5", "must be a function, it is an object of type int"),
        ("MINE:number --sparsity .5", "must return a torch.nn.Module, it returned an object of"),
        ("MINE:broken --sparsity .5", "it raised KeyError: 'no such layer' ("),
        ("MINE:build --sparsity .5", "criterion 'QM' needs data"),
        ("MINE:build --sparsity .5 --data MINE:number", "must return an iterable of batches"),
        ("MINE:build --sparsity .5 --data MINE:broken_later", "raised OSError: the disk is gone"),
        (
            "MINE:build --sparsity .5 --data MINE:batches --loss mes",
            f"--loss must be one of {', '.join(LOSSES)}",
        ),
        ("MINE:build --sparsity .5 --data MINE:batches --loss MINE:los", "has no 'los'"),
        ("MINE:build --sparsity .5 --criterion MP --weights no.pt", "--weights: no file no.pt"),
        ("MINE:build --sparsity .999 --criterion MP", "leaves none of the 300 prunable weights"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    command, mine, tmp_path, arguments, expected
):
    close = mine[:-1] + ("x" if mine[-1] != "x" else "y")
    words = arguments.replace("MINE", mine).replace("MINX", close).split()
    answer = command("prune", *words)
    assert expected.replace("MINE", mine) in said(answer)
    assert not (tmp_path / "pruned").exists()


def test_a_module_that_fails_or_exits_when_imported(command, tmp_path):
    for text, what in (
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named"),
        ("raise SystemExit('usage: train.py')", "SystemExit: usage: train.py"),
        ("def build(:", "SyntaxError"),
    ):
        (tmp_path / "failing_module.py").write_text(text)
        answer = said(command("prune", "failing_module:build", "--sparsity", 0.5))
        assert f"importing it raised {what}" in answer
        (tmp_path / "failing_module.py").unlink()


@pytest.mark.parametrize(
    ("spoilt", "raised"),
    [
        ("return Net()", "raise SystemExit(7)"),
        ("return self.second(torch.tanh(self.first(x)))", "raise SystemExit(7)"),
        ("return self.second(torch.tanh(self.first(x)))", "raise BaseException(7)"),
        ("return self.second(torch.tanh(self.first(x)))", "raise GeneratorExit(7)"),
        ("yield from batches()", "raise SystemExit(7)"),
        ("yield from batches()", "raise GeneratorExit(7)"),
        ('return model(batch["x"]), batch["y"]', "raise KeyError(7)"),
        ('return model(batch["x"]), batch["y"]', "raise StopIteration(7)"),
    ],
)
def test_whatever_a_users_code_raises_is_told_with_its_place(
    command, mine, tmp_path, spoilt, raised
):
    """The exit status is ours, and nothing is written."""
    file = tmp_path / f"{mine}.py"
    text = file.read_text().replace(spoilt, raised)
    file.write_text(text)
    line = text[: text.index(raised)].count("\n") + 1
    data = ("--data", f"{mine}:generated")
    if "batch[" in spoilt:
        data = ("--data", f"{mine}:pairs", "--forward", f"{mine}:forward")
    answer = said(command("prune", f"{mine}:build", "--sparsity", 0.5, *data))
    kind = "StopIteration" if "Stop" in raised else raised[6:-3]
    assert f"{kind}" in answer
    assert f"({file}, line {line}; --debug shows more)" in answer
    assert not (tmp_path / "pruned").exists()


def test_what_a_users_code_does_to_the_working_folder_moves_nothing(command, mine, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / f"{mine}.py"
    moving = "import os; os.chdir('elsewhere'); print('moved'); return Net()"
    file.write_text(file.read_text().replace("return Net()", moving))
    torch.save(nn_state(), tmp_path / "start.pt")
    flags = ("--sparsity", 0.5, "--criterion", "MP", "--weights", "start.pt")
    assert command("prune", f"{mine}:build", *flags).status == 0
    assert (tmp_path / "pruned" / "record.json").is_file()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def nn_state() -> dict[str, torch.Tensor]:
    shapes = {"first.weight": (20, 12), "first.bias": (20,), "second.weight": (3, 20)}
    return {name: torch.ones(shape) for name, shape in {**shapes, "second.bias": (3,)}.items()}


def test_debug_shows_the_users_own_traceback(command, mine, capfd):
    assert main(["prune", f"{mine}:broken", "--sparsity", "0.5", "--debug"]) == 2
    told = capfd.readouterr().err
    assert "in broken" in told
    assert "KeyError: 'no such layer'" in told


def test_what_is_there_is_not_overwritten_unasked(command, mine, tmp_path):
    flags = ("prune", f"{mine}:build", "--criterion", "MP")
    assert command(*flags, "--sparsity", 0.5).status == 0
    before = (tmp_path / "pruned" / "mask.safetensors").read_bytes()
    assert "holds an earlier result: --overwrite" in said(command(*flags, "--sparsity", 0.8))
    assert (tmp_path / "pruned" / "mask.safetensors").read_bytes() == before
    assert command(*flags, "--sparsity", 0.8, "--overwrite").status == 0
    assert lossprune.Mask.load(tmp_path / "pruned" / "mask.safetensors").removed == 240
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "record.json").write_text("{}")
    for extra in ((), ("--overwrite",)):
        answer = command(*flags, "--sparsity", 0.8, "--out", "thesis", *extra)
        assert "--out thesis holds other files (record.json)" in said(answer)
    (tmp_path / "file").write_text("")
    answer = command(*flags, "--sparsity", 0.8, "--out", "file")
    assert said(answer) == "--out file is a file; give a folder"


def test_a_network_without_anything_to_prune(command, tmp_path):
    (tmp_path / "empty_network.py").write_text("from torch import nn\nbuild = nn.ReLU\n")
    answer = command("prune", "empty_network:build", "--criterion", "MP", "--sparsity", 0.5)
    assert "nothing to prune" in said(answer)
    sys.modules.pop("empty_network", None)
