"""What the estimators of the GGN diagonal cost, how far off they are, and what masks they give.

``python -m benchmarks.estimators --network VGG11 --weights vgg11.safetensors --dataset folder
--data_path images.tar.gz`` measures 1000 examples exactly and with each estimator, and prints the
time, the share of the output Hessian's trace that was skipped, the error of the diagonal, and how
much of the mask of a one-stage QM pruning agrees with the exact one's.  ``--weights`` is a
safetensors state dict or a ``best_model.pt`` of a run.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lossprune
from benchmarks.hardware import hardware, write_json
from lossprune.data import load
from lossprune.experiment.network_file import read_network

ESTIMATORS = (
    "exact",
    "tolerance:0.0001",
    "tolerance",
    "tolerance:0.01",
    "monte-carlo",
    "monte-carlo:1",
)


def load_weights_(model: nn.Module, path: Path) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        model.load_state_dict(load_file(path))
    else:
        model.load_state_dict(dict(read_network(path)[0]))


def measured(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], estimator: str, repeats: int
) -> tuple[lossprune.Statistics, list[float]]:
    times = []
    for _ in range(repeats):
        generator = torch.Generator().manual_seed(0)
        began = time.perf_counter()
        statistics = lossprune.measure(
            model, batches, gradient=False, estimator=estimator, generator=generator
        )
        times.append(time.perf_counter() - began)
    return statistics, times


def errors(found: lossprune.Statistics, exact: lossprune.Statistics) -> dict[str, float]:
    a = torch.cat([found.ggn_diagonal[name].flatten() for name in exact.ggn_diagonal])
    b = torch.cat([tensor.flatten() for tensor in exact.ggn_diagonal.values()])
    relative = ((a - b).abs() / b)[b > 0].double()
    ordered = relative.sort().values
    return {
        "norm": float((a - b).norm() / b.norm()),
        "median": float(ordered[len(ordered) // 2]),
        "p99": float(ordered[int(0.99 * (len(ordered) - 1))]),
        "largest": float(ordered[-1]),
    }


def agreement(a: lossprune.Mask, b: lossprune.Mask) -> float:
    """Of the weights that the exact mask keeps, how many the other keeps too."""
    both = sum(int((a[name] & b[name]).sum()) for name in b)
    return both / (b.total - b.removed)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--network", default="MLP", choices=list(lossprune.networks.NETWORKS))
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--data_path", type=Path, default=Path("data"))
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(hardware()))
    dataset = load(arguments.dataset, arguments.data_path, seed=1111)
    model = lossprune.networks.NETWORKS[arguments.network](
        shape=dataset.shape, classes=len(dataset.classes)
    )
    load_weights_(model, arguments.weights)
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(1))
    batches = list(dataset.batches(dataset.train, 100, order=order[: arguments.examples]))

    print(
        "estimator            seconds            skipped   error in norm   median     99 %   "
        "largest   kept weights that agree"
    )
    rows: list[dict[str, Any]] = []
    exact = exact_mask = None
    for estimator in ESTIMATORS:
        found, times = measured(model, batches, estimator, arguments.repeats)
        mask = lossprune.prune(
            model,
            "QM",
            sparsity=arguments.sparsity,
            data=batches,
            stages=1,
            estimator=estimator,
            seed=0,
        ).mask
        exact, exact_mask = exact or found, exact_mask or mask
        row = {
            "estimator": estimator,
            "seconds": times,
            "skipped": found.skipped,
            "errors": errors(found, exact),
            "agreement": agreement(mask, exact_mask),
        }
        rows.append(row)
        error = row["errors"]
        print(
            f"{estimator:<18} {min(times):7.3f} ({max(times):7.3f})   {found.skipped:9.2e}   "
            f"{error['norm']:13.2e}   {error['median']:.1e}   {error['p99']:.1e}   "
            f"{error['largest']:.1e}   {100 * row['agreement']:.2f} %",
            flush=True,
        )
    out = arguments.out or Path(f"measurements/estimators-{arguments.network}.json")
    write_json(out, {"network": arguments.network, "examples": arguments.examples, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
