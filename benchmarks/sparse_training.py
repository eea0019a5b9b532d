"""Fine-tuning over the surviving weights alone, beside the dense masked loop.

``python -m benchmarks.sparse_training`` trains the MLP on MNIST for some epochs, prunes it to the
published sparsity of 0.98847 (QM, 14 stages), and then measures

* an epoch of training, and the evaluation after it, dense with one and with two threads and
  sparse, turn and turn about in one process;
* two sparse runs at once, in two processes, against the best dense time;
* the share of the floor: the floating point operations of the surviving weights at the rate of
  torch's matrix product, and the tanh at torch's rate, on one core;
* at which share of weights left sparse training begins to pay, with random masks;
* gradients against float64, and with ``--seeds 10`` the test errors of both ways of training.
"""

import argparse
import copy
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.hardware import write_json
from benchmarks.training import find_mnist
from lossprune.data import Dataset, load
from lossprune.networks import NETWORKS
from lossprune.pruning import Mask, prune
from lossprune.training import SparseTraining, evaluate, make_optimizer, train_epoch

LR, L2, SPARSITY = 0.01, 5e-4, 0.98847
LEFT = (0.5, 0.3, 0.2, 0.1, 0.05, 0.01)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_network() -> nn.Module:
    return NETWORKS["MLP"](generator=seeded(1111))


def pruned_network(dataset: Dataset, epochs: int) -> tuple[nn.Module, Mask]:
    network = new_network()
    optimizer = make_optimizer(network, lr=LR, l2=L2)
    for epoch in range(epochs):
        train_epoch(network, dataset, optimizer, generator=seeded(epoch))
    order = torch.randperm(len(dataset.train), generator=seeded(7))[:1000]
    batches = list(dataset.batches(dataset.train, 100, order=order))
    mask = prune(
        network, "QM", sparsity=SPARSITY, data=batches, stages=14, schedule="exponential"
    ).mask
    mask.apply_(network)
    return network, mask


def random_mask(network: nn.Module, left: float) -> Mask:
    generator = seeded(3)
    return Mask(
        {
            name: torch.rand(weight.shape, generator=generator) < left
            for name, weight in network.named_parameters()
            if name.endswith("weight")
        }
    )


class Ways:
    """The same network fine-tuned densely and sparsely."""

    def __init__(self, network: nn.Module, mask: Mask, dataset: Dataset) -> None:
        self.dataset = dataset
        self.dense, self.sparse = copy.deepcopy(network), copy.deepcopy(network)
        self.by_dense = make_optimizer(self.dense, lr=LR, l2=L2)
        self.by_sparse = make_optimizer(self.sparse, lr=LR, l2=L2)
        mask.enforce(self.dense, self.by_dense)
        mask.apply_(self.sparse)
        self.training = SparseTraining(self.sparse, mask, dataset)

    def train_dense(self, epoch: int) -> None:
        train_epoch(self.dense, self.dataset, self.by_dense, generator=seeded(epoch))

    def train_sparse(self, epoch: int) -> None:
        self.training.train_epoch(self.by_sparse, generator=seeded(epoch))

    def evaluate_dense(self, epoch: int) -> None:
        for split in self.dataset.splits.values():
            evaluate(self.dense, self.dataset, split)

    def evaluate_sparse(self, epoch: int) -> None:
        for split in self.dataset.splits.values():
            self.training.evaluate(split)


def timed(work: Callable[[int], None], number: int, threads: int) -> float:
    torch.set_num_threads(threads)
    began = time.perf_counter()
    work(number)
    return time.perf_counter() - began


