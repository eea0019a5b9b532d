"""What is fastest, layer by layer: tiles, ways through the kernels, and torch's own layers."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lossprune.deployment.candidates import interleaved
from lossprune.deployment.sparse.layout import value_shapes
from lossprune.deployment.sparse.network import SparseNetwork, Tuning, aligned, image_shape
from lossprune.deployment.sparse.parts import inputs_of, sparse_networks
from lossprune.deployment.sparse.plan import OperationKind, SparsePlan, lanes
from lossprune.deployment.sparse.steps import Pair, Shape, SparseConvolution, tiles

# Calls a network with what it is to be fast on.
Caller = Callable[[nn.Module], object]


def tune_(network: nn.Module, call: Caller, seconds: float) -> None:
    """Let every sparse part of a network run as is fastest where ``call`` calls it."""
    for part, seen in inputs_of(network, call, sparse_networks(network)).items():
        assert isinstance(part, SparseNetwork)
        part.retune_(fastest_tuning(part, seen.inputs, seconds))


def fastest_tuning(part: SparseNetwork, inputs: Sequence[Tensor], seconds: float) -> Tuning:
    """Return every convolution's tile, and from which batch on images go in blocks, by timing.

    Args:
        part: left as it is.
        inputs: what it is to be fast on.
        seconds: how long each of three comparisons may take.
    """
    args = aligned(inputs)
    block = tuple(_repeated(tensor[:1], lanes()) for tensor in args)
    # With batches smaller than a block, blocks are not what matters: they are tuned as one block.
    many = args if args[0].shape[0] >= lanes() else block
    tuning = dataclasses.replace(part.tuning, tiles=_fastest_tiles(part, many, seconds))
    blocks = part.retuned(dataclasses.replace(tuning, few=0))
    images = part.retuned(dataclasses.replace(tuning, few=lanes() + 1))
    one = tuple(_repeated(tensor[:1], 1) for tensor in args)
    timed = interleaved([lambda: images(*one), lambda: blocks(*block)], seconds=seconds)
    few = max(2, min(lanes(), round(timed[1].best / timed[0].best)))
    shared = _fastest_sharing(blocks if len(args[0]) >= few else images, args, seconds)
    return Tuning(tuning.tiles, few, shared)


def _fastest_tiles(
    part: SparseNetwork, args: tuple[Tensor, ...], seconds: float
) -> dict[str, Pair]:
    """Return the fastest of each convolution's five likeliest tiles."""
    shapes = value_shapes(part.steps, _input_shapes(part, args))
    fitting = {
        step.target: tiles(step.operation, shapes[step.source])
        for step in part.steps
        if isinstance(step.operation, SparseConvolution)
    }
    best: dict[str, tuple[float, Pair]] = {}
    for round_ in range(5):
        trial = {target: many[round_] for target, many in fitting.items() if round_ < len(many)}
        if not trial:
            break
        tried = part.retuned(dataclasses.replace(part.tuning, tiles=trial))
        times = _step_seconds(tried, args, seconds / 5)
        for target, tile in trial.items():
            best[target] = min(best.get(target, (math.inf, tile)), (times[target], tile))
    return {target: tile for target, (_, tile) in best.items()}


def _fastest_sharing(part: SparseNetwork, args: tuple[Tensor, ...], seconds: float) -> int:
    """Return from how much work on threads share it.

    The example's is left to one thread if the others are slower to wake than they help.
    """
    images = args[0].shape[0]
    plan = _plan(part, args)
    outputs = [torch.empty(images, *shape) for shape in plan.outputs]
    work = plan.work * images
    together, alone = interleaved(
        [lambda: plan.run(args, outputs, 0), lambda: plan.run(args, outputs, work)],
        seconds=seconds,
    )
    if together.best < 0.9 * alone.best:
        return min(part.tuning.shared, max(work - 1, 0))
    return max(part.tuning.shared, work)


def _repeated(tensor: Tensor, times: int) -> Tensor:
    return tensor.expand(times, *tensor.shape[1:]).contiguous()


def _input_shapes(part: SparseNetwork, args: tuple[Tensor, ...]) -> dict[str, Shape]:
    return {name: image_shape(tensor) for name, tensor in zip(part.inputs, args, strict=True)}


def _plan(part: SparseNetwork, args: tuple[Tensor, ...]) -> SparsePlan:
    return part.plan(len(args[0]) >= part.tuning.few, tuple(map(image_shape, args)))


def _step_seconds(
    part: SparseNetwork, args: tuple[Tensor, ...], seconds: float
) -> dict[str, float]:
    """Return the shortest time of every step of a sparse part, by its target."""
    plan = _plan(part, args)
    outputs = [torch.empty(len(args[0]), *shape) for shape in plan.outputs]
    first, last = len(part.inputs), len(plan.operations) - len(outputs)
    calls = [(lambda k=k: plan.run(args, outputs, only=k)) for k in range(first, last)]
    timings = interleaved(calls, seconds=seconds, least=5)
    # A split belongs to the convolution that it is made for, the next step.
    targets = iter(part.steps)
    found: dict[str, float] = {}
    waiting = 0.0
    for operation, timing in zip(plan.operations[first:last], timings, strict=True):
        waiting += timing.best
        if operation.kind != OperationKind.SPLIT:
            found[next(targets).target] = waiting
            waiting = 0.0
    return found


def sparse_seconds(network: nn.Module, call: Caller, seconds: float) -> dict[str, float]:
    """Return the shortest time of each sparse layer, by name."""
    found: dict[str, float] = {}
    for part, seen in inputs_of(network, call, sparse_networks(network)).items():
        assert isinstance(part, SparseNetwork)
        times = _step_seconds(part, aligned(seen.inputs), seconds)
        for step in part.steps:
            if isinstance(step.operation, SparseConvolution):
                found[step.name] = found.get(step.name, 0.0) + times[step.target]
    return found


def weighted_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions of a network, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def dense_seconds(network: nn.Module, call: Caller, seconds: float) -> dict[str, float]:
    """Return the shortest time of each of torch's linear layers and convolutions, by name."""
    layers = weighted_layers(network)
    seen = inputs_of(network, call, list(layers.values()))
    used = {name: layer for name, layer in layers.items() if layer in seen}
    calls: list[Callable[[], object]] = [
        (lambda m=layer, own=seen[layer]: m(*own.inputs, **own.named)) for layer in used.values()
    ]
    timings = interleaved(calls, seconds=seconds, least=5) if calls else []
    return {name: timing.best for name, timing in zip(used, timings, strict=True)}
