"""Many networks at once, beside the same networks one after the other through the dense loop.

``python -m benchmarks.stacked`` trains MLPs 784-300-100-10 pruned to 0.98847 (at random, but with
as many weights of each layer as QM in 14 stages leaves of a network trained on MNIST), each with an
L2 of its own, all over one order of random images of MNIST's size, and prints model-epochs a second
(an epoch is 500 batches of 100).  An epoch is cut short to ``--batches`` batches, with all that the
stack does at its beginning and end.  One after the other are at most ``--alone`` networks: their
rate does not depend on how many follow.  On a GPU the sparse stack, over the surviving weights
alone, goes beside them.  All go turn and turn about.  Beside them stand

* the floors: the operations of a step at the rate of torch's product of large matrices, or bytes
  at the rate of a large copy, whichever takes longer, both measured here; of the sparse step, the
  operations of the surviving weights;
* with ``--others N`` the seconds a step of convolutional networks takes, alone and N at once.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.hardware import hardware, write_json
from benchmarks.sparse_training import SPARSITY, random_mask, seeded
from benchmarks.training import random_mnist
from lossprune.data import Dataset, Split
from lossprune.networks import NETWORKS
from lossprune.pruning import Mask
from lossprune.training import (
    SparseStack,
    StackedTraining,
    bytes_per_member,
    make_optimizer,
    train_epoch,
)

BATCH, EPOCH, LR = 100, 500, 0.01
LAYERS = ((784, 300), (300, 100), (100, 10))
WEIGHTS = sum(inputs * outputs for inputs, outputs in LAYERS)


# Of 266,200: what QM leaves of an MLP after 400 epochs, in 14 stages, on 1000 examples, seed 1111.
KEPT = {"fc1.weight": 1431, "fc2.weight": 1148, "fc3.weight": 490}


def pruned_mask(network: nn.Module, name: str) -> Mask:
    """Return a random mask: of the MLP with as many weights of each layer as QM leaves."""
    if name != "MLP":
        return random_mask(network, 1 - SPARSITY)
    kept = {}
    for parameter, count in KEPT.items():
        weight = network.get_parameter(parameter)
        chosen = torch.randperm(weight.numel(), generator=seeded(3))[:count]
        kept[parameter] = torch.zeros(weight.numel(), dtype=torch.bool)
        kept[parameter][chosen] = True
        kept[parameter] = kept[parameter].view(weight.shape)
    return Mask(kept)


class Runs:
    """Networks with masks and optimizers of their own."""

    def __init__(self, count: int, device: torch.device, dataset: Dataset, name: str) -> None:
        self.dataset = dataset
        self.networks = [
            NETWORKS[name](
                shape=dataset.shape, classes=len(dataset.classes), generator=seeded(number)
            ).to(device)
            for number in range(count)
        ]
        self.masks = [pruned_mask(it.cpu(), name).to(device) for it in self.networks]
        for network, mask in zip(self.networks, self.masks, strict=True):
            mask.apply_(network.to(device))
        self.optimizers = [
            make_optimizer(it, lr=LR, l2=1e-5 * (1 + number))
            for number, it in enumerate(self.networks)
        ]

    def one_after_the_other(self) -> None:
        for network, mask, optimizer in zip(
            self.networks, self.masks, self.optimizers, strict=True
        ):
            with mask.enforce(network, optimizer):
                train_epoch(network, self.dataset, optimizer, generator=seeded(7))

    def stack(self, together: bool | None = None) -> Callable[[], None]:
        datasets = [self.dataset] * len(self.networks)
        training = StackedTraining(self.networks, self.masks, datasets, together=together)
        return self._epoch_of(training)

    def sparse_stack(self) -> Callable[[], None]:
        datasets = [self.dataset] * len(self.networks)
        return self._epoch_of(SparseStack(self.networks, self.masks, datasets))

    def _epoch_of(self, training: StackedTraining | SparseStack) -> Callable[[], None]:
        count = len(self.networks)

        def epoch() -> None:
            generators = [seeded(7) for _ in range(count)]
            training.train_epoch(self.optimizers, generators=generators)

        return epoch


def timed(work: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def turn_about(works: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each in every round; the order alternates, and a first call is not counted."""
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(rounds):
        for which in range(len(works))[:: 1 if number % 2 else -1]:
            seconds[which].append(timed(works[which]))
    return seconds


def best_of(work: Callable[[], object], repeats: int = 20) -> float:
    work()
    return min(timed(lambda: (work(), None)[1]) for _ in range(repeats))


def peaks(device: torch.device) -> dict[str, float]:
    """Operations a second of a product of large matrices, bytes a second of a large copy."""
    square = torch.rand(2048, 2048, device=device)
    source = torch.rand(2**26, device=device)
    target = torch.empty_like(source)
    return {
        "flop/s": 2 * 2048**3 / best_of(lambda: square @ square),
        "bytes/s": 2 * 4 * 2**26 / best_of(lambda: target.copy_(source)),
    }


def floor(peak: dict[str, float], cached: bool) -> dict[str, float]:
    """Seconds that a step of one network takes at those rates.

    Operations: two products of every layer, and a third of all but the first.  Bytes: weights read
    by the forward pass and read and written by the step, momentum read and written, mask read, in
    four bytes each; or none, where weights stay in the caches.
    """
    flop = 2 * BATCH * (2 * WEIGHTS + sum(inputs * outputs for inputs, outputs in LAYERS[1:]))
    moved = 0 if cached else 6 * 4 * WEIGHTS
    seconds = {"operations": flop / peak["flop/s"], "bytes": moved / peak["bytes/s"]}
    return {
        **seconds,
        "flop": flop,
        "moved": moved,
        "seconds": max(seconds.values()),
        "sparse seconds": (1 - SPARSITY) * flop / peak["flop/s"],
    }


