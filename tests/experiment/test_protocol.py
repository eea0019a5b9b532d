"""The README's three protocol loops, verbatim (``protocol/*.sh``), through bash."""

import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lossprune.experiment import RunConfig
from lossprune.experiment.record import RunRecord
from lossprune.flags import parse
from lossprune.sweep import PLANS, read_plan

LOOPS = {path.stem: path for path in (Path(__file__).parent / "protocol").glob("*.sh")}
LAMBDAS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
SEEDS = (1111, 1112, 1113, 1114, 1115)
SEEDS_PLACE = "9999"  # in a command that is read for all of them


def bash_in(folder: Path, python: str) -> tuple[list[str], dict[str, str]]:
    """The start of a bash command, and an environment where ``python`` is the given script."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "python").write_text(f"#!/bin/bash\n{python}\n")
    (programs / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    return ["bash", "-e", "-c"], environment


def bash(script: str, folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder where ``python`` is the given shell script."""
    program, environment = bash_in(folder, python)
    return subprocess.run(
        [*program, script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def read(calls: list[list[str]]) -> list[RunConfig]:
    """Parse the commands, each once for all of the seeds that it is given for."""
    parsed: dict[str, RunConfig] = {}
    configs = []
    for call in calls:
        text = " ".join(call)
        seed = re.findall(r"--seed (\d+)", text)[-1]
        common = text.replace(seed, SEEDS_PLACE)
        if common not in parsed:
            parsed[common] = parse(RunConfig, common.split()[1:])
        config = parsed[common]
        start = config.start and Path(str(config.start).replace(SEEDS_PLACE, seed))
        configs.append(replace(config, seed=int(seed), start=start))
    return configs


@pytest.mark.parametrize("name", PLANS)
def test_every_command_of_the_loops_is_one_run_of_the_bundled_plan(name, tmp_path):
    """All 415 commands, as bash expands them: parsed, named, and linked to their baselines."""
    noting = 'python() { printf "%s\\n" "$*" >> calls; }\n'
    loop = LOOPS[name.split("-")[0]].read_text()
    subprocess.run(["bash", "-e", "-c", noting + loop], cwd=tmp_path, check=True)
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == 415
    assert all(call[0] == "experiments.py" for call in calls)
    configs = read(calls)
    assert len({config.folder for config in configs}) == 415
    baselines = {config.seed: config for config in configs if not config.prunes}
    assert sorted(baselines) == list(SEEDS)
    assert all(config.start is None for config in baselines.values())
    pruning = [config for config in configs if config.prunes]
    for config in pruning:
        assert config.start == baselines[config.seed].folder / "best_model.pt"
        assert config.path == Path("results")
        assert config.prune_epoch == 0
    assert {
        (config.seed, config.criterion, config.stages, config.reg, config.exponential)
        for config in pruning
    } == {(seed, "MP", 1, 0.0, False) for seed in SEEDS} | {
        (seed, criterion, stages, reg, True)
        for seed in SEEDS
        for criterion in ("LM", "QM", "OBD")
        for stages in (1, 14, 140)
        for reg in LAMBDAS
    }
    runs = read_plan(name).expand()
    assert [run.config for run in runs[:5]] == configs[:5]
    assert len(runs) == 415
    assert {run.config for run in runs} == set(configs)
    for run in runs[5:]:
        assert run.baseline is not None
        assert run.config.start == run.baseline.folder / "best_model.pt"


def shortened(loop: str, data_path: Path, more: str = "", **lists: str) -> str:
    """One epoch, with ``--data_path`` and ``more`` flags, and only some turns of the loops."""
    loop = re.sub(r"nepochs([ =])\d+", r"nepochs\g<1>1", loop)
    loop = loop.replace("--path $OUT_DIR", f"--path $OUT_DIR --data_path '{data_path}' {more}")
    for name, values in lists.items():
        loop = re.sub(rf"for {name} in [^;]*;", f"for {name} in {values};", loop)
    return loop


def results(folder: Path) -> dict[str, RunRecord]:
    return {
        path.parent.name: RunRecord.from_json(path.read_text())
        for path in (folder / "results").glob("*/record.json")
    }


def real_python(root: Path) -> str:
    return f'cd "$PWD"; script=$1; shift; exec "{sys.executable}" "{root}/$script" "$@"'


@pytest.mark.slow
def test_the_mnist_loop_runs_on_mnist_and_goes_on_when_killed(tmp_path, root, mnist_path):
    loop = shortened(
        LOOPS["mlp"].read_text(), mnist_path, SEED="1111", PM="QM", PI="14", LAMBDA="1e-3"
    )
    program, environment = bash_in(tmp_path, real_python(root))
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*program, loop], cwd=tmp_path, env=environment, start_new_session=True,
        stderr=pipe, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert any(line.startswith("stage 3/14") for line in process.stderr)
        os.killpg(process.pid, signal.SIGKILL)
    done = bash(loop, tmp_path, real_python(root))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Experiment already exists!"] * 2
    assert re.search(r"^going on after pruning stage \d", done.stderr, re.MULTILINE)
    records = results(tmp_path)
    assert sorted(records) == [
        "arch=MLP,dec=1.0,dec_every=1,exp=False,l2=0.0005,lr=0.01,model_0=None,nepochs=1,nex=1000,"
        "pe=-1,pi=1,pm=MP,pr=0.956,reg=0.0,seed=1111",
        "arch=MLP,dec=1.0,dec_every=1,exp=False,l2=0.0005,lr=0.01,model_0=True,nepochs=1,nex=1000,"
        "pe=0,pi=1,pm=MP,pr=0.98847,reg=0.0,seed=1111",
        "arch=MLP,dec=1.0,dec_every=1,exp=True,l2=0.0005,lr=0.01,model_0=True,nepochs=1,nex=1000,"
        "pe=0,pi=14,pm=QM,pr=0.98847,reg=0.001,seed=1111",
    ]
    dense, magnitude, quadratic = (records[name] for name in sorted(records))
    assert dense.best is not None
    assert dense.best.scores.test_error < 0.12
    assert magnitude.before_pruning is not None
    assert magnitude.before_pruning.scores == dense.best.scores
    assert magnitude.removed == quadratic.removed == 263_131 == round(0.98847 * 266_200)
    assert [stage["stage"] for stage in quadratic.stages] == list(range(1, 15))


EACH = {"train": 5, "test": 2}  # images of each class


@pytest.fixture(scope="module")
def cifar_path(shared_data, tmp_path_factory) -> Path:
    """A folder with CIFAR-10 batches of a few real images, from their JPEG files."""
    archive = shared_data / "cifar10-jpeg.tar.gz"
    if not archive.exists():
        pytest.skip(f"no {archive.name} in {shared_data}")
    images: dict[str, dict[str, list[np.ndarray]]] = {"train": {}, "test": {}}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not member.isfile() or len(parts) != 4:
                continue
            _, split, name, _ = parts
            chosen = images[split].setdefault(name, [])
            if len(chosen) < EACH[split]:
                file = tar.extractfile(member)
                assert file is not None
                pixels = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                chosen.append(pixels.transpose(2, 0, 1).reshape(-1))
            if all(
                len(classes) == 10 and all(len(it) == EACH[split] for it in classes.values())
                for split, classes in images.items()
            ):
                break
    path = tmp_path_factory.mktemp("cifar")
    folder = path / "cifar-10-batches-py"
    folder.mkdir()
    for split, batches in (("train", 5), ("test", 1)):
        classes = sorted(images[split])
        rows = list(zip(*(images[split][name] for name in classes), strict=True))
        data = np.stack([row for turn in rows for row in turn])
        labels = np.tile(np.arange(10), len(rows))
        for number in range(batches):
            part = slice(number * len(data) // batches, (number + 1) * len(data) // batches)
            file = "test_batch" if split == "test" else f"data_batch_{number + 1}"
            batch = {b"data": data[part], b"labels": labels[part].tolist()}
            (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "runs"),
    [
        pytest.param("vgg11", 3, marks=pytest.mark.full("VGG11")),
        pytest.param("preactresnet18", 3, marks=pytest.mark.full("PreActResNet18")),
    ],
)
def test_the_cifar10_loops_run_on_real_images(tmp_path, root, cifar_path, name, runs):
    """The baseline, the magnitude run and one of the grid."""
    # Of 45 images to train on it prunes by 40, where the published number is 1000.
    loop = shortened(
        LOOPS[name].read_text().replace(",nex=1000,", ",nex=40,"),
        cifar_path,
        "--nex 40",
        **{"SEED": "1111", "PM": "LM", "PI": "1", "LAMBDA": "1e-3"},
    )
    done = bash(loop, tmp_path, real_python(root))
    assert done.returncode == 0, done.stderr
    records = results(tmp_path)
    assert len(records) == runs
    prunable = {"vgg11": 9_747_136, "preactresnet18": 11_164_352}[name]
    for record in records.values():
        assert record.status == "finished"
        assert len(record.epochs) == 1
        assert record.prunable == prunable
        assert record.removed == (round(0.956 * prunable) if record.config["pe"] == 0 else 0)


def test_experiments_py_is_the_command_run(tmp_path, root):
    """From a checkout, in any folder, with the same folder as ``lossprune run``."""
    flags = "--arch MLP --dataset digits --nepochs 1 --pe -1 --threads 1"
    done = subprocess.run(
        [sys.executable, str(root / "experiments.py"), *flags.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == ""
    config: RunConfig = parse(RunConfig, flags.split())
    assert (tmp_path / config.folder / "best_model.pt").exists()
    shutil.rmtree(tmp_path / "results")
