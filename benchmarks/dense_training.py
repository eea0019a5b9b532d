"""Training convolutional networks: the training loop beside the one that most scripts have.

``python -m benchmarks.dense_training`` trains on random 32×32 images, cropped and flipped, in
batches of 100.  The plain loop is a ``DataLoader`` with workers that make each example, and an
``.item()`` every step.  The two go turn and turn about in one process, and a first round is not
counted.  The floor is three times the network's multiply-adds, two operations each, at the rate of
torch's product of large matrices in the same type, measured in the same process.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Examples

from benchmarks.hardware import hardware, write_json
from benchmarks.sparse_training import seeded
from benchmarks.stacked import BATCH, LR, best_of, random_photographs, spread, turn_about
from lossprune.data import Dataset
from lossprune.networks import NETWORKS
from lossprune.training import Forward, make_optimizer, train_epoch

EPOCH, L2, PADDING, SIDE = 45_000, 5e-4, 4, 32
TYPES = {"off": torch.float32, "bf16": torch.bfloat16}


class Photographs(Examples[tuple[Tensor, int]]):
    """Random photographs, one at a time."""

    def __init__(self, dataset: Dataset) -> None:
        self.images = dataset.train.images
        self.labels = dataset.train.labels.tolist()
        self.mean = torch.tensor(dataset.mean).view(-1, 1, 1)
        self.std = torch.tensor(dataset.std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = F.pad(self.images[index].float() / 255, (PADDING,) * 4)
        top, left = torch.randint(2 * PADDING + 1, (2,)).tolist()
        image = image[:, top : top + SIDE, left : left + SIDE]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return (image - self.mean) / self.std, self.labels[index]


def plain_loop(
    dataset: Dataset, network: nn.Module, amp: str, device: torch.device, workers: int
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=0.9, weight_decay=L2)
    loader = DataLoader(
        Photographs(dataset),
        BATCH,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )

    def epoch() -> None:
        network.train()
        running = 0.0
        for inputs, labels in loader:
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
                loss = F.cross_entropy(network(inputs), labels)
            loss.backward()
            optimizer.step()
            running += loss.item()

    return epoch


def our_loop(dataset: Dataset, network: nn.Module, amp: str, compiled: bool) -> Callable[[], None]:
    optimizer = make_optimizer(network, lr=LR, l2=L2)
    forward = Forward(network, amp, compiled=compiled)
    return lambda: (
        train_epoch(network, dataset, optimizer, generator=seeded(7), forward=forward),
        None,
    )[1]


def multiply_adds(network: nn.Module, inputs: Tensor) -> int:
    """Of convolutions and linear layers, for one input."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module.weight, Tensor)
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        total += module.weight.numel() * positions

    layers = [it for it in network.modules() if isinstance(it, nn.Conv2d | nn.Linear)]
    handles = [it.register_forward_hook(count) for it in layers]
    with torch.inference_mode():
        network.eval()(inputs)
    for handle in handles:
        handle.remove()
    return total


def flops(amp: str, device: torch.device, side: int) -> float:
    """Operations a second of a product of large matrices."""
    square = torch.rand(side, side, device=device).to(TYPES[amp])
    return 2 * side**3 / best_of(lambda: square @ square, repeats=5)


def compare(
    name: str, amp: str, options: argparse.Namespace, device: torch.device, peak: float
) -> dict[str, Any]:
    """Images a second of both loops, and the ratio round by round."""
    dataset = random_photographs(options.batches)
    dataset = replace(dataset, augmented=True)
    networks = [NETWORKS[name](shape=dataset.shape, generator=seeded(1)) for _ in range(2)]
    operations = 6 * multiply_adds(networks[0], torch.zeros(1, *dataset.shape))
    plain, ours = (it.to(device) for it in networks)
    seconds = turn_about(
        [
            our_loop(dataset.to(device), ours, amp, options.compile),
            plain_loop(dataset, plain, amp, device, options.workers),
        ],
        options.rounds,
    )
    rates = [[options.batches * BATCH / it for it in each] for each in seconds]
    return {
        "network": name,
        "amp": amp,
        "compile": options.compile,
        "n": options.rounds,
        "lossprune": spread(rates[0]),
        "plain": spread(rates[1]),
        "ratio": spread([ours / plain for ours, plain in zip(*rates, strict=True)]),
        "epoch_s": EPOCH / spread(rates[0])["median"],
        "floor_images": peak / operations,
        "share of the floor": spread(rates[0])["median"] * operations / peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", nargs="*", default=["VGG11", "PreActResNet18"])
    parser.add_argument("--amp", nargs="*", choices=TYPES, default=["off", "bf16"])
    parser.add_argument("--compile", action="store_true", help="our loop through torch.compile")
    parser.add_argument("--batches", type=int, default=50, help="of an epoch's 450")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4, help="of the plain loop")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("measurements/dense_training.json"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if options.device == "auto" else options.device)
    side = 8192 if device.type == "cuda" else 1024
    print(f"{hardware()}, on {device.type}")
    print("| network | amp | n | images/s | s an epoch | plain loop | ratio | of the floor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for amp in options.amp:
        peak = flops(amp, device, side)
        for name in options.networks:
            row = compare(name, amp, options, device, peak)
            rows.append(row)
            ours, plain, ratio = row["lossprune"], row["plain"], row["ratio"]
            print(
                f"| {name} | {amp} | {row['n']} | {ours['median']:.0f} ({ours['min']:.0f} to "
                f"{ours['max']:.0f}) | {row['epoch_s']:.2f} | {plain['median']:.0f} "
                f"({plain['min']:.0f} to {plain['max']:.0f}) | {ratio['median']:.2f} "
                f"({ratio['min']:.2f} to {ratio['max']:.2f}) | {row['share of the floor']:.0%} |",
                flush=True,
            )
    write_json(
        options.out,
        {
            "command": "python -m benchmarks.dense_training",
            "device": device.type,
            "batches": options.batches,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
