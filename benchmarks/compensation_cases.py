"""The networks that ``python -m benchmarks.compensation`` prunes, and what it measures of them."""

import argparse
import copy
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

import lossprune
from benchmarks import defaults, gpt2
from benchmarks.curvature import PeakMemory
from benchmarks.draws import Draws, training_draws
from lossprune.data import Dataset, load
from lossprune.networks import NETWORKS
from lossprune.training import evaluate, make_optimizer, train_epoch

FIRST_SEED = 1111  # of the published experiments
Given = argparse.Namespace


@dataclass(frozen=True)
class Variant:
    """A way to prune: ``compensation`` is "none", or which parameters move."""

    criterion: str
    sparsity: float = 0.0
    stages: int = 0
    compensation: str = "none"
    finish: int = 0
    recalibrate: str = "none"

    @property
    def as_trained(self) -> "Variant":
        """What it is compared with: the same stages, all that is left as it was."""
        return Variant(self.criterion, self.sparsity, self.stages)


DENSE = Variant("dense")


@dataclass(frozen=True)
class Case:
    """What is measured of a network.

    Attributes:
        variants: of pruning it.
        scores: their headings and a factor, by name.
        start: what is pruned, for a seed.
        measure: the scores of a variant, and its ``seconds``.
        about: what a reader must know.
    """

    variants: tuple[Variant, ...]
    scores: Mapping[str, tuple[str, float]]
    start: Callable[[int, Given], Any]
    measure: Callable[[Any, Variant, int, Given], dict[str, float]]
    about: str


def pruned(
    network: nn.Module, variant: Variant, data: Iterable[Any], given: Given, **settings: Any
) -> tuple[nn.Module, lossprune.Mask | None, float]:
    """A pruned copy, its mask, and the seconds that the call took."""
    if variant == DENSE:
        return copy.deepcopy(network), None, 0.0
    moves = variant.compensation != "none"
    if moves:
        parameters = variant.compensation
        settings["compensate"] = lossprune.Compensation(
            parameters=parameters, finish=variant.finish
        )
    if moves or variant.recalibrate != "none" or variant.criterion != "MP":
        settings["data"] = data
    began = time.perf_counter()
    result = lossprune.prune(
        network,
        variant.criterion,
        sparsity=variant.sparsity,
        stages=variant.stages,
        recalibrate=None if variant.recalibrate == "none" else variant.recalibrate,
        **settings,
    )
    seconds = time.perf_counter() - began
    return result.apply_(copy.deepcopy(network)), result.mask, seconds


# MNIST: the published protocol in 20 epochs


def trained(
    network: nn.Module, mask: lossprune.Mask | None, dataset: Dataset, seed: int, epochs: int
) -> tuple[nn.Module, nn.Module]:
    """Train as ``lossprune run``; return the network of least validation error and the last."""
    optimizer = make_optimizer(network, lr=0.01, l2=5e-4)
    enforcement = mask.enforce(network, optimizer) if mask is not None else None
    best, least = copy.deepcopy(network), evaluate(network, dataset, dataset.valid).error
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed(seed + epoch)
        train_epoch(network, dataset, optimizer, generator=generator)
        error = evaluate(network, dataset, dataset.valid).error
        if error < least:
            best, least = copy.deepcopy(network), error
    if enforcement is not None:
        enforcement.remove()
    return best.eval(), network.eval()


def mnist(seed: int, given: Given) -> tuple[nn.Module, Dataset]:
    seed += FIRST_SEED
    dataset = load("mnist", given.data_path, seed=seed)
    network = NETWORKS["MLP"](generator=torch.Generator().manual_seed(seed))
    return trained(network, None, dataset, seed, given.epochs)[0], dataset


def measure_mnist(
    start: tuple[nn.Module, Dataset], variant: Variant, seed: int, given: Given
) -> dict[str, float]:
    network, dataset = start
    data = training_draws(dataset, given.examples, seed=seed, size=100)
    network, mask, seconds = pruned(network, variant, data, given)
    scores = scores_of_images(network, dataset, len(dataset.train))
    best, last = trained(network, mask, dataset, FIRST_SEED + seed, given.epochs)
    return {
        **scores,
        "tuned_error": evaluate(last, dataset, dataset.test).error,
        "best_error": evaluate(best, dataset, dataset.test).error,
        "seconds": seconds,
    }


# VGG11 on JPEG images, each pruning in a process of its own for its peak of memory


def measure_vgg11(start: None, variant: Variant, seed: int, given: Given) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(vgg11_here, (variant, seed, given))


def vgg11_here(variant: Variant, seed: int, given: Given) -> dict[str, float]:
    from safetensors.torch import load_file

    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")  # of the time that curvature takes, as a process of its own
    dataset = load("folder", given.images, seed=FIRST_SEED)
    network = NETWORKS["VGG11"]()
    network.load_state_dict(load_file(given.weights))
    data = training_draws(dataset, given.examples, seed=seed, size=100)
    with PeakMemory() as memory:
        network, _, seconds = pruned(network.eval(), variant, data, given)
    return {
        **scores_of_images(network, dataset, given.scored),
        "seconds": seconds,
        "peak_mib": memory.bytes / 2**20,
    }


