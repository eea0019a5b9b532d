"""What CONTRIBUTING shows is done, as it stands, to a copy of the package, and used."""

import os
import re
import shutil
import subprocess
import sys

import pytest

# Sections that add one entry to one table.
TABLES = {
    "a criterion": "CRITERIA",
    "a network": "NETWORKS",
    "a data set": "DATASETS",
    "a loss": "LOSSES",
    "an estimator of the curvature": "ESTIMATORS",
    "a scope": "SCOPES",
    "a schedule": "SCHEDULES",
}

USES = """
import torch
from torch import nn

import lossprune

network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
counts = [(torch.randn(20, 6), torch.randint(5, (20, 3)).double().float())]
settings = dict(data=counts, loss="poisson", sparsity=0.5, stages=3, scope="root")
result = lossprune.prune(network, "OBD", estimator="signs", schedule="quadratic", **settings)
assert [stage.removed for stage in result.stages] == [4, 16, 36], result.stages

inputs = torch.rand(4, 1, 8, 8)
squashed = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Softsign(), nn.Flatten(), nn.Linear(288, 3)).eval()
mask = lossprune.prune(squashed, "MP", sparsity=0.9).mask
fast = lossprune.deploy(squashed, mask, inputs)
mask.apply_(squashed)
assert not any("oftsign" in note for note in fast.notes), fast.notes  # it is compiled, too
torch.testing.assert_close(fast(inputs), squashed(inputs), rtol=1e-5, atol=1e-6)
"""

RUN = (
    "run --arch Linear --dataset noise --pm Fisher --pi 2 --exp --pr 0.5 --nepochs 1 --nex 50 "
    "--threads 1"
)


def section(text, what):
    """The text below a heading, up to the next one."""
    found = re.search(rf"^## Adding {what}\b[^\n]*\n(.*?)^## ", text, flags=re.M | re.S)
    assert found is not None, what
    return found[1]


def blocks(text):
    return re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.M | re.S)


def add_entry(text, root, table):
    """Put the section's definitions before the table of its file, and its entry into it."""
    (code,) = blocks(text)
    assert f"`{table}`" in text
    file = root / re.search(r"in `(src/[^`]+\.py)`", text)[1]
    shown = re.search(rf"^{table} = \{{\.\.\., (.*)\}}$", code, flags=re.M)
    definitions, entry = (code[: shown.start()], f"    {shown[1]},\n") if shown else ("", code)
    before = file.read_text()
    line = re.search(rf"^{table}\b.* = \{{\n", before, flags=re.M)
    file.write_text(before[: line.start()] + definitions + line[0] + entry + before[line.end() :])


def insert_after(file, line, added):
    before = file.read_text()
    assert before.count(line) == 1, line
    file.write_text(before.replace(line, line + added))


@pytest.fixture(scope="module")
def changed(root, tmp_path_factory):
    """A copy of the package with everything added that CONTRIBUTING shows."""
    folder = tmp_path_factory.mktemp("contributed")
    shutil.copytree(
        root / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    text = (root / "CONTRIBUTING.md").read_text()
    for what, table in TABLES.items():
        add_entry(section(text, what), folder, table)
    member, computed = blocks(section(text, "an activation"))
    source = folder / "src" / "lossprune"
    insert_after(source / "kernels/interface.py", "    TANH = 2\n", f"    {member}")
    kernel = source / "deployment/sparse/activations.h"
    insert_after(kernel, "    switch (kind) {\n", computed)
    numbers, labels, drawn, line = blocks(section(text, "a figure"))
    for file, code in (("series.py", numbers), ("drawing.py", drawn)):
        file = source / "report" / file
        file.write_text(f"{file.read_text()}\n\n{code}")
    insert_after(source / "report/labels.py", "\nLABELS = {\n", labels)
    insert_after(source / "report/figures.py", "    runs = results.runs\n", line)
    return folder


def python(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "LOSSPRUNE_CACHE": str(folder)}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_section_that_adds_an_entry_is_tried(root):
    text = (root / "CONTRIBUTING.md").read_text()
    one_file = re.findall(r"^## Adding (.*): one file$", text, flags=re.M)
    assert one_file == list(TABLES)


def test_what_is_added_can_be_chosen(changed):
    shown = python(changed, "-m", "lossprune", "run", "--help").stdout
    for name in ("Linear", "noise", "Fisher", "signs"):
        assert name in shown


@pytest.mark.slow
def test_what_is_added_does_its_work(changed):
    done = python(changed, "-m", "lossprune", *RUN.split())
    assert done.returncode == 0, done.stderr
    done = python(changed, "-m", "lossprune", "report", "results", "--out", "report")
    assert done.returncode == 0, done.stderr
    assert len(list((changed / "report").rglob("seconds--*.png"))) == 1
    done = python(changed, "-c", USES)
    assert done.returncode == 0, done.stderr
