"""Deployed networks beside other inference engines, each in a process of its own, in turn.

``python -m benchmarks.engines --peers PYTHON`` prunes each network by magnitudes, every layer alike
(``--weights`` and ``--mask`` give the first network's own), and times torch, lossprune and
onnxruntime, OpenVINO and DeepSparse where the environment of PYTHON (this one if not given) has
them, at every batch size and number of threads.  All compute the masked network; outputs are
compared with torch's.  With one thread seconds are of the processor, else of the clock.  Each
engine of a row has ``--budget`` seconds; one that does not answer in ``--patience`` seconds, or
cannot run the network, is left out with a line.  A second table has what making the network ready
took, and the memory for it.  ``--show FILE`` prints the tables of an earlier measurement.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import lossprune
from benchmarks.engine_networks import SUBJECTS, built
from benchmarks.hardware import hardware, write_json
from lossprune.deployment.engines.problem import write_problem
from lossprune.deployment.engines.process import (
    OTHERS,
    TOLERANCE,
    Engine,
    EngineError,
    Ready,
    timed_in_turn,
    worker_command,
)

OWN = ("lossprune", "torch")
NETWORKS = (
    "MLP:0.98847", "VGG11:0.956", "PreActResNet18:0.956", "MobileNet:0.9", "encoder:0.95",
    "ViT:0.9",
)  # fmt: skip
PROBLEM = "problem"
ROOT = Path(__file__).parents[1]


def written(
    folder: Path, name: str, network: torch.nn.Module, mask: lossprune.Mask, batch: int
) -> None:
    """Write what the engines read into a new folder."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batch, *SUBJECTS[name].shape, generator=generator)
    write_problem(folder, network, inputs)
    (folder / "problem.json").write_text(json.dumps({"network": name}))
    save_file(network.state_dict(), folder / "state.safetensors")
    mask.save(folder / "mask.safetensors")


def started(name: str, folder: Path, threads: int, peers: str | None, patience: float) -> Engine:
    """Start one engine for the networks of a folder."""
    own = [sys.executable, "-m", "benchmarks.engine_worker", name, str(folder), str(threads)]
    other = worker_command(peers or sys.executable, name, folder, threads)
    command = own if name in OWN else other
    return Engine(name, command, folder / f"{name}-{threads}.log", patience, ROOT)


