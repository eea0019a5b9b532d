"""The command line as a person meets it: help, progress, and one sentence for every mistake."""

import json
import os
import pickle
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

from lossprune.cli import COMMANDS, main
from lossprune.data import DATASETS
from lossprune.experiment.network_file import network_bytes
from lossprune.networks import NETWORKS
from lossprune.pruning import CRITERIA

DIGITS = ("run", "--arch", "MLP", "--dataset", "digits", "--threads", "1")
QUICK = (*DIGITS, "--nepochs", "2", "--pe", "-1")


def sentence(answer) -> str:
    """The one line on standard error of a refused command."""
    assert answer.status == 2
    assert answer.out == ""
    lines = [line for line in answer.err.splitlines() if not line.startswith("folder: ")]
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 500
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--pr -0.1", "--pr must be a number in [0, 1), got -0.1"),
        ("--pr 1", "--pr must be a number in [0, 1), got 1.0"),
        ("--pr nan", "--pr must be a number in [0, 1), got nan"),
        ("--pi 0", "--pi must be a whole number from 1 to 1,000,000, got 0"),
        ("--reg -1e-3", "--reg must be a number from 0 to 1e+30, got -0.001"),
        ("--reg nan", "--reg must be a number from 0 to 1e+30, got nan"),
        ("--reg inf", "--reg must be a number from 0 to 1e+30, got inf"),
        ("--nex 0", "--nex must be a whole number of at least 1, got 0"),
        ("--pm WM", f"--pm must be one of {', '.join(CRITERIA)}, or MODULE:NAME of your own, got"),
        ("--dataset minst", f"--dataset must be one of {', '.join(DATASETS)}, or MODULE:FUNCTION "),
        ("--batch_size 0", "--batch_size must be a whole number from 1 to 1,000,000, got 0"),
        ("--image_size 64", "image size (--image_size) is for imagenet, not for digits"),
        ("--pe -2", "--pe must be a whole number from -1 to 1,000,000, got -2"),
        ("--nepochs -1", "--nepochs must be a whole number from 0 to 1,000,000, got -1"),
        ("--lr 0", "--lr must be a number greater than 0, got 0.0"),
        ("--dec nan", "--dec must be a number greater than 0, got nan"),
        ("--dec_every 0", "--dec_every must be a whole number of at least 1, got 0"),
        ("--l2 -1", "--l2 must be a number of at least 0, got -1.0"),
        ("--seed -1", "--seed must be a whole number from 0 to 2**62, got -1"),
        ("--threads 0", "--threads must be a whole number from 1 to "),
        ("--num_workers -1", "--num_workers must be a whole number of at least 0, got -1"),
        ("--device tpu", "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (
            "--pe 5 --nepochs 5",
            "--pe 5 with --nepochs 5: pruning would never happen; --nepochs must be greater "
            "than --pe",
        ),
        ("--pi many", "--pi must be a whole number or auto, got 'many'"),
        ("--pi 1.5", "--pi must be a whole number or auto, got '1.5'"),
        ("--pr lots", "--pr must be a number, got 'lots'"),
        ("--threads two", "--threads must be a whole number, got 'two'"),
        ("--pi", "--pi needs a value"),
        ("--exp=yes", "--exp takes no value, got 'yes'"),
        ("--nepoch 3", "unknown flag --nepoch; did you mean --nepochs?"),
        ("--zzz 3", "unknown flag --zzz; see --help"),
        ("fast", "unexpected argument 'fast': flags begin with --"),
        ("--pr 0.999999", "--pr 0.999999 leaves none of the 50200 prunable weights"),
        # What no machine can do, or would do for ever in silence.
        ("--threads 100000", "--threads must be a whole number from 1 to "),
        ("--pi 1000000000", "--pi must be a whole number from 1 to 1,000,000, got 1000000000"),
        ("--pi 50201", "--pi must be at most 50,200 for 50,200 prunable weights, "),
        (f"--nepochs {10**26}", "--nepochs must be a whole number from 0 to 1,000,000, got 1000"),
        (f"--batch_size {10**26}", "--batch_size must be a whole number from 1 to 1,000,000, got"),
        (f"--seed {2**70}", "--seed must be a whole number from 0 to 2**62, got 1180"),
        ("--reg 1e39", "--reg must be a number from 0 to 1e+30, got 1e+39"),
        ("--image_size 65536", "--image_size must be a whole number from 0 to 65,535, got 65536"),
        (
            "--estimator monte-carlo:1000000000",
            "--estimator monte-carlo:1000000000: estimator 'monte-carlo' does not take the value "
            "'1000000000': labels must be a whole number from 1 to 10,000, got 1000000000",
        ),
        (
            f"--pi {'9' * 5000}",
            "--pi must be a whole number or auto, got '9999",
        ),
    ],
)
def test_a_wrong_flag_is_answered_by_one_sentence_and_nothing_is_written(
    command, tmp_path, flags, said
):
    assert sentence(command(*DIGITS, *flags.split())).startswith(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("demo --threads 100000", "--threads must be a whole number from 1 to "),
        ("data digits --seed 1180591620717411303424", "--seed must be a whole number from 0 to "),
        ("data imagenet --image_size 1000000000", "--image_size must be a whole number from 0 to"),
        ("report . --epochs 1000000001", "--epochs must be a whole number from 1 to 1,000,000, "),
        ("report . --embed_mb 1e308", "--embed_mb must be a number from 0 to 1,000, got 1e+308"),
        ("deploy . --seconds 1e300", "--seconds must be a number greater than 0, at most 3,600, "),
        ("deploy . --batch 1,1000000000", "--batch must be whole numbers from 1 to 65,536, such "),
        (f"deploy . --batch {'9' * 5000}", "--batch must be whole numbers from 1 to 65,536, such "),
        ("deploy . --threads 100000", "--threads must be a whole number from 1 to "),
        ("prune m:b --sparsity .5 --threads 100000", "--threads must be a whole number from 1 to "),
        ("prune m:b --sparsity .5 --stages 1000001", "--stages must be a whole number from 1 to "),
        ("prune m:b --sparsity .5 --reg 1e39", "--reg must be a number from 0 to 1e+30, got "),
        ("sweep mlp-mnist --workers 100000", "--workers must be a whole number from 1 to "),
        ("sweep mlp-mnist --threads 100000", "--threads must be a whole number from 1 to "),
        (f"sweep mlp-mnist --stack {'9' * 5000}", "--stack must be auto or a whole number from 1 "),
        ("sweep mlp-mnist --cpus_per_run 1e9", "--cpus_per_run must be a number from 0 to 1,024"),
        (f"sweep mlp-mnist --seeds {'9' * 5000}", "--seeds must be whole numbers, such as 1111,1"),
        (f"sweep mlp-mnist --set pi={10**9}", "mlp-mnist: --pi must be a whole number from 1 to"),
    ],
)
def test_a_number_beyond_all_sense_is_refused_at_once(command, tmp_path, words, said):
    assert sentence(command(*words.split())).startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_whoever_reads_the_output_may_stop(tmp_path):
    """As `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "lossprune", "--help"]
    ended = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ended.stderr == ""


def test_an_unknown_network_is_answered_with_the_nearest(command, tmp_path):
    said = sentence(command("run", "--arch", "VGG-11"))
    assert said.startswith(f"--arch must be one of {', '.join(NETWORKS)}")
    assert said.endswith("got 'VGG-11'; did you mean VGG11?")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none(command, tmp_path):
    said = sentence(command(*DIGITS, "--device", "cuda"))
    assert said == "--device cuda: there is no CUDA device here; use --device cpu"
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_the_images_do_not_fit(command, tmp_path):
    said = sentence(command("run", "--arch", "VGG11", "--dataset", "digits"))
    assert "VGG11" in said or "VGG" in said
    assert list(tmp_path.iterdir()) == []


class Recorder:
    """What a pickled network might do when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def model_0(command, path) -> str:
    return sentence(command(*DIGITS, "--model_0", path, "--path", "results"))


