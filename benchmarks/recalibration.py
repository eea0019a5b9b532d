"""What statistics of batch normalisation that belong to other weights cost a pruned network.

``python -m benchmarks.recalibration`` trains a small residual network on the bundled digits for
each seed, prunes it by MP at once and by QM in 14 stages, and prints the test accuracy right after
pruning: with the running statistics that training left, with those found anew at the end, and with
those found anew after every stage, so that the next one measures with them.
"""

import argparse
import copy
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import lossprune
from benchmarks.defaults import SPARSITIES, Case, digits, scores
from benchmarks.hardware import write_json

# Criteria, and when the statistics are found anew; MP has one stage.
WAYS = (("MP", None), ("MP", "end"), ("QM", None), ("QM", "end"), ("QM", "stages"))


def compute(case: Case, seed: int, examples: int) -> list[dict[str, Any]]:
    dense, _ = scores(case.network, case.test)
    rows = []
    for sparsity in SPARSITIES:
        for criterion, recalibrate in WAYS:
            torch.manual_seed(seed)  # all see the same examples
            batches, began = DataLoader(case.train, 100, shuffle=True), time.perf_counter()
            result = lossprune.prune(
                case.network,
                criterion,
                sparsity=sparsity,
                data=batches,
                examples=examples,
                recalibrate=recalibrate,
            )
            seconds = time.perf_counter() - began
            pruned = result.apply_(copy.deepcopy(case.network))
            accuracy, _ = scores(pruned, case.test)
            row = {"seed": seed, "sparsity": sparsity, "criterion": criterion}
            row |= {"recalibrate": recalibrate, "accuracy": accuracy, "dense": dense}
            rows.append(row | {"seconds": seconds})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| sparsity | criterion | recalibrate | accuracy | n | s |")
    print("| --: | --- | --- | --: | --: | --: |")
    for sparsity in SPARSITIES:
        for way in WAYS:
            key = (sparsity, *way)
            mine = [r for r in rows if (r["sparsity"], r["criterion"], r["recalibrate"]) == key]
            accuracies = [100 * r["accuracy"] for r in mine]
            spread = f" ± {statistics.stdev(accuracies):.1f}" if len(mine) > 1 else ""
            seconds = statistics.median(r["seconds"] for r in mine)
            cells = [f"{sparsity:.0%}", way[0], str(way[1])]
            cells += [f"{statistics.fmean(accuracies):.1f} %{spread}", str(len(mine))]
            print(f"| {' | '.join(cells)} | {seconds:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")  # of networks that are no better than guessing
    rows = []
    for seed in range(given.seeds):
        rows += compute(digits(seed, given), seed, given.examples)
    dense = statistics.fmean(row["dense"] for row in rows)
    print(f"dense {dense:.1%}")
    print_table(rows)
    if given.json is not None:
        write_json(given.json, {"rows": rows})


if __name__ == "__main__":
    main()
