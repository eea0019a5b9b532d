"""How fast one sparse linear layer is, by the weights kept and the rows, beside torch's dense one.

``python -m benchmarks.linear_layers`` takes the layers of a transformer of 384 features, keeps 5,
10 and 20 % of their weights at random, and calls the sparse and the dense one in turn on one
thread.
Inputs and outputs are torch's tensors (rows, features): what it takes to rearrange them counts.
Times are of the thread's processor clock, the least of ``--rounds``; what else the machine does is
left out.  GFLOP/s are of the kept weights alone; ``of peak`` is their share of what a core makes in
registers.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.deployment import peak
from benchmarks.hardware import hardware, write_json
from lossprune.deployment.race import Budget
from lossprune.deployment.sparse.network import SparseNetwork
from lossprune.deployment.sparse.plan import lanes
from lossprune.deployment.sparse_layers import sparse_layer

SIZES = ("384x1536", "1536x384", "384x384")
_LEAST = 2e-3  # seconds of a measurement, far beyond what the clock tells apart


def processor_seconds(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the least processor time of one call of each, called in turn."""
    best = [float("inf")] * len(calls)
    repeats = [1] * len(calls)
    for _ in range(rounds):
        for k, call in enumerate(calls):
            call()
            start = time.thread_time()
            for _ in range(repeats[k]):
                call()
            taken = (time.thread_time() - start) / repeats[k]
            best[k] = min(best[k], taken)
            repeats[k] = max(1, round(_LEAST / best[k]))
    return best


def layer(outputs: int, inputs: int, keep: float) -> nn.Linear:
    made = nn.Linear(inputs, outputs).eval()
    with torch.no_grad():
        made.weight.mul_(torch.rand_like(made.weight) < keep)
    return made


def measured(dense: nn.Linear, x: Tensor, rounds: int) -> dict[str, Any]:
    sparse = sparse_layer("", dense, (x,), Budget(0.01))
    assert isinstance(sparse, SparseNetwork)
    expected = dense.double()(x.double())
    error = float((sparse(x) - expected).abs().max() / expected.abs().max())
    dense.float()
    times = processor_seconds([lambda: dense(x), lambda: sparse(x)], rounds)
    kept = int(torch.count_nonzero(dense.weight))
    return {
        "layer": f"{dense.in_features} → {dense.out_features}",
        "kept": kept / dense.weight.numel(),
        "rows": len(x),
        "dense": times[0],
        "sparse": times[1],
        "gflops": 2e-9 * kept * len(x) / times[1],
        "error": error,
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="inputs x outputs")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("measurements/linear_layers.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    flops = peak()
    print(f"{hardware()}; vectors of {lanes()}; peak of one core: {flops / 1e9:.0f} GFLOP/s")
    print("| layer | kept | rows | dense ms | sparse ms | dense / sparse | GFLOP/s | of peak |")
    print("| --- | --: | --: | --: | --: | --: | --: | --: |")
    results = []
    for size, keep, rows in itertools.product(args.sizes, args.keep, args.rows):
        inputs, outputs = map(int, size.split("x"))
        found = measured(layer(outputs, inputs, keep), torch.randn(rows, inputs), args.rounds)
        results.append(found)
        print(
            f"| {found['layer']} | {keep:.0%} | {rows} | {1e3 * found['dense']:.3f} "
            f"| {1e3 * found['sparse']:.3f} | {found['dense'] / found['sparse']:.2f} "
            f"| {found['gflops']:.1f} | {1e9 * found['gflops'] / flops:.0%} |",
            flush=True,
        )
    write_json(args.out, {"peak_of_one_core": flops, "results": results})


if __name__ == "__main__":
    main()
