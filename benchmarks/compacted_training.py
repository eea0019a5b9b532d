"""Fine-tuning pruned convolutional networks: the compacted training beside the dense masked one.

``python -m benchmarks.compacted_training RUN...`` takes the folders of pruned runs and trains
copies of each one's network on random 32×32 images, cropped and flipped, in batches of 100: with
the mask enforced on all weights, and without the channels that lead to no output.  The two go turn
and turn about in one process, and a first round is not counted.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.hardware import hardware, write_json
from benchmarks.sparse_training import seeded
from benchmarks.stacked import random_photographs, spread, turn_about
from lossprune import Mask
from lossprune.data import Dataset
from lossprune.experiment.network_file import load_weights_, read_network
from lossprune.networks import NETWORKS
from lossprune.training import CompactedTraining, DenseTraining, Training, make_optimizer


def pruned_network(folder: Path, dataset: Dataset) -> tuple[nn.Module, Mask]:
    """The network and the mask of a run, where the data set is."""
    device = dataset.train.images.device
    file = folder / "best_model.pt"
    weights, metadata, _ = read_network(file, asked="")
    arch = metadata["architecture"]
    network = NETWORKS[arch](shape=dataset.shape, classes=len(metadata["classes"]))
    load_weights_(network, arch, file, weights, metadata, asked="")
    mask = Mask.load(folder / "mask.safetensors").to(device)
    network.to(device)
    mask.apply_(network)
    return network, mask


def epochs(training: Training, network: nn.Module, mask: Mask) -> Callable[[], None]:
    optimizer = make_optimizer(network, lr=1e-3, l2=5e-4)
    mask.enforce(network, optimizer)
    return lambda: (training.train_epoch(optimizer, generator=seeded(7)), None)[1]


def compare(folder: Path, dataset: Dataset, rounds: int) -> dict[str, Any]:
    """Seconds of both, and the ratio round by round."""
    network, mask = pruned_network(folder, dataset)
    other = copy.deepcopy(network)
    compacted = CompactedTraining(network, mask, dataset)
    dense = DenseTraining(other, dataset, "to compare with")
    works = [epochs(compacted, network, mask), epochs(dense, other, mask)]
    seconds = turn_about(works, rounds)
    config = json.loads((folder / "record.json").read_text())["config"]
    before, after = compacted.multiply_adds
    return {
        "run": {name: config[name] for name in ("arch", "pm", "pi", "reg", "pr")},
        "multiply_adds": [before, after],
        "compacted_s": spread(seconds[0]),
        "dense_s": spread(seconds[1]),
        "ratio": spread([slow / fast for fast, slow in zip(*seconds, strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of pruned runs")
    parser.add_argument("--batches", type=int, default=10, help="of an epoch's 450")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("measurements/compacted_training.json"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    dataset = replace(random_photographs(options.batches), augmented=True).to(options.device)
    threads = torch.get_num_threads()
    print(f"{hardware()}, on {options.device}, {threads} threads, {options.batches} batches")
    print("| run | multiply-adds left | compacted, s | dense, s | ratio |")
    print("| --- | ---: | ---: | ---: | --- |")
    rows = []
    for folder in options.runs:
        row = compare(folder, dataset, options.rounds)
        rows.append(row)
        before, after = row["multiply_adds"]
        run, ratio = row["run"], row["ratio"]
        print(
            f"| {run['arch']}, {run['pm']}, π {run['pi']}, λ {run['reg']:g} | "
            f"{after / before:.0%} | {row['compacted_s']['median']:.2f} | "
            f"{row['dense_s']['median']:.2f} | {ratio['median']:.2f} ({ratio['min']:.2f} to "
            f"{ratio['max']:.2f}) |",
            flush=True,
        )
    write_json(
        options.out,
        {
            "command": "python -m benchmarks.compacted_training",
            "device": options.device,
            "batches": options.batches,
            "rounds": options.rounds,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
