"""Convolutions trained over their kept weights, beside torch's dense ones and SparseProp's.

``python -m benchmarks.sparse_convolution layers --weights vgg11.safetensors --images images.tar``
times the layers of VGG11 at a mask (``--mask``, or QM to 0.956 in 14 stages, made here), and three
with random masks: outputs, and gradients of inputs and kept weights (of the first layer, of the
weights alone), each engine in its own layout.  All go turn and turn about; with one thread seconds
are those of the processor, otherwise of the clock.  ``--sparseprop PYTHON`` names the Python of an
environment with SparseProp, which computes the first layer's gradient of the inputs as well, and
needs batches of a multiple of 8: 100 images are filled up to 104 for it.  Ratios are to the fastest
of an engine's layouts, without the copies that some need between layers, and to torch with its maps
turned into blocks and back, as where a sparse network leaves a layer to it.

``... epoch`` times epochs of VGG11 and PreActResNet18, evaluation included, sparse and dense with
the mask enforced, and says memory and where the time goes.  ``... seeds`` fine-tunes a small
residual network on the bundled digits both ways and compares test errors.
"""

import argparse
import statistics
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import lossprune
from benchmarks import convolution_epochs as epochs
from benchmarks import convolution_layers as layers
from benchmarks import convolution_tables as tables
from benchmarks.cells import mean_and_std, words_of
from benchmarks.convolution_seeds import seeds
from benchmarks.deployment import peak
from benchmarks.draws import training_draws
from benchmarks.hardware import hardware, write_json
from lossprune.data import load
from lossprune.networks import NETWORKS

SPARSITY, STAGES = 0.956, 14
NETWORK = "VGG11"


def mask_file(options: argparse.Namespace) -> Path:
    """The mask of VGG11 that is given, or one that is made and kept beside the results."""
    if options.mask is not None:
        return options.mask
    path = options.out.with_name("vgg11-qm-mask.safetensors")
    if not path.exists():
        if options.weights is None or options.images is None:
            raise SystemExit("name --mask, or --weights and --images, with which one is made")
        network = epochs.new_network(NETWORK, options.weights).eval()
        dataset = load("folder", options.images, seed=1111)
        data = training_draws(dataset, 1000, seed=0, size=100)
        found = lossprune.prune(network, "QM", sparsity=SPARSITY, stages=STAGES, data=data)
        path.parent.mkdir(parents=True, exist_ok=True)
        found.mask.save(path)
        print(f"mask: {path}")
    return path


def time_layers(options: argparse.Namespace) -> dict[str, Any]:
    mask, network = lossprune.Mask.load(mask_file(options)), NETWORKS[NETWORK]()
    named = layers.network_layers(network, mask, torch.zeros(1, 3, 32, 32))
    chosen = [*named, *layers.published_layers()]
    if options.layers:
        chosen = [chosen[number] for number in options.layers]
    flops, rows = peak(), []
    print(f"peak of one core: {flops / 1e9:.0f} GFLOP/s")
    with ExitStack() as stack:
        peer, version = None, None
        try:
            if options.sparseprop is not None:
                peer = stack.enter_context(layers.Peer(options.sparseprop))
                version = peer.version
        except OSError as error:
            print(f"SparseProp is left out: {error}", file=sys.stderr)
        for batch in options.batches:
            for layer in chosen:
                rows += layers.measured(layer, batch, options.threads, peer, options.rounds)
                print(f"batch {batch}: {layer.name}", file=sys.stderr, flush=True)
    told = {"peak_of_one_core": flops, "sparseprop": version, "sparsity": mask.sparsity}
    return {**told, "means": print_layers(rows, flops), "rows": rows}


def print_layers(rows: list[layers.Row], flops: float) -> dict[str, Any]:
    """All tables, and the means of their ratios, which are returned."""
    found = {}
    for batch, threads in dict.fromkeys((row["batch"], row["threads"]) for row in rows):
        some = [row for row in rows if (row["batch"], row["threads"]) == (batch, threads)]
        clock = "processor" if threads == 1 else "clock"
        print(f"\nbatch {batch}, threads: {threads}, milliseconds of the {clock}\n")
        tables.print_rows(some, flops)
        for engine in (layers.PEER, layers.DENSE, layers.TURNED):
            means = tables.means(some, engine)
            found[f"{engine}, batch {batch}, threads {threads}"] = means
            for which, ratio in means.items():
                mean, least = ratio["geometric mean"], ratio["least"]
                print(f"× {engine}, {which}: geometric mean {mean:.2f}, least {least:.2f}")
    return found


