"""``lossprune deploy`` on a finished run."""

import json
import shutil
import sys

import pytest
import torch

import lossprune
from lossprune.deployment.onnx import OnnxNetwork
from lossprune.experiment import RunConfig, run
from lossprune.networks import NETWORKS

ALONE = ("--engines", "none")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the MLP on the bundled digits, and its record."""
    config = RunConfig(
        arch="MLP",
        dataset="digits",
        criterion="QM",
        stages=3,
        exponential=True,
        sparsity=0.95,
        examples=200,
        epochs=3,
        prune_epoch=2,
        threads=1,
        path=tmp_path_factory.mktemp("results"),
    )
    return config, run(config)


def refused(answer) -> str:
    assert answer.status == 2
    assert answer.out == ""
    return answer.err.splitlines()[-1].removeprefix("error: ")


def test_every_form_is_written_measured_and_as_accurate_as_the_run(finished, command, tmp_path):
    config, record = finished
    flags = ("--out", "out", "--seconds", 0.05, "--batch", "1,20", "--threads", 1)
    flags += ALONE
    answer = command("deploy", config.folder, *flags, "--c", "digits", "--lanes", 8)
    assert answer.status == 0, answer.err
    assert "#define DIGITS_BATCH 20 " in (tmp_path / "digits" / "digits.h").read_text()
    assert "#define LANES 8\n" in (tmp_path / "digits" / "digits.c").read_text()
    assert "written in digits:\n  CMakeLists.txt " in answer.out
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "mask.safetensors",
        "network.onnx",
        "network.safetensors",
        "record.json",
        "table.md",
    ]
    written = json.loads((out / "record.json").read_text())
    forms = {form["name"]: form for form in written["forms"]}
    assert list(forms) == [
        "dense",
        "masked",
        "compacted",
        "deployed for 1",
        "deployed for 20",
        "ONNX",
    ]
    assert written["left_out"] == {}

    mask = lossprune.Mask.load(out / "mask.safetensors")
    assert mask == lossprune.Mask.load(config.folder / "mask.safetensors")
    network = NETWORKS["MLP"](shape=(1, 8, 8))
    assert lossprune.load_sparse(out / "network.safetensors", network) == mask
    best = torch.load(config.folder / "best_model.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(best[name], tensor) for name, tensor in network.state_dict().items())

    assert forms["dense"]["accuracy"] == 1 - record.before_pruning.scores.test_error
    for name, form in forms.items():
        if name != "dense":  # 250 images: rounding may turn one that is at a tie
            assert form["accuracy"] == pytest.approx(1 - record.best.scores.test_error, abs=0.0041)
        assert list(form["latency"]) == ["1", "20"]
        for timing in form["latency"].values():
            assert 0 < timing["low"] <= timing["median"] <= timing["high"]
            assert timing["count"] >= 20
    weights = 64 * 300 + 300 * 100 + 100 * 10
    nonzeros = sum(int(tensor.count_nonzero()) for tensor in best.values())
    assert forms["dense"]["parameters"] == forms["dense"]["nonzeros"] == weights + 410
    assert forms["dense"]["multiply_adds"] == forms["masked"]["multiply_adds"] == weights
    assert forms["masked"]["nonzeros"] == nonzeros
    assert forms["compacted"]["parameters"] < weights + 410
    assert forms["deployed for 1"]["multiply_adds"] <= weights - mask.removed
    assert forms["dense"]["size"] > 4 * weights
    assert (
        forms["masked"]["size"] == (out / "network.safetensors").stat().st_size < 4 * weights / 10
    )
    assert forms["ONNX"]["size"] == (out / "network.onnx").stat().st_size

    table = {line.split("  ")[0]: line for line in answer.out.splitlines()}
    for name in forms:
        assert f"{forms[name]['nonzeros']:,}" in table[name]
        assert f"{forms[name]['accuracy']:.2%}" in table[name]
    markdown = (out / "table.md").read_text()
    assert all(f"| {name} |" in markdown for name in forms)

    more = (*flags[2:], "--out", "more")
    again = command("deploy", config.folder, *more, "--c", "digits")
    assert refused(again) == "--c: digits holds a C library: overwrite it, or give another folder"
    assert not (tmp_path / "more").exists()
    again = command("deploy", config.folder, *more, "--c", "c", "--lanes", 5)
    assert refused(again) == "--lanes must be one of 4, 8, 16, got '5'"
    again = command("deploy", config.folder, *flags)
    assert "holds an earlier result: --overwrite replaces it" in refused(again)


def test_what_is_no_finished_pruning_is_refused(finished, command, tmp_path):
    config, _ = finished
    assert refused(command("deploy")).startswith("deploy takes RUN_FOLDER")
    assert refused(command("deploy", "none")) == "no run folder none"
    (tmp_path / "empty").mkdir()
    assert "empty is not the folder of a run" in refused(command("deploy", "empty"))

    shutil.copytree(config.folder, tmp_path / "run")
    (tmp_path / "run" / "mask.safetensors").unlink()
    assert refused(command("deploy", "run")) == "run lacks mask.safetensors"
    for change, told in (
        ({"status": "running"}, "the run in run is not finished"),
        ({"status": "diverged", "message": "epoch 1"}, "the run in run diverged: epoch 1"),
        ({"after_pruning": None}, "the run in run did not prune"),
    ):
        record = json.loads((config.folder / "record.json").read_text())
        del record["sha256"]
        (tmp_path / "run" / "record.json").write_text(json.dumps({**record, **change}))
        assert refused(command("deploy", "run")).startswith(told)
    shutil.copytree(config.folder, tmp_path / "cut")
    contents = (tmp_path / "cut" / "best_model.pt").read_bytes()
    (tmp_path / "cut" / "best_model.pt").write_bytes(contents[:5000])
    assert "best_model.pt is truncated" in refused(command("deploy", "cut", "--out", "there"))


def test_weights_that_float16_takes_for_zero_are_counted_in_the_notes(finished, command, tmp_path):
    config, _ = finished
    shutil.copytree(config.folder, tmp_path / "run")
    best = torch.load(tmp_path / "run" / "best_model.pt", weights_only=True)
    weight = best["state_dict"]["fc2.weight"]
    small = weight.abs() <= weight[weight != 0].abs().quantile(0.25)
    count = int((small & (weight != 0)).sum())
    weight[small] *= 1e-9
    torch.save(best, tmp_path / "run" / "best_model.pt")
    flags = ("--out", "out", "--seconds", 0.01, "--batch", "1", "--values", "float16")
    flags += ALONE
    answer = command("deploy", "run", *flags)
    assert answer.status == 0, answer.err
    total = lossprune.Mask.load(tmp_path / "run" / "mask.safetensors")
    kept = total.total - total.removed
    told = f"{count} of {kept:,} kept weights are 0 in float16, as they are below 3e-8: "
    told += f"{count} of 'fc2.weight'"
    assert told in answer.out.splitlines()
    assert told in (tmp_path / "out" / "table.md").read_text()
    assert json.loads((tmp_path / "out" / "record.json").read_text())["rounding"] == [told]


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(self, x, scale=None):
        x = torch.tanh(self.first(x))
        return self.second(x if scale is None else x * scale)

build = Net

def batches():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    return [{"x": x, "labels": torch.arange(8) % 3}]

def load():
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(60) % 3
    inputs = torch.randn(60, 6, generator=generator) + 2 * torch.eye(6)[labels]
    return (inputs[:40], labels[:40]), (inputs[40:], labels[40:])

def others():
    yield {"x": torch.randn(3, 6), "labels": None}

def pairs():
    return [(torch.randn(8, 6), torch.arange(8) % 3)]

def forward(model, batch):
    return model(batch["x"], scale=2), batch["labels"]
"""


