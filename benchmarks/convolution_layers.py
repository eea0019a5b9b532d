"""The layers of ``benchmarks.sparse_convolution``, and ours, torch's and SparseProp's beside it."""

import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cells import print_markdown
from benchmarks.sparse_training import seeded
from benchmarks.stacked import spread
from benchmarks.timed_layer import DIRECTIONS, PADDING, Problem, TimedLayer, difference
from lossprune.channels.costs import inputs_of, weighted_layers
from lossprune.training.convolution.blocks import packed, unpacked
from lossprune.training.convolution.functions import KeptConvolution
from lossprune.training.convolution.structure import Convolution

Row = dict[str, Any]
TOLERANCE = 1e-5  # of the 2-norm
OURS, DENSE, PEER = "lossprune", "torch", "SparseProp"


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


def ours(problem: Problem) -> TimedLayer:
    """Over blocks of images, as between two layers."""
    images, kept = len(problem.x), problem.mask.flatten().nonzero()[:, 0]
    values = problem.weight.flatten()[kept].requires_grad_()
    x, gradient = packed(problem.x), packed(problem.gradient)
    _, height, channels, width, _ = x.shape
    kernel, padding = (*problem.weight.shape, 1, 1)[:4], (0 if problem.linear else PADDING,) * 2
    layer = KeptConvolution(Convolution((channels, height, width), kernel, padding=padding), kept)
    return TimedLayer(
        lambda blocks: layer(blocks, values, None),
        values,
        x,
        gradient,
        first=problem.first,
        plain=lambda blocks: unpacked(blocks, images, flat=problem.linear),
    )


def dense(problem: Problem, memory: torch.memory_format) -> TimedLayer:
    weight = problem.weight.contiguous(memory_format=memory).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return F.linear(x, weight) if problem.linear else F.conv2d(x, weight, padding=PADDING)

    return TimedLayer(
        layer,
        weight,
        problem.x.contiguous(memory_format=memory),
        problem.gradient.contiguous(memory_format=memory),
        first=problem.first,
        kept=lambda gradient: gradient[problem.mask],
    )


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
        self._own[OURS] = ours(problem)
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
            "linear": layer.mask.dim() == 2, "kept": int(layer.mask.sum()),
            "of": layer.mask.numel(), "multiply_adds": batch * layer.multiply_adds,
            "differences": ways.differences, "seconds": seconds,
        })  # fmt: skip
    return rows


# What is printed


def fastest(row: Row, engine: str, direction: str, layout: str = "") -> list[float] | None:
    """Seconds of the fastest layout of an engine, in this direction; None: it was not measured."""
    found = [
        times[direction]
        for name, times in row["seconds"].items()
        if name.split()[0] == engine and layout in name
    ]
    return min(found, key=statistics.median, default=None)


def ratios(row: Row, engine: str, direction: str) -> dict[str, float] | None:
    """How often as long an engine takes as ours, round by round."""
    theirs, own = fastest(row, engine, direction), fastest(row, OURS, direction)
    if theirs is None or own is None:
        return None
    return spread([slow / fast for slow, fast in zip(theirs, own, strict=True)])


def operations(row: Row, direction: str) -> int:
    """On kept weights: of the backward pass, for the gradients of weights and of inputs."""
    gradients = 1 if direction == "forward" or row["first"] else 2
    return 2 * gradients * row["multiply_adds"]


def print_rows(rows: Sequence[Row], peak: float) -> None:
    """A table of one batch size and one number of threads; ``peak`` of one core."""
    lines = []
    for row in rows:
        for direction in DIRECTIONS:
            own = statistics.median(fastest(row, OURS, direction) or [math.nan])
            rate = operations(row, direction) / own
            lines.append([
                row["layer"], direction, f"{row['kept'] / row['of']:.1%}",
                *(_milliseconds(fastest(row, *which)) for which in (
                    (OURS, direction), (DENSE, direction), (PEER, direction, "called"),
                    (PEER, direction, "chain"), (PEER, direction, "rows"),
                )),
                f"{rate / 1e9:.0f}", f"{rate / peak / row['threads']:.0%}",
                *(_ratio(ratios(row, engine, direction)) for engine in (PEER, DENSE)),
            ])  # fmt: skip
    header = (
        "layer", "pass", "kept", "ms", "torch ms", "SparseProp over batch", "in a chain",
        "over rows", "GFLOP/s", "of peak", "× SparseProp", "× torch",
    )  # fmt: skip
    print_markdown(header, lines)


def _milliseconds(seconds: list[float] | None) -> str:
    return "" if seconds is None else f"{1e3 * statistics.median(seconds):.2f}"


def _ratio(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def means(rows: Sequence[Row], engine: str) -> dict[str, dict[str, float]] | None:
    """Geometric mean and least of the ratios to an engine, of convolutions and of all layers."""
    found: dict[str, dict[str, float]] = {}
    for direction in DIRECTIONS:
        for which in ("convolutions", "all layers"):
            some = [row for row in rows if which == "all layers" or not row["linear"]]
            each = [ratio["median"] for row in some if (ratio := ratios(row, engine, direction))]
            if each:
                found[f"{direction}, {which}"] = {
                    "geometric mean": statistics.geometric_mean(each), "least": min(each)
                }  # fmt: skip
    return found or None