@pytest.fixture
def good() -> dict[str, torch.Tensor]:
    return dict(NETWORKS["MLP"](shape=(1, 8, 8)).state_dict())


def test_a_missing_start_network(command, tmp_path):
    assert model_0(command, "none.pt") == "--model_0: no file none.pt"
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_start_network(command, good, tmp_path):
    torch.save(good, tmp_path / "whole.pt")
    contents = (tmp_path / "whole.pt").read_bytes()
    for size in (0, 1, 100, len(contents) // 2, len(contents) - 1):
        (tmp_path / "half.pt").write_bytes(contents[:size])
        said = model_0(command, "half.pt")
        assert said == "--model_0: half.pt is truncated or not a network saved by torch"
    assert not (tmp_path / "results").exists()


def test_a_start_network_that_is_something_else(command, tmp_path):
    (tmp_path / "text.pt").write_text("once upon a time")
    said = model_0(command, "text.pt")
    assert said == "--model_0: text.pt is truncated or not a network saved by torch"
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "dictionary.pt")
    assert model_0(command, "dictionary.pt").endswith("it holds a dictionary with 'epoch', 'loss'")
    torch.save([1, 2], tmp_path / "list.pt")
    assert model_0(command, "list.pt").endswith("it holds an object of type list")
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    assert "x.safetensors is truncated or not safetensors" in model_0(command, "x.safetensors")
    assert model_0(command, tmp_path).startswith(f"--model_0: {tmp_path} is a folder")
    assert not (tmp_path / "results").exists()


