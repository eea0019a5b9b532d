"""What the exact GGN diagonal costs: the published algorithm beside ``lossprune.measure``.

``python -m benchmarks.curvature`` runs the two in turn, each in a process of its own, on the same
random inputs and freshly initialised networks (the cost does not depend on the values), checks that
they agree, and prints time, ratio, peak memory and the share of this machine's matrix-product rate.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lossprune
from benchmarks.hardware import hardware, write_json
from benchmarks.published import gradient_and_ggn_diagonal
from lossprune.pruning.curvature.squares import product

EXAMPLES = {"MLP": 1000, "VGG11": 100, "PreActResNet18": 100}
SHAPES = {"MLP": (1, 28, 28)}
GOALS = {"MLP": 8.0, "VGG11": 6.5, "PreActResNet18": 4.0}
AGREEMENT = 1e-4  # relative, of each parameter's gradient and diagonal, in the 2-norm


def published(model: nn.Module, batch: tuple[Tensor, Tensor], memory: int | None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of full backward hooks on the first layer
        return gradient_and_ggn_diagonal(model, [batch])


def ours(model: nn.Module, batch: tuple[Tensor, Tensor], memory: int | None) -> Any:
    measured = lossprune.measure(model, [batch], memory=memory)
    return measured.gradient, measured.ggn_diagonal


SIDES = {"published": published, "lossprune": ours}


class PeakMemory:
    """The most memory this process had while entered, beyond what it had before, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            now = self._process.memory_info().rss - self._before
            self.bytes = max(self.bytes, now)


def setting(network: str, device: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = lossprune.networks.NETWORKS[network](generator=generator)
    shape = (EXAMPLES[network], *SHAPES.get(network, (3, 32, 32)))
    inputs = torch.randn(shape, generator=generator)
    targets = torch.randint(10, shape[:1], generator=generator)
    return model.to(device), (inputs.to(device), targets.to(device))


def run_side(task: dict[str, Any]) -> dict[str, Any]:
    """Measure one side once, after one uncounted run on a few examples; in a fresh process."""
    torch.set_num_threads(task["threads"])
    model, (inputs, targets) = setting(task["network"], task["device"])
    side = SIDES[task["side"]]
    side(model, (inputs[:4], targets[:4]), task["memory"])
    flops = FlopCounterMode(display=False, custom_mapping=product_flops())
    seconds, peak = [], 0
    for _ in range(task["repeats"]):
        with PeakMemory() as memory:
            began = time.perf_counter()
            gradient, diagonal = side(model, (inputs, targets), task["memory"])
            synchronise(task["device"])
            seconds.append(time.perf_counter() - began)
        peak = max(peak, memory.bytes)
    with flops:
        side(model, (inputs[:4], targets[:4]), task["memory"])
    torch.save({"gradient": dict(gradient), "diagonal": dict(diagonal)}, task["out"])
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "statistics_bytes": sum(t.nbytes for t in (*gradient.values(), *diagonal.values())),
        "flops": flops.get_total_flops() * EXAMPLES[task["network"]] / 4,
        "rate": product_rate(task["device"]),
    }


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def product_flops() -> dict[Any, Any]:
    """How many operations oneDNN's product does, which torch does not count by itself."""

    def count(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * a[0] * a[1] * b[0]

    return {torch.ops.mkldnn._linear_pointwise.default: count}


def product_rate(device: str) -> float:
    """Floating-point operations a second of a large product of float32 matrices, the best of 10."""
    a, b = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    times = []
    for _ in range(10):
        synchronise(device)
        began = time.perf_counter()
        product(a, b)
        synchronise(device)
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


def in_fresh_process(task: dict[str, Any]) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run_side, (task,))


def disagreement(ours: Path, theirs: Path) -> float:
    a, b = torch.load(ours, weights_only=True), torch.load(theirs, weights_only=True)
    return max(
        float((a[what][name] - b[what][name]).norm() / b[what][name].norm())
        for what in ("gradient", "diagonal")
        for name in b[what]
    )


def compare(network: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side in SIDES:
            task = {
                "side": side,
                "network": network,
                "threads": arguments.threads,
                "device": arguments.device,
                "memory": arguments.memory and arguments.memory << 20,
                "repeats": 1 if side == "published" else 3,
                "out": folder / f"{side}.pt",
            }
            results[side].append(in_fresh_process(task))
    rows = {}
    for side, runs in results.items():
        seconds = [min(run["seconds"]) for run in runs]
        rows[side] = {
            "seconds": statistics.median(seconds),
            "lowest": min(seconds),
            "highest": max(seconds),
            "peak_bytes": max(run["peak_bytes"] for run in runs),
            "statistics_bytes": runs[0]["statistics_bytes"],
            "flops": runs[0]["flops"],
            "rate_share": max(
                run["flops"] / min(run["seconds"]) / max(r["rate"] for r in runs) for run in runs
            ),
        }
    pairs = zip(results["published"], results["lossprune"], strict=True)
    ratios = [min(a["seconds"]) / min(b["seconds"]) for a, b in pairs]
    return {
        "network": network,
        "examples": EXAMPLES[network],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "goal": GOALS[network],
        "disagreement": disagreement(folder / "lossprune.pt", folder / "published.pt"),
        **rows,
    }


def show(row: dict[str, Any]) -> None:
    print(f"\n{row['network']}, {row['examples']} examples")
    for side in SIDES:
        s = row[side]
        peak, statistic = s["peak_bytes"] / 2**20, s["statistics_bytes"] / 2**20
        print(
            f"  {side:<10} {s['seconds']:8.3f} s ({s['lowest']:.3f} to {s['highest']:.3f})   "
            f"peak {peak:6.0f} MiB, {peak - statistic:.0f} beside the statistics   "
            f"{s['flops'] / 1e9:7.0f} Gflop   {100 * s['rate_share']:3.0f} % of the product rate"
        )
    low, high = min(row["ratios"]), max(row["ratios"])
    print(
        f"  ratio      {row['ratio']:8.1f} × ({low:.1f} to {high:.1f}), goal {row['goal']}   "
        f"disagreement {row['disagreement']:.1e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", default=list(EXAMPLES), choices=list(EXAMPLES))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", type=int, default=None, help="budget of lossprune, in MiB")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("measurements/curvature.json"))
    arguments = parser.parse_args()
    print(json.dumps(hardware()))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for network in arguments.networks:
            rows.append(compare(network, arguments, Path(folder)))
            show(rows[-1])
    write_json(arguments.out, {"networks": rows})
    agree = all(row["disagreement"] <= AGREEMENT for row in rows)
    if not agree:
        print(f"the two do not agree to {AGREEMENT}", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
