"""What is fastest, layer by layer: tiles and ways through the kernels."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lossprune.channels.costs import Caller, inputs_of
from lossprune.deployment.candidates import interleaved
from lossprune.deployment.sparse.inputs import image_shape
from lossprune.deployment.sparse.layout import value_shapes
from lossprune.deployment.sparse.network import SparseNetwork, Tuning
from lossprune.deployment.sparse.parts import sparse_networks
from lossprune.deployment.sparse.plan import OperationKind, SparsePlan, lanes
from lossprune.deployment.sparse.steps import Pair, SparseConvolution, tiles


def tune_(network: nn.Module, call: Caller, seconds: float) -> None:
    """Let every sparse part of a network run as is fastest where ``call`` calls it."""
    for part, seen in inputs_of(network, call, sparse_networks(network)).items():
        part.retune_(fastest_tuning(part, seen.inputs, seconds))


def fastest_tuning(part: SparseNetwork, inputs: Sequence[Tensor], seconds: float) -> Tuning:
    """Return every convolution's tile, and from which batch on images go in blocks, by timing.

    Args:
        part: left as it is.
        inputs: what it is to be fast on.
        seconds: how long each of three comparisons may take.
    """
    _, args = part.aligned(inputs)
    one = tuple(tensor[:1] for tensor in args)
    block = tuple(tensor.expand(lanes(), *tensor.shape[1:]).contiguous() for tensor in one)
    # With batches smaller than a block, blocks are not what matters: they are tuned as one block.
    many = args if args[0].shape[0] >= lanes() else block
    tuning = dataclasses.replace(part.tuning, tiles=_fastest_tiles(part, many, seconds))
    blocks = part.retuned(dataclasses.replace(tuning, few=0))
    images = part.retuned(dataclasses.replace(tuning, few=lanes() + 1))
    timed = interleaved([lambda: images(*one), lambda: blocks(*block)], seconds=seconds)
    few = max(2, min(lanes(), round(timed[1].best / timed[0].best)))
    shared = _fastest_sharing(blocks if len(args[0]) >= few else images, args, seconds)
    return Tuning(tuning.tiles, few, shared)


def _fastest_tiles(
    part: SparseNetwork, args: tuple[Tensor, ...], seconds: float
) -> dict[str, Pair]:
    """Return the fastest of each convolution's five likeliest tiles."""
    shapes = value_shapes(part.steps, dict(zip(part.inputs, map(image_shape, args), strict=True)))
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
    plan, outputs = _prepared(part, args)
    work = plan.work * len(args[0])
    together, alone = interleaved(
        [lambda: plan.run(args, outputs, 0), lambda: plan.run(args, outputs, work)],
        seconds=seconds,
    )
    if together.best < 0.9 * alone.best:
        return min(part.tuning.shared, max(work - 1, 0))
    return max(part.tuning.shared, work)


def _prepared(part: SparseNetwork, args: tuple[Tensor, ...]) -> tuple[SparsePlan, list[Tensor]]:
    """Return what runs on ``args``, and room for its outputs."""
    plan = part.plan(args)
    return plan, [torch.empty(len(args[0]), *shape) for shape in plan.outputs]


def _step_seconds(
    part: SparseNetwork, args: tuple[Tensor, ...], seconds: float
) -> dict[str, float]:
    """Return the shortest time of every step of a sparse part, by its target."""
    plan, outputs = _prepared(part, args)
    first, last = len(part.inputs), len(plan.operations) - len(outputs)
    calls = [partial(plan.run, args, outputs, only=k) for k in range(first, last)]
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
        times = _step_seconds(part, part.aligned(seen.inputs)[1], seconds)
        for step in part.steps:
            if isinstance(step.operation, SparseConvolution):
                found[step.name] = found.get(step.name, 0.0) + times[step.target]
    return found
