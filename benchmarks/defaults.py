"""What the criteria leave of a network as they are called by default, beside magnitude.

``python -m benchmarks.defaults --data_path data`` trains a small residual network on the bundled
digits and a perceptron on MNIST for each seed, prunes each to 80, 90 and 95 % by every criterion
with no more than criterion, sparsity, data and examples given, and prints accuracy and loss on the
test data right after pruning: means over the seeds, and each criterion's mean difference from MP on
the same networks with its 95 % t-interval.  ``--networks vgg11 --weights vgg11.safetensors --images
images.tar`` does it with a trained VGG11, whose seeds draw the examples alone.
"""

import argparse
import copy
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lossprune
from benchmarks.hardware import hardware, write_json
from lossprune.data import Dataset, Split, load
from lossprune.networks import NETWORKS

CRITERIA = ("MP", "LM", "QM", "OBD")
SPARSITIES = (0.8, 0.9, 0.95)
# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut, as in the residual networks for CIFAR-10."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def residual(channels: int, widths: Sequence[int]) -> nn.Module:
    """A residual network with a block from each width to the next, which halves where they grow."""
    stem = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
    blocks = [Block(i, o, 1 if i == o else 2) for i, o in pairwise(widths)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)
    return nn.Sequential(*stem, *blocks, *head)


def digits_resnet() -> nn.Module:
    """A residual network of 77 thousand weights for images of 8×8 pixels."""
    return residual(1, (16, 16, 32, 64))


@dataclass(frozen=True)
class Case:
    """A trained network, the data to prune it with, and the test data."""

    network: nn.Module
    train: TensorDataset
    test: tuple[Tensor, Tensor]


def tensors(dataset: Dataset, split: Split) -> tuple[Tensor, Tensor]:
    (whole,) = dataset.batches(split, len(split))
    return whole


def trained(make: Callable[[], nn.Module], dataset: Dataset, seed: int, epochs: int) -> Case:
    """Train by SGD with momentum and a cosine schedule; the seed draws weights and batches."""
    torch.manual_seed(seed)
    network, train = make(), TensorDataset(*tensors(dataset, dataset.train))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        network.train()
        for inputs, targets in DataLoader(train, 100, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
        schedule.step()
    return Case(network.eval(), train, tensors(dataset, dataset.test))


def digits(seed: int, given: argparse.Namespace) -> Case:
    return trained(digits_resnet, load("digits", seed=seed), seed, epochs=20)


def mnist(seed: int, given: argparse.Namespace) -> Case:
    dataset = load("mnist", given.data_path, seed=seed)
    return trained(NETWORKS["MLP"], dataset, seed, epochs=10)


def vgg11(seed: int, given: argparse.Namespace) -> Case:
    from safetensors.torch import load_file

    dataset = load("folder", given.images, seed=1111)
    network = NETWORKS["VGG11"]()
    network.load_state_dict(load_file(given.weights))
    order = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(0))
    (test,) = dataset.batches(dataset.test, 2000, order=order[:2000])
    few = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed))
    (train,) = dataset.batches(dataset.train, 5000, order=few[:5000])
    return Case(network.eval(), TensorDataset(*train), test)


CASES = {"digits": digits, "mnist": mnist, "vgg11": vgg11}


@torch.no_grad()
def scores(network: nn.Module, test: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy and loss."""
    logits = torch.cat([network(inputs) for inputs in test[0].split(500)])
    loss = F.cross_entropy(logits, test[1]).item()
    return (logits.argmax(1) == test[1]).double().mean().item(), loss


def compute(name: str, seed: int, examples: int, given: argparse.Namespace) -> list[dict]:
    case = CASES[name](seed, given)
    accuracy, loss = scores(case.network, case.test)
    print(f"{name}, seed {seed}: dense {accuracy:.2%}, loss {loss:.4f}", file=sys.stderr)
    rows = []
    for sparsity in SPARSITIES:
        for criterion in given.criteria.split(","):
            torch.manual_seed(seed)  # all criteria see the same examples
            batches = DataLoader(case.train, 100, shuffle=True)
            began = time.perf_counter()
            # All that a newcomer gives.
            result = lossprune.prune(
                case.network, criterion, sparsity=sparsity, data=batches, examples=examples
            )
            seconds = time.perf_counter() - began
            pruned = copy.deepcopy(case.network)
            result.mask.apply_(pruned)
            accuracy, loss = scores(pruned, case.test)
            rows.append(
                {
                    "network": name,
                    "seed": seed,
                    "criterion": criterion,
                    "sparsity": sparsity,
                    "stages": len(result.stages),
                    "accuracy": accuracy,
                    "loss": loss,
                    "seconds": seconds,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval."""
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return mean, math.nan, math.nan
    half = T[n - 2] * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def print_table(rows: list[dict]) -> None:
    scored = "accuracy | minus MP | loss | minus MP"
    print(f"| network | sparsity | criterion | stages | n | {scored} | s |")
    print("| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: |")
    by = {(r["network"], r["sparsity"], r["criterion"], r["seed"]): r for r in rows}
    for name, sparsity, criterion in dict.fromkeys(key[:3] for key in by):
        mine = [r for key, r in by.items() if key[:3] == (name, sparsity, criterion)]
        cells = [name, f"{sparsity:.0%}", criterion, str(mine[0]["stages"]), str(len(mine))]
        for score, points in (("accuracy", 100.0), ("loss", 1.0)):
            unit = " %" if points > 1 else ""
            cells.append(f"{points * statistics.fmean(r[score] for r in mine):.3g}{unit}")
            beside = [by.get((name, sparsity, "MP", r["seed"])) for r in mine]
            if criterion == "MP" or None in beside:
                cells.append("")
                continue
            pairs = zip(mine, beside, strict=True)
            mean, low, high = interval([points * (r[score] - mp[score]) for r, mp in pairs if mp])
            cells.append(f"{mean:+.3g} ({low:+.3g} to {high:+.3g})")
        cells.append(f"{statistics.median(r['seconds'] for r in mine):.1f}")
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="digits,mnist", help="of digits, mnist, vgg11")
    parser.add_argument("--criteria", default=",".join(CRITERIA))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="of MNIST")
    parser.add_argument("--weights", type=Path, help="of VGG11")
    parser.add_argument("--images", type=Path, help="folder or archive of VGG11's images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")  # of the weights that nothing depends on
    rows = []
    for name in given.networks.split(","):
        for seed in range(given.seeds):
            rows += compute(name, seed, given.examples, given)
    print_table(rows)
    if given.json is not None:
        write_json(given.json, {"hardware": hardware(), "rows": rows})


if __name__ == "__main__":
    main()