def test_a_start_network_of_another_architecture(command, good, tmp_path):
    metadata = {"architecture": "VGG11"}
    torch.save({"state_dict": good, "metadata": metadata}, tmp_path / "vgg.pt")
    assert model_0(command, "vgg.pt") == "--model_0: vgg.pt holds a VGG11, but --arch is MLP"
    for name, change, said in (
        ("lacks", {"fc2.bias": None}, "it lacks 'fc2.bias'"),
        ("more", {"fc9.bias": torch.zeros(2)}, "it has 'fc9.bias', which the network lacks"),
        (
            "shape",
            {"fc1.weight": torch.zeros(300, 784)},
            "'fc1.weight' has shape (300, 784), the network (300, 64)",
        ),
        (
            "nan",
            {"fc1.bias": torch.full((300,), torch.nan)},
            "'fc1.bias' holds values that are not finite",
        ),
    ):
        changed = {key: value for key, value in {**good, **change}.items() if value is not None}
        torch.save(changed, tmp_path / f"{name}.pt")
        expected = f"--model_0: {name}.pt does not hold this MLP: {said}"
        assert model_0(command, f"{name}.pt") == expected
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickled_module_is_refused_with_the_way_to_convert_it(command, tmp_path, zipped):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt", _use_new_zipfile_serialization=zipped)
    said = model_0(command, "module.pt")
    assert "module.pt holds pickled objects (torch.nn.modules.linear.Linear" in said
    assert "weights_only=False).state_dict(), 'new.pt')" in said
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_no_code_of_a_start_network_is_run(command, tmp_path, how):
    if how == "torch":
        torch.save({"fc1.weight": Recorder()}, tmp_path / "evil.pt")
    else:
        (tmp_path / "evil.pt").write_bytes(pickle.dumps(Recorder()))
    said = model_0(command, "evil.pt")
    assert "holds pickled objects (" in said
    assert "pathlib.Path" in said
    assert not (tmp_path / "executed").exists()


def test_a_plain_state_dict_and_safetensors_are_welcome(command, good, tmp_path):
    from safetensors.torch import save_file

    torch.save(good, tmp_path / "plain.pt")
    save_file(good, tmp_path / "plain.safetensors")
    for name in ("plain.pt", "plain.safetensors"):
        flags = ("--model_0", name, "--pe", "0", "--nepochs", "0", "--path", name + ".results")
        assert command(*DIGITS, *flags).status == 0


def test_names_with_a_wrapper_in_front_are_those_of_the_network(command, good, tmp_path):
    torch.save({f"module.{name}": weight for name, weight in good.items()}, tmp_path / "ddp.pt")
    assert command(*DIGITS, "--model_0", "ddp.pt", "--pe", "0", "--nepochs", "0").status == 0


def test_a_folder_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("")
    said = sentence(command(*QUICK, "--path", "file"))
    assert said.startswith("cannot use file/arch=MLP,dataset=digits,")


def test_divergence_exits_3_and_is_told_again(command):
    first = command(*QUICK, "--lr", "1e30")
    assert first.status == 3
    assert first.err.splitlines()[-1].startswith("diverged: epoch 1")
    again = command(*QUICK, "--lr", "1e30")
    assert again.status == 3
    assert again.out == "Experiment already exists!\n"


def test_a_finished_run_says_so_and_is_not_touched(command, tmp_path):
    first = command(*QUICK)
    assert (first.status, first.out) == (0, "")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = command(*QUICK)
    assert (again.status, again.out) == (0, "Experiment already exists!\n")
    folder = next((tmp_path / "results").iterdir())
    error = json.loads((folder / "record.json").read_text())["best"]["scores"]["test_error"]
    assert again.err.startswith(f"finished on {time.strftime('%Y-')}")
    assert again.err.endswith(f", test error {error:.2%}: results/{folder.name}\n")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_finished_run_from_another_start_network_says_so(command, good, tmp_path):
    torch.save(good, tmp_path / "one.pt")
    torch.save({**good, "fc1.bias": torch.ones(300)}, tmp_path / "other.pt")
    flags = (*DIGITS, "--nepochs", "0")
    assert command(*flags, "--model_0", "one.pt").status == 0
    again = command(*flags, "--model_0", "other.pt")
    assert again.out == ""
    said = sentence(again)
    assert "began from another start network (one.pt) than --model_0 other.pt; give --path" in said
    # Other bytes, the same weights.
    (tmp_path / "copy.pt").write_bytes(network_bytes(good, {}))
    for same in ("one.pt", "copy.pt", "gone.pt"):
        assert command(*flags, "--model_0", same).out == "Experiment already exists!\n"


