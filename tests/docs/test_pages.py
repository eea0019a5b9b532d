"""All commands and blocks of code in the README and ``docs/`` run as written, in reading order.

They run in one folder, which is empty at first: what a page makes, the pages after it may use.
Blocks that begin with a comment that is a file's name are put into that file.  Training on MNIST is
cut to one epoch and two stages, sweeps of it to the list of their runs; what cannot run here is in
``NOT_RUN``, with the reason.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.processes import Processes

PAGES = (
    "README.md",
    "docs/guide.md",
    "docs/sensitivity.md",
    "docs/choices.md",
    "docs/costs.md",
    "docs/compensation.md",
    "docs/transformers.md",
    "docs/finetuning.md",
    "docs/deployment.md",
    "docs/distributed.md",
    "docs/training.md",
    "docs/sweeps.md",
    "docs/reports.md",
    "docs/cluster.md",
    "docs/results/mlp-mnist/README.md",
    "docs/results/vgg11-cifar10jpeg/README.md",
)

# Its runs are of many networks, and each would be drawn in every report of the pages after it.
MANY_NETWORKS = "docs/guide.md"

# (page, words of the block): why it does not run here.
NOT_RUN = {
    ("README.md", "make demo"): "installs from a package index",
    ("README.md", "pip install"): "installs from a package index",
    ("README.md", "--nproc-per-node 2"): "CIFAR-10 is not here",
    ("README.md", "--arch MLP --nepochs 800"): "hours; the plan mlp-mnist is tested to be the same",
    ("README.md", "--arch VGG11 --nepochs 300"): "days; the plan vgg11-cifar10 is the same",
    ("README.md", "--arch PreActResNet18 --nepochs 200 --lr"): "days; there is such a plan",
    ("docs/guide.md", "benchmarks.oneshot"): "benchmarks",
    ("docs/deployment.md", "benchmarks.deployment"): "a benchmark",
    ("docs/deployment.md", "peers/bin/pip"): "installs from a package index",
    ("docs/deployment.md", "vgg11_run(context"): "C",
    ("docs/distributed.md", "torchrun"): "CIFAR-10 is not here",
    ("docs/training.md", "SparseStack("): "a GPU",
    ("docs/training.md", "--arch VGG11"): "CIFAR-10 is not here",
    ("docs/sweeps.md", "ray start --head --port 6379\nnode1"): "a cluster",
    ("docs/sweeps.md", "#SBATCH"): "a cluster",
    ("docs/reports.md", "SELECT"): "DuckDB",
    ("docs/cluster.md", "imagenet/train/n01440764/"): "a listing",
    ("docs/cluster.md", "ILSVRC2012_img_train.tar"): "ImageNet",
    ("docs/cluster.md", "LOC_val_solution.csv"): "ImageNet",
    ("docs/cluster.md", "lossprune data imagenet"): "ImageNet",
    ("docs/cluster.md", "--model_0 resnet50-0676ba61.pth\n"): "ImageNet",
    ("docs/cluster.md", "torchrun --standalone"): "ImageNet",
    ("docs/cluster.md", "#SBATCH"): "a cluster",
    ("docs/cluster.md", "benchmarks.imagenet"): "a benchmark",
    ("docs/results/mlp-mnist/README.md", "--device cuda"): "a GPU",
    ("docs/results/vgg11-cifar10jpeg/README.md", "cifar10-jpeg.tar.gz"): "CIFAR-10 is not here",
}

CONVOLUTIONS = """
network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
mask = lossprune.prune(network, "MP", sparsity=0.9).mask
mask.apply_(network)
"""
PERCEPTRONS = """
build = lossprune.networks.NETWORKS["MLP"]
networks = [build(shape=dataset.shape, classes=10) for _ in range(3)]
masks = [lossprune.prune(network, "MP", sparsity=0.9).mask for network in networks]
for network, mask in zip(networks, masks):
    mask.apply_(network)
decays = [0.0, 1e-4, 5e-4]
generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
"""

# (page, words of the block): what a reader has by then, as Python.
GIVEN = {
    ("docs/guide.md", "captions=batch[1]"): """
class Captioned(Network):
    def forward(self, x, captions):
        return super().forward(x)

own, pairs, network = network, loader, Captioned()
loader = [(images, None, classes) for images, classes in pairs]
""",
    ("docs/guide.md", 'recalibrate="stages"'): """
network = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
)
""",
    ("docs/guide.md", "read_mask(network)"): """
network = build()
lossprune.pruning.write_torch_pruning_(network, mask)
""",
    ("docs/guide.md", "GPT2LMHeadModel, say"): """
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))
tokens = torch.randint(50, (4, 8))
loader = [{"input_ids": tokens, "labels": tokens}]
""",
    ("docs/guide.md", "result.model_sparsity"): "network, loader = own, pairs",
    ("docs/deployment.md", "lossprune.save_sparse("): """
result = lossprune.prune(network, "MP", sparsity=0.9)
""",
    ("docs/deployment.md", "fast.save("): """
network = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 1000), nn.Tanh(), nn.Linear(1000, 1000), nn.Linear(1000, 10)
).eval()
result = lossprune.prune(network, "MP", sparsity=0.98)
fast = lossprune.deploy(network, result.mask, example)
""",
    ("docs/finetuning.md", "callbacks=[MaskCallback(mask)]"): """
