"""Deployed networks beside other inference engines, each in a process of its own, in turn.

``python -m benchmarks.engines --networks VGG11:0.956 encoder:0.95 --batches 1 64 --threads 1
--peers PYTHON`` prunes each network by magnitudes to the sparsity named, every layer alike
(``--weights`` and ``--mask`` give the first network's own), and times torch, lossprune and, in the
environment that PYTHON is of, whichever of onnxruntime, OpenVINO and DeepSparse it has.  All
compute the masked network; outputs are compared with torch's.  With one thread seconds are of the
processor, else of the clock.  A second table has what making the network ready took, and the memory
for it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import lossprune
from benchmarks.engine_networks import SUBJECTS, built
from benchmarks.hardware import hardware, write_json

OWN = ("torch", "lossprune")
OTHERS = ("onnxruntime", "openvino", "deepsparse")
TOLERANCE = 1e-3  # relative to the largest output; above it an engine's answer is called wrong
ROOT = Path(__file__).parents[1]


class Engine:
    """An engine in its process, ready to be timed."""

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        """Start it and wait until the network is ready.

        Raises:
            OSError: the process ended, since the package is not there or cannot run the network.
        """
        self.name = name
        self.log = (folder / f"{name}.log").open("w+")
        command = [python, "-m", "benchmarks.engine_worker", name, str(folder), str(threads)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True,
        )  # fmt: skip
        self.told: dict[str, Any] = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def seconds(self, calls: int) -> list[float]:
        assert self._process.stdin is not None
        print(calls, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self.log.seek(0)
            said = [line.strip() for line in self.log if line.strip()]
            raise OSError(f"{self.name} is left out: {said[-1] if said else 'it ended'}")
        return json.loads(line)


def write_problem(
    folder: Path, name: str, network: torch.nn.Module, mask: lossprune.Mask, batch: int
) -> dict[str, int]:
    """Write what the engines read; return the bytes of the files of weights."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batch, *SUBJECTS[name].shape, generator=generator)
    with torch.no_grad():
        expected = network(inputs)
    np.save(folder / "inputs.npy", inputs.numpy())
    np.save(folder / "expected.npy", expected.numpy())
    (folder / "problem.json").write_text(json.dumps({"network": name}))
    save_file(network.state_dict(), folder / "state.safetensors")
    mask.save(folder / "mask.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter, whose files DeepSparse reads
        torch.onnx.export(
            network, (inputs,), folder / "model.onnx", dynamo=False, opset_version=13,
            input_names=["input"], output_names=["output"],
        )  # fmt: skip
    lossprune.save_sparse(network, mask, folder / "small.safetensors")
    return {
        "onnx": (folder / "model.onnx").stat().st_size,
        "save_sparse": (folder / "small.safetensors").stat().st_size,
    }


def compared(
    name: str, network: torch.nn.Module, mask: lossprune.Mask, batch: int, threads: int,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Time all engines that there are on one network, batch and number of threads."""
    with tempfile.TemporaryDirectory() as path, ExitStack() as stack:
        folder = Path(path)
        sizes = write_problem(folder, name, network, mask, batch)
        pythons = dict.fromkeys(OWN, sys.executable)
        if options.peers:
            pythons |= dict.fromkeys(options.engines, options.peers)
        engines = []
        for engine, python in pythons.items():
            try:
                engines.append(stack.enter_context(Engine(engine, python, folder, threads)))
            except OSError as error:
                print(f"{name}, batch {batch}: {error}", flush=True)
        taken: dict[str, list[float]] = {engine.name: [] for engine in engines}
        for engine in engines:
            engine.seconds(3)
        for number in range(options.rounds):
            for engine in engines[:: 1 if number % 2 else -1]:
                # A call that is not counted: caches and threads come to rest.
                taken[engine.name] += engine.seconds(1 + options.calls)[1:]
        return {
            "network": name,
            "sparsity": mask.sparsity,
            "batch": batch,
            "threads": threads,
            "bytes": sizes,
            "engines": {
                engine.name: engine.told | {"seconds": taken[engine.name]} for engine in engines
            },
        }


def shown(row: dict[str, Any], engines: list[str]) -> str:
    """A line of the first table: medians in milliseconds, least and most, and the ratios."""
    cells = [f"{row['network']} {row['sparsity']:.3f}", str(row["batch"]), str(row["threads"])]
    ours = row["engines"].get("lossprune")
    for name in engines:
        found = row["engines"].get(name)
        if found is None:
            cells.append("")
            continue
        middle, least, most = (1e3 * of(found["seconds"]) for of in (median, min, max))
        cell = f"{middle:.3g} ({least:.3g} to {most:.3g})"
        if name != "lossprune" and ours:
            cell += f", {middle / (1e3 * median(ours['seconds'])):.2f} ×"
        cells.append(cell if found["difference"] <= TOLERANCE else f"{cell}, wrong")
    return f"| {' | '.join(cells)} |"


def ready(row: dict[str, Any], engines: list[str]) -> str:
    """A line of the second: processor seconds until ready, and MiB for it."""
    cells = [f"{row['network']} {row['sparsity']:.3f}", str(row["batch"]), str(row["threads"])]
    for name in engines:
        found = row["engines"].get(name)
        cells.append(
            f"{found['ready_processor_s']:.2f} s, {found['memory_mib']:.0f} MiB" if found else ""
        )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--networks", nargs="+", default=["VGG11:0.956"], metavar="NAME:SPARSITY",
        help=f"of {', '.join(SUBJECTS)}",
    )  # fmt: skip
    parser.add_argument("--weights", type=Path, help="state of the first network, safetensors")
    parser.add_argument("--mask", type=Path, help="of the first network")
    parser.add_argument("--scope", default="layer", help="of pruning by magnitudes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=3, help="counted in each round")
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment that has the others")
    parser.add_argument("--engines", nargs="+", default=OTHERS, choices=OTHERS)
    parser.add_argument("--out", type=Path, default=Path("measurements/engines.json"))
    options = parser.parse_args()
    print(hardware())
    engines = [*OWN, *(options.engines if options.peers else [])]
    head = f"| network | batch | threads | {' | '.join(engines)} |"
    rule = "| --- | --: | --: |" + " --: |" * len(engines)
    print(f"{head}\n{rule}", flush=True)
    rows = []
    for position, asked in enumerate(options.networks):
        name, _, sparsity = asked.partition(":")
        network = built(name)
        if options.weights and not position:
            network.load_state_dict(load_file(options.weights))
        mask = (
            lossprune.Mask.load(options.mask)
            if options.mask and not position
            else lossprune.prune(network, "MP", sparsity=float(sparsity), scope=options.scope).mask
        )
        mask.apply_(network)
        for batch in options.batches:
            for threads in options.threads:
                rows.append(compared(name, network, mask, batch, threads, options))
                print(shown(rows[-1], engines), flush=True)
    print(f"\nready after (processor):\n{head}\n{rule}")
    for row in rows:
        print(ready(row, engines))
    write_json(options.out, {"rows": rows})


if __name__ == "__main__":
    main()
