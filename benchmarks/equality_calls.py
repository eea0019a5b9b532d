"""Programs that :mod:`benchmarks.equality` runs with either tree: ``… equality_calls NAME``.

They call the public names alone, and write what comes of it into the current folder.
"""

import contextlib
import io
import itertools
import json
import runpy
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

_PLAN = """
arch = "MLP"
dataset = "digits"
nepochs = 3
pe = 0
pr = 0.{kept}
nex = 100
exp = true
lr = 0.02
seed = [1, 2]
"""
_TOGETHER = 'pm = ["LM", "QM"]\npi = 2\n[baseline]\nnepochs = 2\n'
_SWEEP = """pm = ["MP", "QM"]
pi = [1, 5]
reg = [0.0, 1e-3]
[baseline]
nepochs = 3
[[drop]]
pm = "MP"
reg = 1e-3
[[drop]]
pm = "MP"
pi = 5
"""
_BUILD = """
import lossprune
from torch import nn

def network():
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10),
    )

def data():
    dataset = lossprune.data.load("digits", seed=1)
    return list(dataset.batches(dataset.train, 50))
"""
_COMMANDS = (
    *("", "run", "sweep", "status", "report", "compare", "prune", "deploy", "data", "demo"),
)
_WRONG = (
    *("data", "data digits", "data mnist2", "run --arch VGG12", "run --pr 1.5", "run --lr nan"),
    *("run --pe 3 --nepochs 2", "run --train sparse --amp bf16", "run --pms QM", "rum"),
    *("sweep mlp-mnist --dry-run --seeds 1111 --only pm=QM,pi=14", "sweep nothing.toml"),
    *("report nothing", "status nothing", "compare a b", "prune nothing:build --sparsity 0.5"),
    *("deploy nothing", "run --arch VGG11 --dataset digits", "run --model_0 nothing.pt"),
)


class Clock:
    """Every interval between two calls is a little shorter than the one before.

    Whoever times several things and keeps the fastest so keeps the last, however busy the machine.
    """

    def __init__(self) -> None:
        self.now, self.step = 0.0, 0.01

    def __call__(self) -> float:
        self.now += self.step
        self.step *= 1 - 1e-9  # too little for a table to show how often it was asked
        return self.now


def clocked(*words: str) -> int:
    """Be ``lossprune`` by that clock."""
    time.perf_counter = Clock()
    return lossprune(*words)


def lossprune(*words: str) -> int:
    """Be ``python -m lossprune``, and return its exit status."""
    sys.argv = ["lossprune", *words]
    try:
        runpy.run_module("lossprune", run_name="__main__", alter_sys=True)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def words() -> None:
    """Write every help text, and what is said to wrong flags."""
    helps = [f"{command} --help".strip() for command in _COMMANDS]
    for name, lines in {"help": helps, "wrong": _WRONG}.items():
        said = []
        for line in lines:
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                status = lossprune(*line.split())
            said += [f"lossprune {line}: {status}", told.getvalue()]
        Path(f"{name}.out").write_text("\n".join(said))


def plans() -> None:
    Path("together.toml").write_text(_PLAN.format(kept=5) + _TOGETHER)
    Path("sweep.toml").write_text(_PLAN.format(kept=9) + _SWEEP)


def build() -> None:
    Path("build.py").write_text(_BUILD)


def images() -> None:
    """Write digits as coloured pictures: of 32×32 pixels, and in ``small`` of 8×8."""
    import numpy as np
    from PIL import Image

    from lossprune.data import load

    digits = load("digits", seed=1)
    counts = {"train": 90, "val": 40, "test": 40}
    splits = (digits.train, digits.valid, digits.test)
    for (split, count), its in zip(counts.items(), splits, strict=True):
        for number in range(count):
            grey = (its.images[number].squeeze().numpy() * 15).astype(np.uint8)
            picture = np.stack([grey, grey[::-1], grey.T], axis=-1)
            for top, times in ((Path("images"), 4), (Path("images/small"), 1)):
                place = top / split / str(int(its.labels[number]))
                place.mkdir(parents=True, exist_ok=True)
                large = picture.repeat(times, axis=0).repeat(times, axis=1)
                Image.fromarray(large).save(place / f"{number}.png")


def timeless(results: str) -> None:
    """Copy a folder of results with all seconds 0, so that its report has no times."""
    shutil.copytree(results, "timeless")
    for file in Path("timeless").rglob("record.json"):
        record = without_times(json.loads(file.read_text()))
        record.pop("sha256", None)
        record["environment"]["lossprune"] = ""
        file.write_text(json.dumps(record, indent=1))
    for file in Path("timeless").rglob("log.txt"):
        lines = file.read_text().splitlines()
        epochs = itertools.starmap(str.rsplit, ((line, "\t", 1) for line in lines))
        kept = [
            f"{parts[0]}\t0.00" if line[:1].isdecimal() else line
            for line, parts in zip(lines, epochs, strict=True)
        ]
        file.write_text("\n".join(kept) + "\n")


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {
            name: 0.0 if name == "seconds" else without_times(item) for name, item in value.items()
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


def main() -> int:
    from benchmarks import equality_deployment, equality_pruning

    programs: dict[str, Callable[..., int | None]] = {
        it.__name__: it for it in (clocked, words, plans, build, images, timeless)
    }
    programs |= {
        "criteria": equality_pruning.criteria,
        "losses": equality_pruning.losses,
        "networks": equality_deployment.networks,
        "deployment": equality_deployment.deployment,
    }
    return programs[sys.argv[1]](*sys.argv[2:]) or 0


if __name__ == "__main__":
    sys.exit(main())
