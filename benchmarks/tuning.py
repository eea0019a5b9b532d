"""What ``lossprune.deploy`` takes, and whether it chooses the same while other programs run.

``python -m benchmarks.tuning --networks VGG11:0.956:64 encoder:0.95:1 --busy 2`` deploys each
network (name, sparsity, batch) on one thread, three times: with nothing of its own beside it, while
as many processes as ``--busy`` says keep a core each, and from the plan that is then kept.  Seconds
are of the processor and of the clock, without the compiler's; a call's are the shortest of ten, of
the processor.  Layers are pruned by magnitudes, all alike (``--weights`` and ``--mask`` give the
first network's own).
"""

import argparse
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lossprune
from benchmarks.engine_networks import SUBJECTS, built
from benchmarks.hardware import hardware, write_json
from lossprune.deployment.sparse.parts import sparse_networks
from lossprune.deployment.sparse.plan import library
from lossprune.deployment.timing import interleaved

KINDS = ("alone", "busy", "kept")


def deployed(
    model: torch.nn.Module, mask: lossprune.Mask, example: torch.Tensor, kind: str, busy: int
) -> dict[str, Any]:
    """Deploy once, beside ``busy`` processes that keep a core each where it is to be so."""
    with ExitStack() as others:
        for _ in range(busy if kind == "busy" else 0):
            process = others.enter_context(
                subprocess.Popen([sys.executable, "-c", "while True: pass"])
            )
            others.callback(process.kill)
        began, worked = time.perf_counter(), time.process_time()
        fast = lossprune.deploy(model, mask, example, remeasure=kind != "kept")
        seconds, processor = time.perf_counter() - began, time.process_time() - worked
    with torch.inference_mode():
        (timing,) = interleaved([lambda: fast(example)], seconds=0.1, now=time.thread_time)
    tunings = [part.tuning for part in sparse_networks(fast)]
    return {
        "kind": kind,
        "processor_seconds": processor,
        "seconds": seconds,
        "call_seconds": timing.best,
        "note": fast.notes[-1],
        "ways": fast.seconds,
        "layers": {layer.name: layer.kind for layer in fast.layers},
        "tiles": [dict(tuning.tiles) for tuning in tunings],
        "few": [tuning.few for tuning in tunings],
    }


def told(row: dict[str, Any], first: dict[str, Any]) -> str:
    """A line of the table, with what differs from the first of the network."""
    pairs = [
        (tile, other.get(target))
        for own, other in zip(row["tiles"], first["tiles"], strict=False)
        for target, tile in own.items()
    ]
    same = sum(tile == other for tile, other in pairs)
    layers = "the same" if row["layers"] == first["layers"] else "others"
    return (
        f"| {row['network']} | {row['batch']} | {row['kind']} | {row['processor_seconds']:.2f} "
        f"| {row['seconds']:.2f} | {1e3 * row['call_seconds']:.3g} | {layers} "
        f"| {same} of {len(pairs)} | {row['note']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--networks", nargs="+", default=["VGG11:0.956:64"], metavar="NAME:SPARSITY:BATCH",
        help=f"of {', '.join(SUBJECTS)}",
    )  # fmt: skip
    parser.add_argument("--weights", type=Path, help="state of the first network, safetensors")
    parser.add_argument("--mask", type=Path, help="of the first network")
    parser.add_argument("--scope", default="layer", help="of pruning by magnitudes")
    parser.add_argument("--busy", type=int, default=1, help="processes that keep a core each")
    parser.add_argument("--out", type=Path, default=Path("measurements/tuning.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    library()  # compiled, if it is not yet
    print(hardware())
    print(
        "| network | batch | others | processor s | s | ms a call | sparse layers | same tiles | |"
    )
    print("| --- | --: | --- | --: | --: | --: | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    for asked in options.networks:
        name, sparsity, batch = asked.split(":")
        network = built(name)
        mask = None
        if asked == options.networks[0]:
            if options.weights:
                network.load_state_dict(load_file(options.weights))
            mask = options.mask and lossprune.Mask.load(options.mask)
        if mask is None:
            pruned = lossprune.prune(network, "MP", sparsity=float(sparsity), scope=options.scope)
            mask = pruned.mask
        generator = torch.Generator().manual_seed(1)
        example = torch.randn(int(batch), *SUBJECTS[name].shape, generator=generator)
        found = [deployed(network, mask, example, kind, options.busy) for kind in KINDS]
        for row in found:
            rows.append({"network": f"{name} {mask.sparsity:.3f}", "batch": int(batch), **row})
            print(told(rows[-1], {**rows[-1], **found[0]}), flush=True)
    write_json(options.out, {"rows": rows})


if __name__ == "__main__":
    main()