def compared(
    folder: Path, name: str, mask: lossprune.Mask, batch: int, threads: int,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Time all engines that there are on the problem of a folder, and return the row."""
    left_out: dict[str, str] = {}
    rows: dict[str, Ready] = {}
    with ExitStack() as stack:
        for engine_name in (*OWN, *options.engines):
            try:
                engine = started(engine_name, folder, threads, options.peers, options.patience)
                stack.enter_context(engine).ready(PROBLEM)
                rows[engine_name] = Ready(engine, PROBLEM)
            except EngineError as error:
                left_out[engine_name] = str(error)
        taken, lost = timed_in_turn(rows, options.budget)
    for engine_name, reason in (left_out | lost).items():
        print(f"{engine_name} is left out: {reason}", file=sys.stderr, flush=True)
    return {
        "network": name,
        "sparsity": mask.sparsity,
        "batch": batch,
        "threads": threads,
        "bytes": {path.name: path.stat().st_size for path in (folder / PROBLEM).iterdir()},
        "engines": {
            engine_name: {
                "version": rows[engine_name].engine.version,
                **rows[engine_name].told,
                "seconds": seconds,
            }
            for engine_name, seconds in taken.items()
        },
        "left_out": left_out | lost,
    }


def pruned(
    asked: str, options: argparse.Namespace, *, first: bool
) -> tuple[str, torch.nn.Module, lossprune.Mask]:
    """Return name, masked network and mask for NAME:SPARSITY."""
    name, _, sparsity = asked.partition(":")
    network = built(name)
    if options.weights and first:
        network.load_state_dict(load_file(options.weights))
    mask = (
        lossprune.Mask.load(options.mask)
        if options.mask and first
        else lossprune.prune(network, "MP", sparsity=float(sparsity), scope=options.scope).mask
    )
    mask.apply_(network)
    return name, network, mask


def is_wrong(found: dict[str, Any]) -> bool:
    """Whether an engine's outputs are not torch's."""
    return not (found["difference"] is not None and found["difference"] <= TOLERANCE)


def shown(row: dict[str, Any], engines: list[str]) -> str:
    """A line of the first table: ours with least and most, medians and ratios of the others."""
    cells = _head_of(row)
    ours = row["engines"].get("lossprune")
    for name in engines:
        found = row["engines"].get(name)
        if found is None:
            cells.append("–")
            continue
        middle, least, most = (1e3 * of(found["seconds"]) for of in (median, min, max))
        cell = f"{middle:.3g}"
        if name == "lossprune":
            cell += f" ({least:.3g} to {most:.3g})"
        elif ours:
            cell += f", {middle / (1e3 * median(ours['seconds'])):.2f} ×"
        cells.append(f"{cell}, wrong" if is_wrong(found) else cell)
    return f"| {' | '.join(cells)} |"


def ready(row: dict[str, Any], engines: list[str]) -> str:
    """A line of the second: processor seconds until ready, the first call, and MiB for both."""
    cells = _head_of(row)
    for name in engines:
        found = row["engines"].get(name)
        cells.append(
            f"{found['ready_processor_s']:.2f} s, {1e3 * found['first_call_s']:.3g} ms, "
            f"{found['memory_mib']:.0f} MiB"
            if found
            else "–"
        )
    return f"| {' | '.join(cells)} |"


def _head_of(row: dict[str, Any]) -> list[str]:
    return [f"{row['network']} {row['sparsity']:.3f}", str(row["batch"]), str(row["threads"])]


def heading(engines: list[str]) -> str:
    head = f"| network | batch | threads | {' | '.join(engines)} |"
    return f"{head}\n| --- | --: | --: |{' --: |' * len(engines)}"


def show(rows: list[dict[str, Any]]) -> None:
    """Print both tables of what was measured, with the engines that any row has."""
    there = {name for row in rows for name in row["engines"]}
    engines = [name for name in (*OWN, *OTHERS) if name in there]
    counts = [len(found["seconds"]) for row in rows for found in row["engines"].values()]
    print(f"\nms: median of {min(counts)} to {max(counts)} calls (least to most of ours); × ours")
    print(heading(engines), *(shown(row, engines) for row in rows), sep="\n")
    print("\nprocessor seconds until ready; the first call; memory for both")
    print(heading(engines), *(ready(row, engines) for row in rows), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--networks", nargs="+", default=NETWORKS, metavar="NAME:SPARSITY",
        help=f"of {', '.join(SUBJECTS)}",
    )  # fmt: skip
    parser.add_argument("--weights", type=Path, help="state of the first network, safetensors")
    parser.add_argument("--mask", type=Path, help="of the first network")
    parser.add_argument("--scope", default="layer", help="of pruning by magnitudes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=float, default=1.5, help="seconds an engine and row")
    parser.add_argument("--patience", type=float, default=180, help="seconds for an answer")
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment that has the others")
    parser.add_argument("--engines", nargs="*", default=OTHERS, choices=OTHERS)
    parser.add_argument("--show", type=Path, metavar="FILE", help="of an earlier measurement")
    parser.add_argument("--out", type=Path, default=Path("measurements/engines.json"))
    options = parser.parse_args()
    if options.show:
        show(json.loads(options.show.read_text())["rows"])
        return
    print(hardware())
    engines = [*OWN, *options.engines]
    print(heading(engines), flush=True)
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for asked in options.networks:
        name, network, mask = pruned(asked, options, first=asked == options.networks[0])
        for batch in options.batches:
            with tempfile.TemporaryDirectory() as path:
                written(Path(path) / PROBLEM, name, network, mask, batch)
                lossprune.save_sparse(network, mask, Path(path) / PROBLEM / "small.safetensors")
                for threads in options.threads:
                    rows.append(compared(Path(path), name, mask, batch, threads, options))
                    print(shown(rows[-1], engines), flush=True)
        print(f"{time.monotonic() - began:.0f} s so far", file=sys.stderr, flush=True)
        write_json(options.out, {"rows": rows})
    show(rows)


if __name__ == "__main__":
    main()