def side_by_side(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Seconds of each; the first round is not counted, and the order alternates."""
    works = {
        "dense, 1 thread": (ways.train_dense, 1),
        "dense, 2 threads": (ways.train_dense, 2),
        "sparse": (ways.train_sparse, 1),
        "dense evaluation, 1 thread": (ways.evaluate_dense, 1),
        "dense evaluation, 2 threads": (ways.evaluate_dense, 2),
        "sparse evaluation, 1 thread": (ways.evaluate_sparse, 1),
        "sparse evaluation, 2 threads": (ways.evaluate_sparse, 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in list(works)[:: 1 if number % 2 else -1]:
            spent = timed(works[name][0], number, works[name][1])
            if number:
                seconds[name].append(spent)
            print(f"round {number}: {name:<30}{spent:.4f} s", flush=True)
    return seconds


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    found = [one / other for one, other in zip(slow, fast, strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def _one_of_two(path: Path, file: Path, epochs: int, ready: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    dataset = load("mnist", path, seed=1111)
    saved = torch.load(file, weights_only=True)
    network = new_network()
    network.load_state_dict(saved["network"])
    ways = Ways(network, Mask(saved["mask"]), dataset)
    ways.train_sparse(0)
    ready.wait()
    began = time.perf_counter()
    for epoch in range(epochs):
        ways.train_sparse(epoch)
    answers.put((time.perf_counter() - began) / epochs)


def two_at_once(path: Path, file: Path, epochs: int) -> list[float]:
    """Seconds of an epoch in each of two runs that go on at the same time."""
    context = multiprocessing.get_context("spawn")
    ready, answers = context.Barrier(2), context.Queue()
    runs = [
        context.Process(target=_one_of_two, args=(path, file, epochs, ready, answers))
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    found = [answers.get(timeout=600) for _ in runs]
    for run in runs:
        run.join()
    return found


def best_of(work: Callable[[], object], repeats: int = 30) -> float:
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return min(spent)


def floor(training: SparseTraining) -> dict[str, float]:
    """Seconds that a step of 100 examples takes at torch's own rates on one core."""
    torch.set_num_threads(1)
    weights = sum(len(layer.weights) for layer in training.layers)
    units = sum(len(layer.live) for layer in training.layers[:-1])
    square = torch.rand(1024, 1024)
    values = torch.randn(units * 100)
    rate = 2 * 1024**3 / best_of(lambda: square @ square)
    tanh = best_of(lambda: torch.tanh(values))
    flop = 3 * 2 * weights * 100
    return {"flop": flop, "flop/s": rate, "tanh": units * 100, "seconds": flop / rate + tanh}


def crossing(dataset: Dataset, rounds: int) -> list[dict[str, float]]:
    rows = []
    for left in LEFT:
        network = new_network()
        ways = Ways(network, random_mask(network, left), dataset)
        seconds: dict[str, list[float]] = {"dense1": [], "dense2": [], "sparse": []}
        for number in range(rounds + 1):
            for name, work, threads in (
                ("dense1", ways.train_dense, 1),
                ("dense2", ways.train_dense, 2),
                ("sparse", ways.train_sparse, 1),
            ):
                spent = timed(work, number, threads)
                if number:
                    seconds[name].append(spent)
        rows.append({"left": left, **{name: min(times) for name, times in seconds.items()}})
    return rows


def gradient_errors(network: nn.Module, mask: Mask, dataset: Dataset) -> dict[str, float]:
    """Largest error of a sparse gradient over 100 examples, relative to its largest in float64."""
    order = torch.randperm(len(dataset.train), generator=seeded(0))
    small = Dataset(
        "100 examples",
        dataset.train.take(order[:100]),
        dataset.valid,
        dataset.test,
        dataset.classes,
        dataset.mean,
        dataset.std,
    )
    sparse, double = copy.deepcopy(network), copy.deepcopy(network).double()
    optimizer = make_optimizer(sparse, lr=0.0, l2=0.0)
    SparseTraining(sparse, mask, small).train_epoch(optimizer, generator=seeded(0))
    inputs = small.inputs(small.train.images).double()
    F.cross_entropy(double(inputs), small.train.labels).backward()
    errors = {}
    for (name, parameter), exact in zip(
        sparse.named_parameters(), double.parameters(), strict=True
    ):
        assert exact.grad is not None
        kept = mask.get(name, True)
        expected = exact.grad * kept
        found = optimizer.state[parameter]["momentum_buffer"].double()
        errors[name] = float((found - expected).abs().max() / expected.abs().max())
    return errors


def seeds(
    network: nn.Module, mask: Mask, dataset: Dataset, count: int, epochs: int
) -> dict[str, Any]:
    """Test errors of both ways, from one pruned network, over seeds of the order of examples."""
    torch.set_num_threads(1)
    rows, drift = [], [0.0] * epochs
    for seed in range(count):
        ways, errors = Ways(network, mask, dataset), (0.0, 0.0)
        for epoch in range(epochs):
            ways.train_dense(1000 * seed + epoch)
            ways.train_sparse(1000 * seed + epoch)
            one = evaluate(ways.dense, dataset, dataset.test)
            other = evaluate(ways.sparse, dataset, dataset.test)
            drift[epoch] = max(drift[epoch], abs(one.loss - other.loss) / one.loss)
            errors = (one.error, other.error)
        rows.append(errors)
    differences = [other - one for one, other in rows]
    spread = statistics.stdev(differences) if count > 1 else 0.0
    return {
        "epochs": epochs,
        "dense": [one for one, _ in rows],
        "sparse": [other for _, other in rows],
        "difference": statistics.mean(differences),
        "standard error": spread / math.sqrt(count),
        "largest relative difference of the test loss, by epoch": drift,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=3, help="before pruning")
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--seed_epochs", type=int, default=20)
    parser.add_argument("--crossing", type=int, default=3, help="rounds; 0: leave it out")
    parser.add_argument("--data_path", type=Path, default=None, help="folder that holds MNIST")
    parser.add_argument("--out", type=Path, default=Path("measurements/sparse_training.json"))
    arguments = parser.parse_args()
    path = find_mnist(arguments.data_path)
    if path is None:
        raise SystemExit("no MNIST; name the folder that holds it with --data_path")
    dataset = load("mnist", path, seed=1111)
    network, mask = pruned_network(dataset, arguments.epochs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    file = arguments.out.with_suffix(".pt")
    torch.save({"network": network.state_dict(), "mask": dict(mask)}, file)
    ways = Ways(network, mask, dataset)
    result: dict[str, Any] = {"network": "MLP 784-300-100-10", "left": ways.training.reason}
    print(ways.training.reason, flush=True)
    seconds = side_by_side(ways, arguments.rounds)
    for name, times in seconds.items():
        told = f"{statistics.median(times):.4f} ({min(times):.4f} to {max(times):.4f})"
        print(f"{name:<30}{told} s")
    dense = min(("dense, 1 thread", "dense, 2 threads"), key=lambda it: min(seconds[it]))
    result |= {"seconds": seconds, "n": arguments.rounds, "best dense": dense}
    result["ratio"] = ratios(seconds[dense], seconds["sparse"])
    print(f"{dense} / sparse: {result['ratio']}")
    both = two_at_once(path, file, 3 * arguments.rounds)
    file.unlink()
    throughput = statistics.median(seconds[dense]) * sum(1 / spent for spent in both)
    result["two at once"] = {"seconds": both, "of the dense throughput": throughput}
    print(f"two at once: {both} s an epoch, {throughput:.1f} times the dense throughput")
    result["floor"] = floor(ways.training)
    step = min(seconds["sparse"]) / 500
    result["share of the floor"] = result["floor"]["seconds"] / step
    print(f"floor {result['floor']}, a step {step * 1e6:.0f} us")
    result["gradient errors"] = gradient_errors(network, mask, dataset)
    print(f"gradients against float64: {result['gradient errors']}")
    if arguments.crossing:
        result["crossing"] = crossing(dataset, arguments.crossing)
        for row in result["crossing"]:
            print(row)
    if arguments.seeds:
        result["seeds"] = seeds(network, mask, dataset, arguments.seeds, arguments.seed_epochs)
        print(result["seeds"])
    write_json(arguments.out, result)


if __name__ == "__main__":
    main()
