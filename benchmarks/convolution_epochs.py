"""Whole epochs of ``benchmarks.sparse_convolution``: time and memory, both ways."""

import argparse
import copy
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import lossprune
from benchmarks.convolution_layers import multiply_adds
from benchmarks.curvature import PeakMemory
from benchmarks.sparse_training import seeded
from benchmarks.stacked import spread
from lossprune import Mask
from lossprune.channels.costs import inputs_of, weighted_layers
from lossprune.data import Dataset, Split, load
from lossprune.networks import NETWORKS
from lossprune.training import (
    ConvolutionTraining,
    DenseTraining,
    Evaluation,
    Training,
    make_optimizer,
)
from lossprune.training.convolution import between, kernel
from lossprune.training.loop import training_batches

LR, L2, BATCH = 1e-3, 5e-4, 100
WAYS = ("dense", "sparse")
SCORED = ("train", "valid", "test")  # as the experiment does after every epoch


class Loop:
    """A copy of a pruned network, trained by torch with the mask enforced, or sparsely."""

    def __init__(
        self, way: str, network: nn.Module, mask: Mask, dataset: Dataset, lr: float = LR
    ) -> None:
        self.dataset = dataset
        network = copy.deepcopy(network)
        self.optimizer: SGD = make_optimizer(network, lr=lr, l2=L2)
        mask.enforce(network, self.optimizer)
        self.training: Training
        if way == "dense":
            self.training = DenseTraining(network, dataset, "to compare with")
        else:
            self.training = ConvolutionTraining(network, mask, dataset)

    def train(self, seed: int) -> float:
        generator = seeded(seed)
        return self.training.train_epoch(self.optimizer, batch_size=BATCH, generator=generator)

    def evaluate(self, splits: Sequence[str] = SCORED) -> list[Evaluation]:
        return [self.training.evaluate(self.dataset.scored[name]) for name in splits]


def part_of(dataset: Dataset, examples: int | None) -> Dataset:
    """With so many training images, and the same share of the others."""
    if examples is None or examples >= len(dataset.train):
        return dataset
    share = examples / len(dataset.train)

    def take(split: Split) -> Split:
        order = torch.randperm(len(split), generator=seeded(0))
        return split.take(order[: round(share * len(split))])

    return replace(dataset, **{name: take(split) for name, split in dataset.splits.items()})


@dataclass(frozen=True)
class Task:
    """What a process is asked for; ``weights`` of VGG11, ``mask`` of the network."""

    network: str
    weights: Path | None
    mask: Path
    images: Path
    threads: int
    examples: int | None

    def start(self) -> tuple[nn.Module, Mask, Dataset]:
        torch.set_num_threads(self.threads)
        dataset = part_of(load("folder", self.images, seed=1111), self.examples)
        mask = Mask.load(self.mask)
        network = new_network(self.network, self.weights)
        mask.apply_(network)
        return network, mask, dataset


def task_of(options: argparse.Namespace, network: str, mask: Path) -> Task:
    weights = options.weights if network == "VGG11" else None
    return Task(network, weights, mask, options.images, options.threads, options.examples)


def new_network(name: str, weights: Path | None) -> nn.Module:
    from safetensors.torch import load_file

    network = NETWORKS[name](generator=seeded(1111))
    if weights is not None:
        network.load_state_dict(load_file(weights))
    return network