def test_progress_is_plain_lines_on_standard_error_when_piped(command):
    flags = shlex.split("--nepochs 2 --pe 1 --pi 2 --exp --pm LM --nex 100")
    answer = command(*DIGITS, *flags)
    assert answer.out == ""
    told = [line.split(":")[0] for line in answer.err.splitlines()]
    assert told == [
        "folder",
        "start",
        "epoch 1/2",
        "stage 1/2",
        "stage 2/2",
        "training",
        "pruned",
        "epoch 2/2",
        "finished in " + told[8].split()[2] + " s",
        "pruned 47,991 of 50,200 weights (sparsity 0.95600)",
        "best epoch 2",
    ]
    assert "\x1b" not in answer.err


def test_torchrun_is_told_what_was_wrong(command, monkeypatch, tmp_path):
    """In the file where it looks for the message of its report, as its documentation says."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    said = sentence(command(*DIGITS, "--pr", "2"))
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == said


def test_the_traceback_is_shown_with_debug_only(command):
    assert "Traceback" not in command(*DIGITS, "--pi", "0").err
    told = command(*DIGITS, "--pi", "0", "--debug").err
    assert "Traceback" in told
    assert told.splitlines()[-1].startswith("error: --pi must be")


def test_an_interrupt_is_one_line_and_the_run_goes_on(tmp_path):
    flags = (*DIGITS, "--nepochs", "400", "--pe", "-1", "--path", str(tmp_path))
    program = [sys.executable, "-m", "lossprune", *flags]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.startswith("epoch 2/400") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stderr if not line.startswith("epoch")]
        assert rest == ["interrupted: the same command goes on from there\n"]
        assert process.wait(30) == 130
    (folder,) = tmp_path.iterdir()
    assert (folder / "checkpoint.pt").exists()
    assert not (folder / ".holder.json").exists()


def test_alone_it_says_what_there_is(command):
    answer = command()
    assert (answer.status, answer.err) == (0, "")
    for word in ("run", "prune", "sensitivity", "deploy", "data", "demo"):
        assert re.search(rf"^  {word} ", answer.out, re.MULTILINE)


def test_the_version_is_that_of_the_package(command):
    answer = command("--version")
    assert (answer.status, answer.out) == (0, f"lossprune {version('lossprune')}\n")


def test_the_package_is_a_program_of_the_same_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/lossprune/__main__.py", "run", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lossprune", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: lossprune run ")


def test_a_wrong_command_is_answered_with_the_nearest(command):
    said = sentence(command("rum"))
    known = ", ".join(COMMANDS)
    assert said.startswith(f"unknown command 'rum': it must be one of {known}")
    assert said.endswith("; did you mean run?")


def test_help_names_every_flag_in_its_published_spelling(command):
    answer = command("run", "--help")
    assert answer.status == 0
    published = (
        "pr pm pi pe reg nex exp arch model_0 lr dec dec_every l2 path data_path num_workers "
        "nepochs seed dataset device threads mirror debug"
    )
    for flag in published.split():
        assert re.search(rf"--{flag}\b", answer.out), flag


def test_help_and_a_finished_run_do_not_wait_for_torch(tmp_path):
    assert main([*QUICK, "--path", str(tmp_path)]) == 0
    for flags in (("--help",), (*QUICK[1:], "--path", str(tmp_path)), ("--pr", "2")):
        program = (
            "import sys; from lossprune.cli import main; "
            f"main(['run', *{flags!r}]); assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_data_are_described(command, mnist_path):
    listed = command("data")
    assert [line.split()[0] for line in listed.out.splitlines()] == list(DATASETS)
    assert command("data", "digits").out.splitlines() == [
        "name       digits",
        "images     1 × 8 × 8 (channels × height × width)",
        "train      1,297 examples",
        "valid      250 examples",
        "test       250 examples",
        "classes    10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        "mean       0.3051",
        "std        0.3758",
        "training   no augmentation",
    ]
    mnist = command("data", "mnist", "--data_path", mnist_path)
    assert "train      50,000 examples" in mnist.out
    assert "'mnits'" in sentence(command("data", "mnits"))


def test_the_folder_of_the_data_can_be_named_in_the_environment(tmp_path):
    environment = {**os.environ, "LOSSPRUNE_DATA": str(tmp_path / "mine")}
    answer = subprocess.run(
        [sys.executable, "-m", "lossprune", "run", "--arch", "MLP", "--dataset", "folder"],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2
    assert f"path (--data_path) {tmp_path / 'mine'} does not exist" in answer.stderr