@pytest.mark.parametrize(
    ("data", "more", "exported"),
    [("pairs", (), True), ("batches", ("--forward", "own:forward"), False)],
)
def test_what_prune_wrote_is_deployed(data, more, exported, command, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    flags = ("--data", f"own:{data}", *more)
    assert command("prune", "own:build", "--sparsity", 0.8, "--stages", 2, *flags).status == 0
    flags = ("--seconds", 0.02, "--batch", "1,20", "--threads", 1, *ALONE)
    answer = command("deploy", "pruned", *flags)
    assert answer.status == 0, answer.err
    written = json.loads((tmp_path / "deployed" / "record.json").read_text())
    names = ["dense", "masked", "compacted", "deployed for 1", "deployed for 20"]
    assert [form["name"] for form in written["forms"]] == names + ["ONNX"] * exported
    assert list(written["left_out"]) == ["ONNX"] * (not exported)
    assert all(form["accuracy"] is None for form in written["forms"])
    assert written["run"]["build"] == "own:build"
    title, head, *_ = answer.out.splitlines()
    assert title == "own:build, QM, sparsity 0.80000"
    assert "accuracy" not in head
    network, pruned = (sys.modules["own"].build() for _ in range(2))
    mask = lossprune.load_sparse(tmp_path / "deployed" / "network.safetensors", network)
    assert mask == lossprune.load_sparse(tmp_path / "pruned" / "network.safetensors", pruned)
    assert all(map(torch.equal, network.parameters(), pruned.parameters()))

    def told(name, contents=None):
        """What is said of the folder when one of its files is another, or missing."""
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        shutil.copytree(tmp_path / "pruned", tmp_path / "changed")
        (tmp_path / "changed" / name).unlink()
        if contents is not None:
            (tmp_path / "changed" / name).write_text(json.dumps(contents))
        return refused(command("deploy", "changed", "--out", "not"))

    assert told("mask.safetensors") == "changed lacks mask.safetensors"
    record = json.loads((tmp_path / "pruned" / "record.json").read_text())
    lacking = {**record, "settings": {"build": 3}}
    assert told("record.json", lacking).endswith("does not tell how lossprune prune was called")
    lacking = {**record, "settings": {**record["settings"], "data": None}}
    assert told("record.json", lacking).startswith("changed was pruned without data, and a network")
    lacking = {**record, "settings": {**record["settings"], "build": "gone_away:build"}}
    assert "gone_away:build: no module 'gone_away'" in told("record.json", lacking)
    other = lossprune.Mask.dense(network)
    other.save(tmp_path / "pruned" / "mask.safetensors")
    assert refused(command("deploy", "pruned", "--out", "not")) == (
        "pruned/mask.safetensors is not the mask of pruned/network.safetensors"
    )
    assert not (tmp_path / "not").exists()


def test_a_network_pruned_without_data_is_tested_and_deployed_on_others(
    command, tmp_path, monkeypatch
):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    flags = ("own:build", "--criterion", "MP", "--sparsity", 0.5)
    tested = ("--test", "own:batches", "--forward", "own:forward")
    assert command("prune", *flags, *tested).status == 0
    flags = ("--seconds", 0.01, "--batch", 2, "--data", "own:others")
    answer = command("deploy", "pruned", *flags, "--engines", "openvino")
    assert answer.status == 0, answer.err
    assert "left out: openvino: it is not installed here; --peers names another" in answer.out
    assert "lossprune  " in answer.out  # beside torch alone
    run = json.loads((tmp_path / "deployed" / "record.json").read_text())["run"]
    assert (run["data"], run["test"]) == ("own:others", "own:batches")
    scores = json.loads((tmp_path / "pruned" / "record.json").read_text())["test"]
    forms = json.loads((tmp_path / "deployed" / "record.json").read_text())["forms"]
    accuracy = {form["name"]: form["accuracy"] for form in forms}
    assert accuracy.pop("dense") == 1 - scores["before"]["error"]
    assert {*accuracy.values()} == {1 - scores["after"]["error"]}


def test_pruned_fine_tuned_and_exported_from_the_shell(command, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    data = ("--dataset", "own:load")
    assert command("prune", "own:build", *data, "--sparsity", 0.5, "--stages", 2).status == 0
    start = ("--model_0", "pruned/network.safetensors")
    answer = command("run", "--arch", "own:build", *data, "--nepochs", 1, "--pe", -1, *start)
    assert answer.status == 0, answer.err
    (run,) = (tmp_path / "results").iterdir()
    answer = command("deploy", run, "--seconds", 0.01, "--batch", 2, *ALONE)
    assert answer.status == 0, answer.err
    assert "the record does not tell that before pruning" in answer.out
    network = sys.modules["own"].build().eval()
    mask = lossprune.load_sparse(tmp_path / "deployed" / "network.safetensors", network)
    assert mask.sparsity == 0.5
    tuned = torch.load(run / "best_model.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(tuned[name], it) for name, it in network.state_dict().items())
    images, labels = sys.modules["own"].load()[1]
    exported = OnnxNetwork(tmp_path / "deployed" / "network.onnx")
    with torch.no_grad():
        assert torch.allclose(exported(images), network(images), rtol=0, atol=1e-5)
        accuracy = float((network(images).argmax(1) == labels).double().mean())
    forms = json.loads((tmp_path / "deployed" / "record.json").read_text())["forms"]
    assert forms[0]["accuracy"] is None
    assert [form["accuracy"] for form in forms[1:]] == [pytest.approx(accuracy)] * 4


PEER = f"""#!{sys.executable}
import sys
if sys.argv[2] == "deepsparse":
    sys.exit("ModuleNotFoundError: No module named 'deepsparse'")
print('{{"version": "1"}}', flush=True)
for line in sys.stdin:
    ready = '{{"ready_processor_s": 0, "first_call_s": 1, "memory_mib": 0, "difference": 0.5}}'
    print(ready if line.startswith("ready") else "[0.125]", flush=True)
"""


def test_other_engines_are_timed_beside_where_they_are_there_and_right(finished, command, tmp_path):
    peer = tmp_path / "python"
    peer.write_text(PEER)
    peer.chmod(0o755)
    flags = ("--seconds", 0.02, "--batch", "1,4", "--threads", 1, "--values", "float16")
    answer = command("deploy", finished[0].folder, *flags, "--peers", peer)
    assert answer.status == 0, answer.err
    _, beside = answer.out.split("beside other engines\n")
    lines = {line.split("  ")[0]: line for line in beside.splitlines()}
    ours = ["torch dense", "torch masked", "torch compacted", "lossprune"]
    names = [*ours, "onnxruntime", "openvino (wrong)"]
    assert list(lines)[1:7] == names
    assert lines["openvino (wrong)"].split()[2:6] == ["125", "125", "32", "1e+03"]
    assert "left out: deepsparse: it is not installed" in lines
    assert "wrong: openvino: its outputs are not torch's" in lines
    out = tmp_path / "deployed"
    record = json.loads((out / "record.json").read_text())
    engines = {engine["name"]: engine for engine in record["engines"]}
    assert [engine["wrong"] for engine in record["engines"]] == [*[False] * 5, True]
    assert engines["onnxruntime"]["batches"]["4"]["difference"] < 1e-5
    assert engines["lossprune"]["size"] == (out / "network.safetensors").stat().st_size
    for engine in record["engines"][:5]:
        for told in engine["batches"].values():
            assert 0 < told["latency"]["median"] < 0.1
            assert 0 < told["first_call_s"] < 1
    assert all(f"| {name} |" in (out / "table.md").read_text() for name in names)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--batch 0", "--batch must be whole numbers from 1 to 65,536, such as 1,100, got '0'"),
        ("--batch one", "--batch must be whole numbers from 1 to 65,536, such as 1,100, got 'one'"),
        ("--seconds 0", "--seconds must be a number greater than 0, at most 3,600, got 0.0"),
        ("--values int8", "--values must be one of exact, float16, got 'int8'"),
        ("--engines torch", "--engines must be all, none, or names of onnxruntime, openvino, deep"),
        ("--peers no/python", "--peers must be the Python of an environment, such as env/bin/p"),
        ("--threads 0", "--threads must be a whole number from 1 to "),
    ],
)
def test_wrong_flags(finished, command, tmp_path, flags, told):
    assert refused(command("deploy", finished[0].folder, *flags.split())).startswith(told)
    assert list(tmp_path.iterdir()) == []