import pytorch_lightning

class Module(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = build()

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

of_network, module = mask, Module()
mask = lossprune.prune(module, "MP", sparsity=0.9).mask
rows = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*loader)))
loader = torch.utils.data.DataLoader(rows, 100)
""",
    ("docs/finetuning.md", "lossprune.sparse(network"): "mask = of_network",
    ("docs/distributed.md", "fully_shard"): """
torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
""",
    ("docs/training.md", "SparseTraining"): PERCEPTRONS,
    ("docs/training.md", "ConvolutionTraining"): CONVOLUTIONS,
    ("docs/training.md", "CompactedTraining"): CONVOLUTIONS,
}

# What a reader has who comes to a page: a network, its data and what trains it.
NAMES = """
import copy

import pandas
import torch
from torch import nn

import lossprune

class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.eye(32) + 0.1 * torch.randn(32, 32))

    def forward(self, x):
        return x @ self.mix

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.encoder = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        self.mixer = Mixer()
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc2(torch.tanh(self.mixer(self.encoder(torch.tanh(self.fc1(x.flatten(1)))))))

torch.manual_seed(0)
build = Network
network = model = build()
dataset = lossprune.data.load("digits", seed=1111)
loader = batches = list(dataset.batches(dataset.train, 100))
optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
for inputs, targets in loader:
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(inputs), targets).backward()
    optimizer.step()
example = images = loader[0][0]
generator = torch.Generator().manual_seed(0)
"""

# What takes long as it stands, and how it is cut; the bundled digits and data of one's own do not.
LONG = re.compile(r"--arch MLP(?!.*digits)|sweep (mlp-mnist|report/best\.toml)")
SHORTER = (
    (r"--nepochs [1-9]\d*", "--nepochs 1"),
    (r"\bnepochs=[1-9]\d*", "nepochs=1"),
    (r"--pi (14|140)\b", "--pi 2"),
    (r"\bpi=(14|140)\b", "pi=2"),
    (r"sweep (?!.*--dry-run)\S+", r"\g<0> --dry-run"),
)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str


def blocks(root, page):
    text = (root / page).read_text()
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S):
        line = text[: found.start()].count("\n") + 1
        yield Block(page, line, found[1] or "sh", found[2])


def matching(table, block):
    """The values of a table for a block, by the page and words of the block."""
    return [
        value
        for (page, words), value in table.items()
        if page == block.page and words in block.code
    ]


def shortened(command):
    """The command as it is run here."""
    command = re.sub(r"^lossprune deploy \S+", r"\g<0> --seconds 0.1 --engines none", command)
    if not LONG.search(command):
        return command
    for pattern, short in SHORTER:
        command = re.sub(pattern, short, command)
    return command


def run_shell(block, folder):
    lines = map(shortened, re.sub(r"\\\n\s*", "", block.code).splitlines())
    lines = [line for line in lines if line and not line.startswith("#")]
    where = f"{block.page}, line {block.line}"
    if all(line.startswith("lossprune ") for line in lines):
        for line in lines:
            run_command(line, where, folder.with_name("said.txt"))
        return
    script = "set -euo pipefail\n" + "\n".join(lines)
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{where}:\n{script}\n{done.stderr[-3000:]}"


def run_command(line, where, log):
    """Do one command, its words read by the shell, in a process that has torch loaded."""
    read = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    _, *arguments = read.stdout.split("\0")[:-1]
    log.unlink(missing_ok=True)
    done = Processes(arguments, log)
    done.join(600)
    done.kill()
    assert done.exitcode == 0, f"{where}:\n{line}\n{done.said[-3000:]}"


def run_python(block, namespace):
    for code in matching(GIVEN, block):
        exec(code, namespace)
    try:
        exec(compile(block.code, f"{block.page}, line {block.line}", "exec"), namespace)
    except Exception as error:
        raise AssertionError(f"{block.page}, line {block.line}: {error!r}") from error


def run_block(block, folder, namespace):
    if block.language in ("sh", "bash"):
        run_shell(block, folder)
    elif named := re.match(r"# (\w+\.(py|toml))\n", block.code):
        (folder / named[1]).write_text(block.code)
    else:
        assert block.language == "python", block
        run_python(block, namespace)


@pytest.fixture
def _no_group_left():
    """Leave none of the process group that a page on several processes is given."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.usefixtures("_no_group_left")
def test_every_block_runs_in_order(root, mnist_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("LOSSPRUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").symlink_to(mnist_path)
    (tmp_path / "experiments.py").symlink_to(root / "experiments.py")
    for page in PAGES:
        namespace = {}
        exec(NAMES, namespace)
        for block in blocks(root, page):
            if not matching(NOT_RUN, block) and not block.code.startswith(">>>"):  # a doctest
                run_block(block, tmp_path, namespace)
        if page == MANY_NETWORKS:
            shutil.rmtree(tmp_path / "results")


def test_every_page_with_blocks_is_run(root):
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    with_blocks = {str(page.relative_to(root)) for page in pages if "```" in page.read_text()}
    assert with_blocks == set(PAGES)


@pytest.mark.parametrize("table", [NOT_RUN, GIVEN])
def test_each_exception_is_of_one_block(root, table):
    for page, words in table:
        assert sum(words in block.code for block in blocks(root, page)) == 1, (page, words)
