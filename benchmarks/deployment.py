"""How fast a deployed network is: dense, masked, compacted and deployed, side by side.

``python -m benchmarks.deployment --network VGG11 --weights vgg11.safetensors --mask
mask.safetensors --batches 1 64`` times the four in turn and prints medians and quartiles, then for
each layer of the deployed one its time, its multiply-adds of kept weights and the share of the
machine's peak.  ``--weights`` is a safetensors state dict or a ``best_model.pt`` of a run; without
it the network is as initialised.  Without ``--mask``, ``--criterion MP`` prunes to ``--sparsity``.
Networks of ``benchmarks.engines`` are then timed beside torch, onnxruntime, OpenVINO and
DeepSparse, each in a process of its own, where this environment, or that of ``--peers PYTHON``,
has them.  With ``--dataset`` the predictions on all test images are compared.
"""

import argparse
import copy
import ctypes
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lossprune
from benchmarks.engine_networks import SUBJECTS
from benchmarks.engines import PROBLEM, compared, show, written
from benchmarks.estimators import load_weights_
from benchmarks.hardware import hardware, write_json
from lossprune.deployment.engines.process import OTHERS
from lossprune.deployment.timing import Timing, interleaved
from lossprune.kernels.compiler import load as load_library


def peak() -> float:
    """Floating-point operations a second of one core, in registers: the most of 100 tries."""
    multiply_add = load_library(Path(__file__).with_name("peak.c")).multiply_add
    numbers = (ctypes.c_float * 2)(1e-3, 1.0)
    return most(multiply_add, ctypes.c_int64(100_000), numbers)


