"""What a stage costs beside its measurement: nanoseconds a weight.

``python -m benchmarks.selection`` prunes two square linear layers in five stages to 95 %: by MP
without data, and by LM with statistics that are given, whose loss is that of one example.  Each row
is the median stage of several prunings (least to most), on one thread and on two.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lossprune
from benchmarks.hardware import hardware, write_json
from lossprune.pruning import prune_by_stage

STAGES, SPARSITY = 5, 0.95


def stages(criterion: str, width: int) -> list[float]:
    """Seconds of each stage."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
    )
    settings: dict[str, Any] = {"sparsity": SPARSITY, "stages": STAGES, "seed": 1}
    if criterion != "MP":
        batch = torch.randn(1, width), torch.zeros(1, dtype=torch.long)
        given = lossprune.measure(network, [batch], ggn_diagonal=False)
        settings |= {"data": [batch], "recall": lambda stage, measure: given}
    seconds, began = [], time.perf_counter()
    for _ in prune_by_stage(network, criterion, **settings):
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--millions", type=float, default=33.0, help="weights of the network")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("measurements/selection.json"))
    arguments = parser.parse_args()
    width = round((arguments.millions * 1e6 / 2) ** 0.5)
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for criterion in ("MP", "LM"):
            found = [stages(criterion, width) for _ in range(arguments.rounds)]
            each = [second / (2 * width**2) * 1e9 for seconds in found for second in seconds]
            row = {"criterion": criterion, "threads": threads, "weights": 2 * width**2}
            row |= {"median": statistics.median(each), "least": min(each), "most": max(each)}
            rows.append(row)
            told = f"{row['median']:.1f} ns a weight ({row['least']:.1f} to {row['most']:.1f})"
            print(f"{criterion}, {threads} thread(s): {told}", flush=True)
    write_json(
        arguments.out,
        {"command": "python -m benchmarks.selection", "hardware": hardware(), "rows": rows},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
