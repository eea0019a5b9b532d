"""What plain fine-tuning makes of a pruned network: the honest rival of a compensation.

The removed weights stay 0 by ``mask.enforce``.  SGD with momentum 0.9 and Adam, batches of 100, a
learning rate that falls to 0 along a cosine; which optimiser and which learning rate of
:data:`GRID`, the accuracy on 5,000 training images decides that the trials have not seen.
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossprune

BATCH, HELD_OUT = 100, 5000
TIMED = 50_000  # visits, to see how many fit into a time
GRID = (
    *(("SGD", lr) for lr in (0.01, 0.03, 0.1, 0.3)),
    *(("Adam", lr) for lr in (0.0003, 0.001, 0.003, 0.01)),
)
# A trial of a long fine-tuning is this part of it, but no shorter than so many visits.
TRIAL, SHORTEST = 0.1, 300_000

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned network: by what, after how many visits to examples, in how many seconds."""

    network: nn.Module
    optimizer: str
    lr: float
    visits: int
    seconds: float


def accuracy(network: nn.Module, examples: Examples) -> float:
    """In per cent."""
    with torch.inference_mode():
        right = sum(
            (network(inputs).argmax(1) == targets).sum().item()
            for inputs, targets in zip(
                examples[0].split(5000), examples[1].split(5000), strict=True
            )
        )
    return 100 * right / len(examples[1])


def tune(
    network: nn.Module,
    mask: lossprune.Mask,
    train: Examples,
    *,
    visits: int | None = None,
    seconds: float | None = None,
    seed: int,
) -> Tuned:
    """Fine-tune a copy, for so many visits, or for as many as fit into ``seconds``.

    The trials that choose optimiser and learning rate come on top of that.
    """
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    held_out, others = (
        (train[0][part], train[1][part]) for part in (order[:HELD_OUT], order[HELD_OUT:])
    )

    def budget(optimizer: str) -> int:
        if visits is not None:
            return visits
        assert seconds is not None
        for count in (BATCH, TIMED):  # the first step takes longer
            began = time.perf_counter()
            trained(network, mask, others, count, optimizer, 0.0, seed)
        return int(seconds * TIMED / (time.perf_counter() - began))

    budgets = {optimizer: budget(optimizer) for optimizer in dict(GRID)}

    def held_out_accuracy(optimizer: str, lr: float) -> float:
        whole = budgets[optimizer]
        count = min(whole, max(int(TRIAL * whole), SHORTEST))
        return accuracy(trained(network, mask, others, count, optimizer, lr, seed), held_out)

    optimizer, lr = max(GRID, key=lambda choice: held_out_accuracy(*choice))
    began = time.perf_counter()
    tuned = trained(network, mask, train, budgets[optimizer], optimizer, lr, seed)
    return Tuned(tuned, optimizer, lr, budgets[optimizer], time.perf_counter() - began)


def trained(
    network: nn.Module,
    mask: lossprune.Mask,
    train: Examples,
    visits: int,
    name: str,
    lr: float,
    seed: int,
) -> nn.Module:
    network = mask.apply_(copy.deepcopy(network))
    kinds = {
        "SGD": lambda: torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, fused=True),
        "Adam": lambda: torch.optim.Adam(network.parameters(), lr=lr, fused=True),
    }
    optimizer, steps = kinds[name](), math.ceil(visits / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    enforcement = mask.enforce(network, optimizer)
    for inputs, targets in drawn(train, visits, seed):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
        schedule.step()
    enforcement.remove()
    return network


def drawn(train: Examples, visits: int, seed: int) -> Iterator[Examples]:
    """Batches of epochs in random order, until there were so many visits."""
    generator = torch.Generator().manual_seed(seed)
    while visits > 0:
        for chosen in torch.randperm(len(train[1]), generator=generator).split(BATCH):
            chosen = chosen[:visits]
            if len(chosen):
                yield train[0][chosen], train[1][chosen]
            visits -= len(chosen)
