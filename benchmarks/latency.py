"""Prunings to a share of the dense network's time: what is reached, and what it costs in loss.

``python -m benchmarks.latency --networks best_model.pt --data_path data`` prunes a trained network
until the deployed one takes 70, 50 and 35 % of the dense one's time (``lossprune.DeployedTime``),
by weights that compete globally, per multiply-add and per measured time (``latency_scope``); then
deploys each anew and times it beside the dense network, in turn: the share that is reached, of
medians, with that of the quartiles, how far it is off what was asked for, sparsity, and by how much
the loss rises.  ``--arch VGG11 --networks vgg11.safetensors --dataset folder --data_path images.tar
--judged 2000`` does it with another network.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch

import lossprune
from benchmarks.cells import Cells, Row, print_markdown
from benchmarks.choices import Case
from lossprune.deployment.timing import clock, interleaved
from lossprune.networks import NETWORKS

SCOPES = ("global", "multiply-adds", "latency")


def measured(case: Case, criterion: str, scope: str, share: float, batch: int) -> Row:
    example = next(iter(case.dataset.batches(case.dataset.train, batch)))[0]
    began = time.perf_counter()
    by = lossprune.latency_scope(case.network, example) if scope == "latency" else scope
    network = copy.deepcopy(case.network)
    until = lossprune.DeployedTime(network, example, share)
    asked = {"data": list(case.valid()), "examples": case.examples, "until": until, "scope": by}
    mask = lossprune.prune(network, criterion, **asked).mask
    taken = time.perf_counter() - began
    pruned = mask.apply_(copy.deepcopy(case.network))
    deployed = lossprune.deploy(pruned, mask, example)
    with torch.no_grad():
        calls = [lambda n=n: n(example) for n in (deployed, case.network)]
        fast, dense = interleaved(calls, seconds=4.0, now=clock())
    return {
        "reached": fast.median / dense.median,
        "low": fast.low / dense.high,
        "high": fast.high / dense.low,
        "milliseconds": 1e3 * fast.median,
        "sparsity": mask.sparsity,
        "rise": case.loss(pruned) - case.dense,
        "seconds": taken,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", type=Path, required=True)
    parser.add_argument("--arch", default="MLP", choices=NETWORKS)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--data_path", type=Path, default=Path("data"))
    parser.add_argument("--judged", type=int, help="training examples of the loss; default: all")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--criterion", default="MP")
    parser.add_argument("--scopes", nargs="+", default=SCOPES, choices=SCOPES)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seed", type=int, default=1111)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("measurements/latency.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    case = Case(given.networks, given.seed, given)
    names = ("arch", "criterion", "batch", "scope", "share")
    cells, lines = Cells(given.out, " ".join(sys.argv), names), []
    for batch in given.batches:
        for share in given.shares:
            for scope in given.scopes:
                values = (given.arch, given.criterion, batch, scope, share)
                key = dict(zip(names, values, strict=True))
                if not cells.find(**key):
                    cells.add([{**key, **measured(case, given.criterion, scope, share, batch)}])
                (row,) = cells.find(**key)
                lines.append(
                    [
                        f"batch of {batch}, {100 * share:g} %, {scope}",
                        f"{row['reached']:.1%} ({row['low']:.1%} to {row['high']:.1%})",
                        f"{row['reached'] / share - 1:+.1%}",
                        f"{row['sparsity']:.2%}",
                        f"{row['rise']:+.3f}",
                        f"{row['seconds']:.0f}",
                    ]
                )
    header = ("", "share of the time reached", "off", "sparsity", "rise of the loss", "seconds")
    print_markdown(header, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
