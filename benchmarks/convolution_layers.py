"""The layers of ``benchmarks.sparse_convolution``, and every way to compute them, timed."""

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.sparse_training import seeded
from benchmarks.timed_layer import DIRECTIONS, PADDING, Problem, TimedLayer, difference
from lossprune.channels.costs import inputs_of, weighted_layers
from lossprune.training.convolution.blocks import packed, unpacked
from lossprune.training.convolution.functions import KeptConvolution
from lossprune.training.convolution.layers import convolution_of, positions
from lossprune.training.convolution.structure import dense_is_faster

Row = dict[str, Any]
TOLERANCE = 1e-5  # of the 2-norm
# Engines; the last is torch in a network of sparse layers, its maps turned into blocks and back.
OURS, DENSE, PEER, TURNED = "lossprune", "torch", "SparseProp", "turned"


@dataclass(frozen=True)
class Layer:
    """A layer of a pruned network.

    Attributes:
        shape: (channels, height, width) of an input, or (features,).
        mask: True where a weight is kept; of 3×3 convolutions with padding 1, or linear.
        first: of the network.
    """

    name: str
    shape: tuple[int, ...]
    mask: Tensor
    first: bool = False

    @property
    def multiply_adds(self) -> int:
        """Of the kept weights, for one image; zeros beyond a map's rim take none."""
        return multiply_adds(self.mask, self.shape, padding=PADDING)

    @property
    def chosen(self) -> str:
        """How a sparse network computes it."""
        done = kept_convolution(self.mask, self.shape).layer
        return "dense" if dense_is_faster(done, int(self.mask.sum())) else "sparse"

    def problem(self, batch: int) -> Problem:
        generator = seeded(0)
        x = torch.randn(batch, *self.shape, generator=generator)
        weight = torch.randn(self.mask.shape, generator=generator)
        weight = weight.where(weight != 0, 1.0) * self.mask  # none that is kept is 0
        outputs = torch.empty(batch, len(self.mask), *self.shape[1:])
        gradient = torch.randn(outputs.shape, generator=generator)
        return Problem(x, weight, self.mask, gradient, self.first)


def multiply_adds(mask: Tensor, shape: Sequence[int], **settings: Any) -> int:
    """Of the kept weights of a layer, for one input of a shape that is all ones."""
    ones = torch.ones(1, *shape, dtype=torch.double)
    kept = mask.double()
    sums = F.linear(ones, kept) if mask.dim() == 2 else F.conv2d(ones, kept, **settings)
    return int(sums.sum())


def network_layers(network: nn.Module, mask: Mapping[str, Tensor], example: Tensor) -> list[Layer]:
    layers = weighted_layers(network)
    calls = inputs_of(network, lambda whole: whole(example), list(layers.values()))
    return [
        Layer(
            name,
            tuple(calls[layer].inputs[0].shape[1:]),
            mask[f"{name}.weight"].bool(),
            first=number == 0,
        )
        for number, (name, layer) in enumerate(layers.items())
    ]


def published_layers() -> list[Layer]:
    """Those that SparseProp is known to be fast on, with random masks."""
    found = []
    for inputs, outputs, size, removed in (
        (64, 128, 32, 0.93), (128, 128, 16, 0.956), (512, 512, 4, 0.98)
    ):  # fmt: skip
        mask = torch.zeros(outputs * inputs * 9, dtype=torch.bool)
        order = torch.randperm(len(mask), generator=seeded(0))
        mask[order[: round((1 - removed) * len(mask))]] = True
        name = f"{inputs}→{outputs}, {size}², {removed:.1%} removed"
        found.append(Layer(name, (inputs, size, size), mask.view(outputs, inputs, 3, 3)))
    return found


# Ways to compute them


def kept_convolution(mask: Tensor, shape: Sequence[int]) -> KeptConvolution:
    channels, height, width = (*shape, 1, 1)[:3]
    settings = {} if mask.dim() == 2 else {"padding": (PADDING,) * 2}
    layer = convolution_of(mask.shape, (channels, height, width), settings)
    return KeptConvolution(layer, positions(mask))


def ours(problem: Problem) -> TimedLayer:
    """Over blocks of images, as between two layers."""
    images, dimensions = len(problem.x), problem.x.dim()
    values = problem.weight[problem.mask].requires_grad_()
    layer = kept_convolution(problem.mask, problem.x.shape[1:])
    return TimedLayer(
        lambda blocks: layer(blocks, values, None),
        values,
        packed(problem.x, dimensions),
        packed(problem.gradient, dimensions),
        first=problem.first,
        plain=lambda blocks: unpacked(blocks, images, flat=problem.linear),
    )


