"""A whole pruning run beside the published algorithm, and what following the mask saves.

``python -m benchmarks.pruning --network VGG11 --weights vgg11.safetensors --data_path images.tar``
prunes by QM in 14 stages of 1000 images to a sparsity of 0.956.  After every stage the same
statistics are measured on 100 images with the mask given, and on a copy of the network with its
weights zeroed, where nothing tells that they could be left out: the ratio is what following the
mask saves.  The published algorithm is timed on 100 images of the first stage, and multiplied: its
cost is proportional to the images and does not depend on the mask.

Without ``--weights`` the network is as initialised, its batch-norm statistics set by one pass over
10,000 images; without ``--data_path`` the images are random.
"""

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lossprune
from benchmarks.hardware import hardware, write_json
from benchmarks.published import gradient_and_ggn_diagonal
from lossprune.data import Dataset, load
from lossprune.experiment.stage_examples import StageExamples
from lossprune.pruning import prune_by_stage

SPARSITY, REG, TIMED = 0.956, 1e-3, 100
GOALS = {"VGG11": 6.5, "PreActResNet18": 4.0}
Batches = list[tuple[Tensor, Tensor]]


class RandomImages:
    """As many random images at every stage, new ones each time."""

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.stage = 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.stage)
        for _ in range(0, self.examples, 100):
            images = torch.randn(100, 3, 32, 32, generator=generator)
            yield images, torch.randint(10, (100,), generator=generator)


def build(network: str, weights: Path | None, dataset: Dataset | None) -> nn.Module:
    model = lossprune.networks.NETWORKS[network](generator=torch.Generator().manual_seed(1111))
    if weights is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights))
    elif any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()):
        set_batch_norm_(model, dataset)
    return model.eval()


def set_batch_norm_(model: nn.Module, dataset: Dataset | None) -> None:
    """Set the running statistics to those of 10,000 images."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # a plain average over the batches
    model.train()
    if dataset is None:
        images = iter(RandomImages(10_000))
    else:
        order = torch.arange(min(10_000, len(dataset.train)))
        images = dataset.batches(dataset.train, 100, order=order)
    with torch.no_grad():
        for inputs, _ in images:
            model(inputs)


def seconds(function: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def saved(
    model: nn.Module, mask: lossprune.Mask, batches: Batches, repeats: int
) -> tuple[float, float]:
    """Seconds for the statistics of 100 images at a mask: following it, and not."""
    zeroed = mask.apply_(copy.deepcopy(model))
    return (
        seconds(lambda: lossprune.measure(model, batches, mask=mask), repeats),
        seconds(lambda: lossprune.measure(zeroed, batches), repeats),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--network", default="VGG11", choices=list(GOALS))
    parser.add_argument("--weights", type=Path, default=None, help="a safetensors state dict")
    parser.add_argument("--data_path", type=Path, default=None, help="folder or archive of images")
    parser.add_argument("--stages", type=int, default=14)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=2, help="timings of what is saved")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(hardware()))

    dataset = None
    if arguments.data_path is not None:
        dataset = load("folder", arguments.data_path, seed=1111)
    model = build(arguments.network, arguments.weights, dataset)
    examples = RandomImages(arguments.examples)
    if dataset is not None:
        examples = StageExamples(dataset, arguments.examples, seed=1111)
    first = [next(iter(examples))]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        published = seconds(lambda: gradient_and_ggn_diagonal(model, first), repeats=2)
    print(f"published: {published:.1f} s for {TIMED} images of the first stage")

    print("stage  sparsity  loss   after   seconds   100 images: with mask   without   saved")
    stages = []
    for mask, record in prune_by_stage(
        model,
        "QM",
        sparsity=SPARSITY,
        data=examples,
        examples=arguments.examples,
        stages=arguments.stages,
        reg=REG,
    ):
        examples.stage += 1
        following, without = saved(model, mask, first, arguments.repeats)
        stages.append(
            {
                "stage": record.stage,
                "sparsity": record.sparsity,
                "loss_before": record.loss_before,
                "loss_after": record.loss_after,
                "seconds": record.seconds,
                "with_mask": following,
                "without": without,
            }
        )
        print(
            f"{record.stage:5d}  {record.sparsity:8.4f}  {record.loss_before:.3f}  "
            f"{record.loss_after:.3f}  {record.seconds:8.2f}   {following:21.2f}   "
            f"{without:7.2f}   {100 * (1 - following / without):4.0f} %",
            flush=True,
        )
    total = sum(stage["seconds"] for stage in stages)
    expected = published * arguments.examples / TIMED * arguments.stages
    spread = [stage["seconds"] for stage in stages]
    print(
        f"\n{arguments.network}, QM, {arguments.stages} stages of {arguments.examples} images: "
        f"{total:.0f} s, {min(spread):.1f} to {max(spread):.1f} a stage "
        f"(median {statistics.median(spread):.1f}); published {expected:.0f} s by the above; "
        f"ratio {expected / total:.1f} ×, goal {GOALS[arguments.network]}"
    )
    out = arguments.out or Path(f"measurements/pruning-{arguments.network}.json")
    write_json(
        out,
        {
            "network": arguments.network,
            "published_seconds_100_images": published,
            "published_seconds": expected,
            "seconds": total,
            "ratio": expected / total,
            "stages": stages,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