def shortened(dataset: Dataset, batches: int, device: torch.device) -> Dataset:
    train = dataset.train.take(torch.arange(batches * BATCH))
    return replace(dataset, train=train).to(device)


def random_photographs(batches: int) -> Dataset:
    generator = seeded(0)
    split = Split(
        torch.randint(0, 256, (batches * BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator),
        torch.arange(batches * BATCH) % 10,
    )
    names = tuple("0123456789")
    return Dataset("random 32×32", split, split, split, names, (0.5,) * 3, (0.25,) * 3)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(
    count: int, options: argparse.Namespace, device: torch.device, dataset: Dataset, together: bool
) -> dict[str, Any]:
    """Model-epochs a second, stacked and alone, and the ratios round by round."""
    alone = Runs(min(count, options.alone), device, dataset, "MLP")
    works = {"stacked": (count, Runs(count, device, dataset, "MLP").stack(together))}
    if device.type == "cuda":
        works["sparse stack"] = (count, Runs(count, device, dataset, "MLP").sparse_stack())
    works["one after the other"] = (len(alone.networks), alone.one_after_the_other)
    seconds = turn_about(
        [work for _, work in works.values()],
        options.rounds if count < 100 else options.rounds_of_many,
    )
    share = options.batches / EPOCH
    rates = {
        name: [networks * share / it for it in own]
        for (name, (networks, _)), own in zip(works.items(), seconds, strict=True)
    }
    by_round = rates["one after the other"]
    ratios = {
        f"ratio, {name}": spread([one / two for one, two in zip(own, by_round, strict=True)])
        for name, own in rates.items()
        if own is not by_round
    }
    return {
        "networks": count,
        "together": together,
        "n": len(by_round),
        **{name: spread(own) for name, own in rates.items()},
        **ratios,
    }


def shown(row: dict[str, Any], least: dict[str, float]) -> str:
    """A line of the table."""
    cells = [str(row["networks"]), str(row["n"])]
    for name, step in (("stacked", "seconds"), ("sparse stack", "sparse seconds")):
        if name in row:
            ratio, rate = row[f"ratio, {name}"], row[name]["median"]
            row[f"share of the floor, {name}"] = rate * EPOCH * least[step]
            cells += [
                f"{rate:.3f}",
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
                f"{rate * EPOCH * least[step]:.0%}",
            ]
        else:
            cells += ["", "", ""]
    cells.append(f"{row['one after the other']['median']:.3f}")
    return f"| {' | '.join(cells)} |"


def compare_others(name: str, count: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a step of one network, stacked and alone."""
    batches = 2
    dataset = random_photographs(batches).to(device)
    runs, few = (Runs(it, device, dataset, name) for it in (count, 1))
    stacked, alone = turn_about([runs.stack(), few.one_after_the_other], rounds)
    return {
        "network": name,
        "networks": count,
        "n": rounds,
        "stacked": spread([it / batches / count for it in stacked]),
        "alone": spread([it / batches for it in alone]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 10, 82, 410])
    parser.add_argument("--batches", type=int, default=50, help="of an epoch's 500")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rounds_of_many", type=int, default=1, help="of 100 networks or more")
    parser.add_argument("--alone", type=int, default=10, help="networks one after the other")
    parser.add_argument("--others", type=int, default=0, help="convolutional networks at once")
    parser.add_argument("--at_once", action="store_true", help="on the CPU as well: all at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("measurements/stacked.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    together = options.at_once or device.type == "cuda"
    dataset = shortened(random_mnist(), options.batches, device)
    peak = peaks(device)
    least = floor(peak, cached=not together)
    print(f"{hardware()}, on {device.type}, {options.threads} threads")
    print(
        f"{peak['flop/s'] / 1e9:.0f} Gflop/s, {peak['bytes/s'] / 1e9:.1f} GB/s; "
        f"floor of a step {least['seconds'] * 1e6:.0f} µs, "
        f"{1 / (EPOCH * least['seconds']):.2f} model-epochs a second"
    )
    network = NETWORKS["MLP"](generator=seeded(0))
    print(f"{bytes_per_member(network, random_mnist()) / 1e6:.1f} MB a network, with its own order")
    print("| networks | n | stacked | ratio | floor | sparse stack | ratio | floor | alone |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for count in options.counts:
        rows.append(compare(count, options, device, dataset, together))
        print(shown(rows[-1], least), flush=True)
    others = []
    if options.others:
        measure = partial(compare_others, rounds=options.rounds, device=device)
        others = [measure(name, options.others) for name in ("VGG11", "VGG11BN")]
        for row in others:
            print(
                f"{row['network']}: a step of one network {row['stacked']['median']:.3f} s in a "
                f"stack of {row['networks']}, {row['alone']['median']:.3f} s alone (n={row['n']})"
            )
    write_json(
        options.out,
        {
            "command": "python -m benchmarks.stacked",
            "device": device.type,
            "batches": options.batches,
            "peak": peak,
            "floor": least,
            "rows": rows,
            "others": others,
        },
    )


if __name__ == "__main__":
    main()