def dense(problem: Problem, memory: torch.memory_format) -> TimedLayer:
    layer, weight = _dense(problem, memory)
    return TimedLayer(
        layer,
        weight,
        problem.x.contiguous(memory_format=memory),
        problem.gradient.contiguous(memory_format=memory),
        first=problem.first,
        kept=lambda gradient: gradient[problem.mask],
    )


def turned(problem: Problem) -> TimedLayer:
    """By torch, between layers over blocks; a first layer gets its images as torch has them."""
    layer, weight = _dense(problem, torch.contiguous_format)
    images, dimensions, first = len(problem.x), problem.x.dim(), problem.first

    def plain(blocks: Tensor) -> Tensor:
        return unpacked(blocks, images, flat=problem.linear)

    return TimedLayer(
        lambda x: packed(layer(x if first else plain(x)), dimensions),
        weight,
        problem.x if first else packed(problem.x, dimensions),
        packed(problem.gradient, dimensions),
        first=first,
        plain=plain,
        kept=lambda gradient: gradient[problem.mask],
    )


def _dense(
    problem: Problem, memory: torch.memory_format
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weight = problem.weight.contiguous(memory_format=memory).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return F.linear(x, weight) if problem.linear else F.conv2d(x, weight, padding=PADDING)

    return layer, weight


class Peer:
    """SparseProp, in a process of an environment that has it; see ``sparseprop_worker``."""

    def __init__(self, python: str) -> None:
        """Start it.

        Raises:
            OSError: there is no such Python, or no SparseProp in it; the message says what.
        """
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.sparseprop_worker"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.version = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OSError(f"SparseProp's process ended with {self._process.wait()}")
        return json.loads(line)


class Ways:
    """All ways to compute a layer, by name; the engine is the first word."""

    def __init__(self, problem: Problem, peer: Peer | None) -> None:
        """Make them and compare what they give.

        Raises:
            ArithmeticError: one differs from torch.
        """
        self._peer = peer
        self._own = {f"{DENSE} NCHW": dense(problem, torch.contiguous_format)}
        if not problem.linear:
            self._own[f"{DENSE} channels last"] = dense(problem, torch.channels_last)
        self._own |= {OURS: ours(problem), TURNED: turned(problem)}
        expected = self._own[f"{DENSE} NCHW"].results()
        self.differences = {
            name: difference(way.results(), expected) for name, way in self._own.items()
        }
        if peer is not None:
            with tempfile.TemporaryDirectory() as folder:
                problem.save(Path(folder, "problem.pt"), expected)
                found = peer.ask(problem=f"{folder}/problem.pt")
            self.differences |= {f"{PEER} {name}": off for name, off in found.items()}
        for name, off in self.differences.items():
            if not off <= TOLERANCE:
                raise ArithmeticError(f"{name} differs from torch by {off:.1e}")

    def seconds(self, name: str, direction: str, threads: int) -> float:
        if name in self._own:
            return self._own[name].seconds(direction, threads)
        assert self._peer is not None
        way = name.removeprefix(f"{PEER} ")
        return self._peer.ask(way=way, direction=direction, threads=threads)


def measured(
    layer: Layer, batch: int, threads: Sequence[int], peer: Peer | None, rounds: int
) -> list[Row]:
    """Seconds of every way, turn and turn about; a row for each number of threads."""
    ways, rows = Ways(layer.problem(batch), peer), []
    for count in threads:
        seconds = {name: {d: [] for d in DIRECTIONS} for name in ways.differences}
        for number in range(rounds):
            for name in list(seconds)[:: 1 if number % 2 else -1]:
                for direction in DIRECTIONS:
                    seconds[name][direction].append(ways.seconds(name, direction, count))
        rows.append({
            "layer": layer.name, "batch": batch, "threads": count, "first": layer.first,
            "linear": layer.mask.dim() == 2, "chosen": layer.chosen, "kept": int(layer.mask.sum()),
            "of": layer.mask.numel(), "multiply_adds": batch * layer.multiply_adds,
            "differences": ways.differences, "seconds": seconds,
        })  # fmt: skip
    return rows
