"""How long an epoch takes: the training loop beside the plain one it replaces.

``python -m benchmarks.training`` trains the dense MLP for whole epochs at batch 100, the two loops
turn and turn about in one process with the same threads, and prints the median of each, their ratio
and its spread over the pairs. Then it runs the experiment itself and prints what the checkpoint
costs an epoch. Where MNIST is not at hand, random images of its size take its place: the time does
not depend on the pixels.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.hardware import hardware
from lossprune.data import Dataset, Split, load
from lossprune.experiment import RunConfig, run
from lossprune.networks import NETWORKS
from lossprune.training import make_optimizer, train_epoch

BATCH, LR, L2, LIMIT = 100, 0.01, 5e-4, 0.85


def plain_loop(dataset: Dataset) -> Callable[[int], None]:
    """The loop that most scripts have: a shuffling DataLoader and a running loss by .item()."""
    network = new_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=0.9, weight_decay=L2)
    tensors = TensorDataset(dataset.inputs(dataset.train.images), dataset.train.labels)
    loader = DataLoader(tensors, batch_size=BATCH, shuffle=True)

    def epoch(number: int) -> None:
        network.train()
        running = 0.0
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(inputs), labels)
            loss.backward()
            optimizer.step()
            running += loss.item()

    return epoch


def our_loop(dataset: Dataset) -> Callable[[int], None]:
    network = new_network()
    optimizer = make_optimizer(network, lr=LR, l2=L2)

    def epoch(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        train_epoch(network, dataset, optimizer, batch_size=BATCH, generator=generator)

    return epoch


def new_network() -> torch.nn.Module:
    return NETWORKS["MLP"](generator=torch.Generator().manual_seed(1111))


def side_by_side(loops: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each epoch; the first round is not counted, and the order alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name in list(loops)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            loops[name](number)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def checkpoint_cost(data_path: Path, folder: Path, epochs: int) -> dict[str, float]:
    """Seconds that an epoch of a run takes, and those that recording and checkpointing add."""
    config = RunConfig(
        arch="MLP", prune_epoch=-1, epochs=0, device="cpu", path=folder, data_path=data_path
    )
    start = run(config).seconds
    record = run(
        RunConfig(
            arch="MLP",
            prune_epoch=-1,
            epochs=epochs,
            device="cpu",
            path=folder,
            data_path=data_path,
        )
    )
    spent = [row.seconds for row in record.epochs]
    return {
        "epochs": epochs,
        "epoch_s": statistics.median(spent),
        "checkpoint_s": (record.seconds - start - sum(spent)) / epochs,
    }


def find_mnist(given: Path | None) -> Path | None:
    beside = Path(__file__).parents[2] / "shared" / "data"
    for path in (given, Path(os.environ.get("LOSSPRUNE_DATA", beside))):
        if path is not None and (path / "MNIST" / "raw").is_dir():
            return path
    return None


def random_mnist() -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        images = torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(0, 10, (n,), generator=generator))

    names = tuple("0123456789")
    splits = (split(50_000), split(10_000), split(10_000))
    return Dataset("random images of MNIST's size", *splits, names, (0.1307,), (0.3081,))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=10, help="epochs of each loop")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--data_path", type=Path, default=None, help="folder that holds MNIST")
    parser.add_argument("--out", type=Path, default=Path("measurements/training.json"))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = find_mnist(arguments.data_path)
    dataset = random_mnist() if path is None else load("mnist", path, seed=1111)
    loops = {"plain": plain_loop(dataset), "lossprune": our_loop(dataset)}
    seconds = side_by_side(loops, arguments.rounds)
    pairs = zip(seconds["lossprune"], seconds["plain"], strict=True)
    ratios = [ours / plain for ours, plain in pairs]
    result: dict[str, object] = {
        "command": "python -m benchmarks.training",
        "hardware": hardware(),
        "data": dataset.name,
        "network": "MLP 784-300-100-10",
        "batch": BATCH,
        "n": arguments.rounds,
        "seconds": seconds,
        "median": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "limit": LIMIT,
        },
    }
    print(f"one epoch of {dataset.name}, batch {BATCH}, n = {arguments.rounds}, {hardware()}")
    print(f"{'loop':<12}{'median s':>10}{'min s':>10}{'max s':>10}")
    for name, times in seconds.items():
        print(f"{name:<12}{statistics.median(times):>10.3f}{min(times):>10.3f}{max(times):>10.3f}")
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if path is not None:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            cost = checkpoint_cost(path, Path(folder), arguments.rounds)
        result["checkpoint"] = cost
        share = cost["checkpoint_s"] / cost["epoch_s"]
        print(
            f"checkpoint {cost['checkpoint_s'] * 1000:.1f} ms an epoch of "
            f"{cost['epoch_s']:.3f} s with evaluation ({share:.1%})"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
