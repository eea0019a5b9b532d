"""Every script under ``examples/`` runs as its first lines say, and keeps its promise."""

import os
import re
import subprocess
import sys

import pytest

ALL_REMOVED = r"(\d+) weights are exactly 0, (\d+) were removed"
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
EXAMPLES = {
    "plain_loop.py": [],
    "mixed_precision.py": [],
    "compiled.py": [],
    "distributed.py": TWO_PROCESSES,
    "lightning_trainer.py": [],
    "transformers_trainer.py": [],
}


def run(root, name, folder) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *EXAMPLES[name], str(root / "examples" / name)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run(root):
    assert {path.name for path in (root / "examples").glob("*.py")} == set(EXAMPLES)


# What these do is also tested where it costs no process and no compiler of its own: pruning and
# enforcing in several processes in tests/pruning.
LONG = {
    "compiled.py",
    "distributed.py",
    "mixed_precision.py",
    "lightning_trainer.py",
    "transformers_trainer.py",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full(n) if n in LONG else ()) for n in EXAMPLES],
)
def test_runs_and_its_removed_weights_are_zero(root, name, tmp_path):
    out = run(root, name, tmp_path)
    found = re.findall(ALL_REMOVED, out)
    assert len(found) == (2 if name == "distributed.py" else 1), out
    for zeros, removed in found:
        assert zeros == removed
        assert int(removed) > 1000
    assert not list(tmp_path.iterdir())  # it leaves nothing behind
    if name == "plain_loop.py":
        errors = dict(re.findall(r"^(trained|pruned|fine-tuned) +([\d.]+) %", out, re.MULTILINE))
        assert list(errors) == ["trained", "pruned", "fine-tuned"]
        assert removed == "4262"  # of 64 · 64 + 64 · 10, nine tenths, rounded
        assert float(errors["fine-tuned"]) < 15  # a guess is wrong nine times of ten