def time_epochs(options: argparse.Namespace) -> dict[str, Any]:
    if options.images is None:
        raise SystemExit("name the images with --images")
    flops, found = peak(), []
    for name in options.networks:
        if name == NETWORK:
            mask = mask_file(options)
        else:
            mask = options.out.with_name(f"{name.lower()}-mp-mask.safetensors")
            mask.parent.mkdir(parents=True, exist_ok=True)
            network = epochs.new_network(name, None)
            lossprune.prune(network, "MP", sparsity=SPARSITY).mask.save(mask)
        row = epochs.measured_epochs(epochs.task_of(options, name, mask), options.rounds, flops)
        print_epochs(row)
        found.append(row)
    return {"peak_of_one_core": flops, "networks": found}


def print_epochs(row: dict[str, Any]) -> None:
    told = f"{row['training images']:,} training images, threads: {row['threads']}"
    print(f"\n{row['network']}, {row['sparsity']:.2%} removed, {told}, n = {row['rounds']}")
    for part, ratio in row["ratio"].items():
        dense, sparse = (row["seconds"][way][part] for way in epochs.WAYS)
        limits = f"{ratio['min']:.2f} to {ratio['max']:.2f}"
        print(
            f"{part:<12}dense {_seconds(dense)}, sparse {_seconds(sparse)}, "
            f"ratio {ratio['median']:.2f} ({limits})"
        )
    whole = row["parts"]["all"]
    shares = [f"{part} {spent / whole:.0%}" for part, spent in row["parts"].items()]
    print(f"sparse training: {', '.join(shares[:-1])}; {row['share of the peak']:.0%} of the peak")
    for what, unit in (("state bytes", "of the optimizer's state"), ("peak bytes", "at the peak")):
        dense, sparse = (row[what][way] / 2**20 for way in epochs.WAYS)
        print(f"MiB {unit}: dense {dense:.1f}, sparse {sparse:.1f}")


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def compare_seeds(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    found = seeds(options.seeds, options.epochs, options.sparsity)
    for way, errors in found["errors"].items():
        print(f"{way}: test error {mean_and_std([100 * error for error in errors])} %")
    mean, low, high = (100 * value for value in found["difference"].values())
    print(f"sparse − dense: {mean:+.3f} points, {low:+.3f} to {high:+.3f} (95 %, paired)")
    drift = found["largest relative difference of the test loss"]
    print(f"largest relative difference of the test loss: {drift:.1e}")
    return found


WORKS = {"layers": time_layers, "epoch": time_epochs, "seeds": compare_seeds}


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parts = whole.add_subparsers(dest="work", required=True)
    one, two, three = (parts.add_parser(name) for name in WORKS)
    for part in (one, two):
        part.add_argument("--mask", type=Path, help="of VGG11; else one is made")
        part.add_argument("--weights", type=Path, help="of VGG11, safetensors")
        part.add_argument("--images", type=Path, help="folder or archive of images")
        part.add_argument("--rounds", type=int, default=10 if part is one else 3)
    ints = words_of(int)
    one.add_argument("--batches", type=ints, default=[64, 100], help="such as 64,100")
    one.add_argument("--threads", type=ints, default=[1, 2], help="such as 1,2")
    one.add_argument("--layers", type=ints, help="numbers of some, from 0: VGG11's, then three")
    one.add_argument("--sparseprop", metavar="PYTHON", help="of an environment that has it")
    two.add_argument("--networks", type=words_of(str), default=["VGG11", "PreActResNet18"])
    two.add_argument("--examples", type=int, help="training images, if not all")
    for part in (two, three):
        part.add_argument("--threads", type=int, default=2)
    three.add_argument("--seeds", type=int, default=10)
    three.add_argument("--epochs", type=int, default=20, help="of fine-tuning")
    three.add_argument("--sparsity", type=float, default=0.95)
    for name, part in zip(WORKS, (one, two, three), strict=True):
        out = Path(f"measurements/sparse_convolution-{name}.json")
        part.add_argument("--out", type=Path, default=out)
    return whole


def main() -> None:
    options = parser().parse_args()
    warnings.simplefilter("ignore")  # of the time that curvature takes
    print(hardware())
    found = WORKS[options.work](options)
    write_json(options.out, {"command": "python -m benchmarks.sparse_convolution", **found})


if __name__ == "__main__":
    main()