def scores_of_images(network: nn.Module, dataset: Dataset, count: int) -> dict[str, float]:
    """Of as many training and test images, the same for all."""
    order = torch.Generator().manual_seed(0)
    few = [
        split.take(torch.randperm(len(split), generator=order)[:count])
        for split in (dataset.train, dataset.test)
    ]
    train, test = (evaluate(network, dataset, split) for split in few)
    return {"train_loss": train.loss, "test_error": test.error, "test_loss": test.loss}


# Networks with batch normalisation


def digits(seed: int, given: Given) -> tuple[nn.Module, Dataset]:
    return defaults.digits(seed, given).network, load("digits", seed=seed)


def resnet20(seed: int, given: Given) -> tuple[nn.Module, Dataset]:
    """Trained once, then read from beside the results."""
    dataset, network = load("folder", given.images, seed=FIRST_SEED), new_resnet20()
    path = given.out.with_name(f"resnet20-{given.epochs}-epochs-{seed}.pt")
    if not path.exists():
        case = defaults.trained(new_resnet20, dataset, seed, given.epochs)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(case.network.state_dict(), path)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval(), dataset


def new_resnet20() -> nn.Module:
    """The residual network of 20 layers for images of 32×32 pixels, 270 thousand weights."""
    return defaults.residual(3, (*(16,) * 4, *(32,) * 3, *(64,) * 3))


def measure_images(
    start: tuple[nn.Module, Dataset], variant: Variant, seed: int, given: Given
) -> dict[str, float]:
    network, dataset = start
    count = min(given.examples, len(dataset.train))
    data = training_draws(dataset, count, seed=seed, size=100)
    network, _, seconds = pruned(network, variant, data, given)
    return {**scores_of_images(network, dataset, given.scored), "seconds": seconds}


# GPT-2


def tiny_gpt2(seed: int, given: Given) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    training, held_out, vocabulary = gpt2.characters()
    ids, test = (torch.stack([row["input_ids"] for row in rows]) for rows in (training, held_out))
    torch.manual_seed(seed)
    network = gpt2.tiny_gpt2(vocabulary, width=64)
    gpt2.train(network, ids, steps=given.steps, lr=gpt2.LR, seed=seed, mask=None)
    return network.eval(), ids, test


def measure_gpt2(
    start: tuple[nn.Module, torch.Tensor, torch.Tensor], variant: Variant, seed: int, given: Given
) -> dict[str, float]:
    network, ids, test = start
    data = Draws(
        len(ids),
        given.examples,
        lambda chosen: {"input_ids": ids[chosen], "labels": ids[chosen]},
        seed=seed,
        size=gpt2.BATCH,
    )
    how = {"loss": "next_token", "estimator": "monte-carlo", "seed": seed, "reg": 1e-3}
    network, _, seconds = pruned(network, variant, data, given, **how)
    return {"nats": gpt2.held_out_loss(network.eval(), test), "seconds": seconds}


def variants(
    sparsities: Iterable[float],
    methods: Iterable[tuple[str, int]],
    recalibrations: Iterable[str] = ("none",),
) -> tuple[Variant, ...]:
    """Criteria and stages with nothing moved, the weights that are left, and all parameters."""
    moved = ("none", "prunable", "all")
    return tuple(
        Variant(criterion, sparsity, stages, compensation, 0, recalibrate)
        for sparsity, (criterion, stages), compensation, recalibrate in product(
            sparsities, methods, moved, recalibrations
        )
    )


BOTH = (("MP", 14), ("QM", 14))
BATCH_NORM = variants((0.8, 0.9, 0.95), BOTH, ("none", "end", "stages"))
IMAGES = {
    "train_loss": ("training loss", 1.0),
    "test_loss": ("test loss", 1.0),
    "test_error": ("test error %", 100.0),
}
CASES = {
    "mnist": Case(
        variants((0.98847,), (*BOTH, ("QM", 140))),
        {
            **IMAGES,
            "tuned_error": ("after the epochs %", 100.0),
            "best_error": ("of least validation error %", 100.0),
        },
        mnist,
        measure_mnist,
        "MLP 784-300-100-10, trained and fine-tuned as by `lossprune run`; a dense network a seed.",
    ),
    "vgg11": Case(
        variants((0.956,), BOTH),
        {**IMAGES, "peak_mib": ("peak MiB", 1.0)},
        lambda seed, given: None,
        measure_vgg11,
        "One trained VGG11, JPEG images; seeds draw examples. Peak: over that before the call.",
    ),
    "batch_norm": Case(
        BATCH_NORM,
        IMAGES,
        digits,
        measure_images,
        "A residual network with batch normalisation on the bundled digits, one for each seed.",
    ),
    "resnet20": Case(
        BATCH_NORM,
        IMAGES,
        resnet20,
        measure_images,
        "A ResNet20 with batch normalisation on the JPEG images, one for each seed.",
    ),
    "gpt2": Case(
        variants(gpt2.SPARSITIES, BOTH),
        {"nats": ("nats a character, held out", 1.0)},
        tiny_gpt2,
        measure_gpt2,
        "GPT-2 of two layers as in benchmarks.gpt2, a dense network a seed; Monte-Carlo curvature.",
    ),
}