def measured_epochs(task: Task, rounds: int, peak: float) -> dict[str, Any]:
    """Seconds of both, turn and turn about after one epoch that is not counted; memory; shares."""
    network, mask, dataset = task.start()
    loops = {way: Loop(way, network, mask, dataset) for way in WAYS}
    seconds = {way: {"training": [], "evaluation": [], "epoch": []} for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS[:: 1 if number % 2 else -1]:
            training = timed(partial(loops[way].train, number), task.threads)
            evaluation = timed(loops[way].evaluate, task.threads)
            print(f"round {number}: {way:<8}{training:8.2f} s + {evaluation:.2f} s", flush=True)
            if number:
                seconds[way]["training"].append(training)
                seconds[way]["evaluation"].append(evaluation)
                seconds[way]["epoch"].append(training + evaluation)
    ratio = {
        part: spread([d / s for d, s in zip(times, seconds["sparse"][part], strict=True)])
        for part, times in seconds["dense"].items()
    }
    done = operations(network, mask, dataset) * len(dataset.train)
    rate = done / min(seconds["sparse"]["training"])
    return {
        "network": task.network, "sparsity": mask.sparsity, "threads": task.threads,
        "training images": len(dataset.train), "rounds": rounds, "seconds": seconds,
        "ratio": ratio, "parts": parts(loops["sparse"]),
        "operations": done, "share of the peak": rate / peak / task.threads,
        "state bytes": state_bytes(network, mask, dataset),
        "peak bytes": {way: peak_bytes(task, way) for way in WAYS},
    }  # fmt: skip


def timed(work: Callable[[], object], threads: int) -> float:
    """Seconds of the processor for one thread, else of the clock."""
    clock = time.process_time if threads == 1 else time.perf_counter
    began = clock()
    work()
    return clock() - began


def operations(network: nn.Module, mask: Mapping[str, Tensor], dataset: Dataset) -> int:
    """Of the kept weights, in a step of training on one image: outputs and both gradients."""
    layers = weighted_layers(network)
    example = dataset.inputs(dataset.train.images[:1])
    calls = inputs_of(network.eval(), lambda whole: whole(example), list(layers.values()))
    found = 0
    for number, (name, layer) in enumerate(layers.items()):
        settings: dict[str, Any] = {}
        if isinstance(layer, nn.Conv2d):
            names = ("stride", "padding", "dilation", "groups")
            settings = {setting: getattr(layer, setting) for setting in names}
        shape = calls[layer].inputs[0].shape[1:]
        count = multiply_adds(mask[f"{name}.weight"], shape, **settings)
        found += 2 * (3 if number else 2) * count
    return found


# Memory


def state_bytes(network: nn.Module, mask: Mask, dataset: Dataset) -> dict[str, int]:
    """Of what SGD with momentum keeps, of the network and of :func:`lossprune.sparse`'s module."""
    example = dataset.inputs(dataset.train.images[:2])
    modules = network, lossprune.sparse(network, mask, example)
    found = {}
    for way, module in zip(WAYS, map(copy.deepcopy, modules), strict=True):
        optimizer = make_optimizer(module, lr=LR, l2=L2)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        found[way] = sum(value.nbytes for value in states if isinstance(value, Tensor))
    return found


def peak_bytes(task: Task, way: str) -> int:
    """Beyond what a process of its own has with the network and the images."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (replace(task, examples=None), way))


def _peak_bytes(task: Task, way: str) -> int:
    """Of making the training, three steps and the evaluation of a thousand images."""
    network, mask, dataset = task.start()
    first = dataset.train.take(torch.arange(3 * BATCH))
    dataset = replace(dataset, train=first, test=dataset.test.take(torch.arange(1000)))
    with PeakMemory() as memory:
        loop = Loop(way, network, mask, dataset)
        loop.train(0)
        loop.evaluate(("test",))
    return memory.bytes


# Where the time goes


def parts(loop: Loop) -> dict[str, float]:
    """Seconds of one more epoch of sparse training, by what they are spent on."""
    spent: dict[str, float] = defaultdict(float)
    with timers(spent):
        whole = timed(partial(loop.train, 0), 0)
    batches = training_batches(loop.dataset, BATCH, seeded(0))
    spent["batches and augmentation"] = timed(lambda: list(map(len, batches)), 0)
    return {**spent, "rest": whole - sum(spent.values()), "all": whole}


@contextmanager
def timers(spent: dict[str, float]) -> Iterator[None]:
    """Add to ``spent`` the seconds of the compiled functions, and of the optimizer's steps."""
    began = 0.0

    def before(*_: object) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(*_: object) -> None:
        spent["optimizer"] += time.perf_counter() - began

    with ExitStack() as undo:
        for module, name, part in TIMED:
            function = getattr(module, name)
            undo.callback(setattr, module, name, function)
            setattr(module, name, _timed_call(function, part, spent))
        for hook in (
            register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        ):  # fmt: skip
            undo.callback(hook.remove)
        yield


BETWEEN = "between the layers"
TIMED = (
    (kernel, "convolve", "outputs"),
    (kernel, "correlate_weights", "gradients of the weights"),
    (between, "moments", BETWEEN),
    (between, "scaled", BETWEEN),
    (between, "normalise_gradient", BETWEEN),
    (between, "maxima", BETWEEN),
    (between, "maxima_gradient", BETWEEN),
)


def _timed_call(
    function: Callable[..., Any], part: str, spent: dict[str, float]
) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        backward = torch._C._current_graph_task_id() >= 0
        began = time.perf_counter()
        try:
            return function(*args, **named)
        finally:
            which = "gradients of the inputs" if part == "outputs" and backward else part
            spent[which] += time.perf_counter() - began

    return call