def near_peak(weights: int = 2048, room: int = 24 << 10) -> float:
    """The same of a sparse layer's loop, whose inputs are ``room`` bytes in a near cache."""
    gather = load_library(Path(__file__).with_name("peak.c")).gather
    generator = torch.Generator().manual_seed(0)
    # One vector more than the room, to begin at a whole line; each weight reads 16 of them.
    near = torch.rand(room // 4 + 16, generator=generator)
    begin = -near.data_ptr() % 64 // 4
    places = torch.randint(room // 64 - 16, (weights,), generator=generator)
    offset = (places * 16 + begin).to(torch.int32)
    value = torch.rand(weights, generator=generator)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (near, offset, value)]
    return most(gather, *pointers, ctypes.c_int64(weights), (ctypes.c_float * 1)(0.0))


def most(function: Any, *arguments: Any) -> float:
    """The most operations a second, of 100 tries, of what returns how many it made."""
    function.restype = ctypes.c_int64
    best = 0.0
    for _ in range(100):
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < 1e-3:
            done += function(*arguments)
        best = max(best, done / (time.perf_counter() - began))
    return best


def table(
    model: nn.Module, mask: lossprune.Mask, example: Tensor, seconds: float
) -> tuple[lossprune.Deployed, dict[str, Any]]:
    masked = mask.apply_(copy.deepcopy(model)).eval()
    compacted = lossprune.compact(model, mask).model.eval()
    deployed = lossprune.deploy(model, mask, example, remeasure=True)
    forms = {"dense": model, "masked": masked, "compacted": compacted, "deployed": deployed}
    with torch.inference_mode():
        calls = [(lambda network=network: network(example)) for network in forms.values()]
        timings = dict(zip(forms, interleaved(calls, seconds=seconds, least=15), strict=True))
        expected = masked(example)
        error = float((deployed(example) - expected).abs().max() / expected.abs().max())
    return deployed, {
        "batch": example.shape[0],
        "relative_error": error,
        "forms": {name: vars(timing) for name, timing in timings.items()},
        "ratio": timings["dense"].median / timings["deployed"].median,
        "notes": deployed.notes,
        "layers": [vars(layer) for layer in deployed.layers],
    }


def print_table(found: dict[str, Any], flops: float, threads: int) -> None:
    print(f"\nbatch {found['batch']}: {'; '.join(found['notes'])}")
    print(
        f"largest difference from the masked network: {found['relative_error']:.1e} of the largest"
    )
    print("| form | median ms | quartiles | n | dense / form |\n| --- | --: | --: | --: | --: |")
    dense = found["forms"]["dense"]["median"]
    for name, values in found["forms"].items():
        timing = Timing(**values)
        print(
            f"| {name} | {1e3 * timing.median:.3f} | {1e3 * timing.low:.3f} to "
            f"{1e3 * timing.high:.3f} | {timing.count} | {dense / timing.median:.2f} |"
        )
    print("\n| layer | way | kept | of | dense ms | ms | GFLOP/s | of peak |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    for layer in found["layers"]:
        row = f"| {layer['name']} | {layer['kind']} | {layer['kept']:,} | {layer['total']:,} "
        row += f"| {1e3 * layer['dense_seconds']:.3f} "
        if layer["sparse_seconds"]:
            rate = 2 * layer["multiply_adds"] / layer["sparse_seconds"]
            row += f"| {1e3 * layer['sparse_seconds']:.3f} | {rate / 1e9:.1f} "
            row += f"| {rate / flops / threads:.0%} |"
        else:
            row += "| | | |"
        print(row)
    work = 2 * sum(layer["multiply_adds"] for layer in found["layers"])
    rate = work / found["forms"]["deployed"]["median"]
    print(f"whole network: {rate / 1e9:.1f} GFLOP/s on kept weights, {rate / flops / threads:.0%}")


def beside(
    name: str, masked: nn.Module, mask: lossprune.Mask, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Print what other engines take for the network, in turn with lossprune, and return it."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path) / PROBLEM
        written(folder, name, masked, mask, batch)
        lossprune.save_sparse(masked, mask, folder / "small.safetensors")
        row = compared(Path(path), name, mask, batch, torch.get_num_threads(), options)
    show([row])
    sizes = row["bytes"]
    print(f"bytes: {sizes['model.onnx']:,} of ONNX, {sizes['small.safetensors']:,} of save_sparse")
    return row


def predictions_equal(
    deployed: nn.Module, masked: nn.Module, inputs: Tensor, batch: int
) -> tuple[int, int]:
    """Return how many predictions agree, and of how many."""
    same = 0
    with torch.inference_mode():
        for some in inputs.split(batch):
            same += int((deployed(some).argmax(1) == masked(some).argmax(1)).sum())
    return same, len(inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="VGG11", choices=lossprune.networks.NETWORKS)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--criterion", default="MP")
    parser.add_argument("--sparsity", type=float, default=0.956)
    parser.add_argument("--dataset")
    parser.add_argument("--data_path", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each comparison")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--engines", nargs="*", default=OTHERS, choices=OTHERS)
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment that has the others")
    parser.add_argument("--patience", type=float, default=180, help="seconds for an answer")
    parser.add_argument("--out", type=Path, default=Path("measurements/deployment.json"))
    args = parser.parse_args()
    args.budget = args.seconds / (2 + len(args.engines))
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = (1, 28, 28) if args.network == "MLP" else (3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    model = lossprune.networks.NETWORKS[args.network](shape=shape, generator=generator)
    if args.weights:
        load_weights_(model, args.weights)
    model.eval()
    mask = (
        lossprune.Mask.load(args.mask)
        if args.mask
        else lossprune.prune(model, args.criterion, sparsity=args.sparsity).mask
    )
    flops, near, threads = peak(), near_peak(), torch.get_num_threads()
    print(hardware())
    print(f"{args.network} {mask}, sparsity {mask.sparsity:.5f}")
    print(
        f"peak of one core: {flops / 1e9:.0f} GFLOP/s, of the loop over kept weights with all it "
        f"reads in a near cache {near / 1e9:.0f}; threads: {threads}"
    )
    results = []
    for batch in args.batches:
        example = torch.randn(batch, *shape, generator=generator)
        deployed, found = table(model, mask, example, args.seconds)
        print_table(found, flops, threads)
        masked = mask.apply_(copy.deepcopy(model)).eval()
        if args.network in SUBJECTS:
            found["engines"] = beside(args.network, masked, mask, batch, args)
        if args.dataset:
            from lossprune.data import load

            data = load(args.dataset, str(args.data_path), seed=0)
            same, of = predictions_equal(deployed, masked, data.inputs(data.test.images), batch)
            print(f"same predictions on {same:,} of {of:,} test images")
            found["same_predictions"] = [same, of]
        results.append(found)
    told = {"peak_of_one_core": flops, "peak_of_the_loop": near, "results": results}
    write_json(args.out, told)


if __name__ == "__main__":
    main()
