"""What the statistics of each criterion take in memory, beside a training step of the same batch.

``python -m benchmarks.memory`` runs each in a process of its own, on random inputs, and prints the
peak over what the process had before.  The statistics may take what a training step takes and the
budget of ``measure`` (256 MiB on a CPU) more.  Then QM's statistics with smaller budgets: what they
take beside the statistics themselves should be within 20 % of the budget.
"""

import argparse
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lossprune
from benchmarks.curvature import PeakMemory, setting
from benchmarks.hardware import hardware, write_json
from lossprune.pruning.curvature.probe import MEMORY
from lossprune.training import make_optimizer

NETWORKS = ("MLP", "VGG11", "PreActResNet18")
BUDGETS = (64 << 20, 128 << 20, 256 << 20)

CRITERIA = ("MP", "LM", "QM", "OBD")


def train(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    inputs, targets = batch
    optimizer = make_optimizer(model, lr=0.01, l2=5e-4)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def peak(network: str, what: str, threads: int, budget: int | None = None) -> int:
    """Peak of a training step or of a criterion's statistics; with a budget, beside these."""
    torch.set_num_threads(threads)
    model, batch = setting(network, "cpu")
    with PeakMemory() as memory:
        if what == "training step":
            train(model, batch)
        else:
            criterion = lossprune.CRITERIA[what]
            lossprune.measure(
                model,
                [batch],
                gradient=criterion.gradient,
                ggn_diagonal=criterion.curvature,
                memory=budget,
            )
    weights = sum(weight.nbytes for weight in lossprune.Mask.dense(model).values()) * 4
    return memory.bytes - (0 if budget is None else 2 * weights)


def in_fresh_process(*task: Any) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, task)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("measurements/memory.json"))
    arguments = parser.parse_args()
    print(json.dumps(hardware()))
    columns = ("training step", *CRITERIA)
    print(f"{'peak MiB':<16}" + "".join(f"{what:>15}" for what in columns))
    rows: dict[str, Any] = {}
    for network in NETWORKS:
        row = {}
        for what in columns:
            row[what] = in_fresh_process(network, what, arguments.threads)
        rows[network] = row
        print(f"{network:<16}" + "".join(f"{row[what] / 2**20:15.0f}" for what in columns))
    print(f"{'QM with a budget':<16}" + "".join(f"{budget >> 20:>11} MiB" for budget in BUDGETS))
    budgets: dict[str, Any] = {}
    for network in NETWORKS[1:]:
        found = [in_fresh_process(network, "QM", arguments.threads, b) for b in BUDGETS]
        budgets[network] = dict(zip(map(str, BUDGETS), found, strict=True))
        print(f"{network:<16}" + "".join(f"{used / 2**20:15.0f}" for used in found))
    write_json(
        arguments.out,
        {"peak_bytes": rows, "budget_bytes": MEMORY["cpu"], "beside_statistics": budgets},
    )
    good = all(
        row[what] <= row["training step"] + MEMORY["cpu"]
        for row in rows.values()
        for what in CRITERIA
    )
    print("within a training step and the budget" if good else "NOT within the budget")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
