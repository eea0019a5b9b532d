"""What is fastest, layer by layer: tiles and ways through the kernels."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lossprune.channels.costs import Caller, inputs_of
from lossprune.deployment.race import Budget, fastest, race
from lossprune.deployment.sparse.costs import likely_tiles
from lossprune.deployment.sparse.layout import value_shapes
from lossprune.deployment.sparse.network import SparseNetwork, Tuning
from lossprune.deployment.sparse.parts import sparse_networks
from lossprune.deployment.sparse.plan import OperationKind, SparsePlan, lanes
from lossprune.deployment.sparse.steps import Pair, SparseConvolution

_Seconds = Mapping[str, float]  # of steps, by their targets
_FEWS = (2, 3, 4, 6, 8, 11, 16)  # so far apart that two races of the same find one
_TILES, _FEW, _STEPS = 0.6, 0.5, 0.5  # shares of what is then left of a part's budget


def tune_(network: nn.Module, call: Caller, budget: Budget) -> dict[str, float]:
    """Let every sparse part of a network run as is fastest where ``call`` calls it.

    Return the seconds of each sparse layer in such a call, by name.
    """
    found: Counter[str] = Counter()
    parts = inputs_of(network, call, sparse_networks(network))
    for done, (part, seen) in enumerate(parts.items()):
        tuning, seconds = fastest_tuning(part, seen.inputs, budget.part(1 / (len(parts) - done)))
        part.retune_(tuning)
        for step in part.steps:
            if step.target in seconds:
                found[step.name] += seconds[step.target]  # type: ignore[assignment]
    return dict(found)


def tune_alike_(network: nn.Module, other: nn.Module) -> None:
    """Let sparse parts run as those of another network that take the same steps."""
    tuned = {step.target: part.tuning for part in sparse_networks(other) for step in part.steps}
    tiles = {target: tile for tuning in tuned.values() for target, tile in tuning.tiles.items()}
    for part in sparse_networks(network):
        targets = [step.target for step in part.steps]
        known = next((tuned[target] for target in targets if target in tuned), part.tuning)
        own = {target: tiles[target] for target in targets if target in tiles}
        part.retune_(dataclasses.replace(known, tiles=own))


def fastest_tuning(
    part: SparseNetwork, inputs: Sequence[Tensor], budget: Budget
) -> tuple[Tuning, _Seconds]:
    """Return how a sparse part is fastest, and the seconds of its convolutions by their targets.

    Tiles over blocks of images are timed on a block for each thread, of which the seconds are then
    as many as the inputs have blocks.

    Args:
        part: left as it is.
        inputs: what it is to be fast on.
        budget: what the comparisons may take; where nothing is left, the cost model decides.
    """
    _, args = part.aligned(inputs)
    if part.tokens:
        return _tuned_tokens(part, args, budget)
    count, width = len(args[0]), lanes()
    sample = _sample(part, args)
    tiles, seconds = _fastest_tiles(part, sample, budget.part(_TILES), tried=count > 1)
    tuning = dataclasses.replace(part.tuning, tiles=tiles)
    tuned = part.retuned(tuning)
    few = _fewest(tuned, sample, budget.part(_FEW))
    tuned.retune_(dataclasses.replace(tuning, few=few))
    if count < few:
        seconds = _step_seconds(tuned, args, budget.part(_STEPS))
    else:
        vectors, timed = (-(-images // width) for images in (count, len(sample[0])))
        seconds = {target: taken * vectors / timed for target, taken in seconds.items()}
    if torch.get_num_threads() > 1:
        shared = _fastest_sharing(tuned, args, budget)
        tuned.retune_(dataclasses.replace(tuned.tuning, shared=shared))
    return tuned.tuning, seconds


def _tuned_tokens(
    part: SparseNetwork, args: tuple[Tensor, ...], budget: Budget
) -> tuple[Tuning, _Seconds]:
    """The same for examples of tokens, of which there is one way: a block for each thread."""
    threads = torch.get_num_threads()
    count = len(args[0])
    plan = part.plan(args)
    most = threads * plan.extent(plan.count(args)).together
    sample = tuple(tensor[:most] for tensor in args)
    seconds = _step_seconds(part, sample, budget.part(_STEPS))
    seconds = {target: taken * count / len(sample[0]) for target, taken in seconds.items()}
    shared = _fastest_sharing(part, args, budget) if threads > 1 else part.tuning.shared
    return dataclasses.replace(part.tuning, shared=shared), seconds


def _in_blocks(part: SparseNetwork) -> SparseNetwork:
    return part.retuned(dataclasses.replace(part.tuning, few=0))


def _sample(part: SparseNetwork, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a block of images or rows for each thread, as far as there are so many."""
    count = len(args[0])
    if count < lanes():
        return tuple(tensor[:1].expand(lanes(), *tensor.shape[1:]).contiguous() for tensor in args)
    width = lanes() * _in_blocks(part).plan(args).vectors
    blocks = min(max(1, count // width), torch.get_num_threads())
    return tuple(tensor[: blocks * width] for tensor in args)


def _fastest_tiles(
    part: SparseNetwork, sample: tuple[Tensor, ...], budget: Budget, *, tried: bool
) -> tuple[dict[str, Pair], _Seconds]:
    """Return each convolution's fastest tile and its seconds; the likeliest if none is tried."""
    shapes = value_shapes(part.steps, dict(zip(part.inputs, part.shapes(sample), strict=True)))
    plan, outputs = _prepared(_in_blocks(part), sample)
    plan.run(sample, outputs)  # so that each step finds numbers to read
    tiles: dict[str, Pair] = {}
    seconds: dict[str, float] = {}
    for k, (step, weights) in enumerate(zip(part.steps, part.weights(), strict=True)):
        if not isinstance(step.operation, SparseConvolution):
            continue
        kept = weights.values.numel()
        options = likely_tiles(step.operation, shapes[step.source], kept, lanes())
        if not tried or budget.left <= 0:
            options = options[:1]
        place = len(part.inputs) + k
        calls = [
            partial(plan.with_tile(place, tile).run, sample, outputs, only=place)
            for tile in options
        ]
        times = race(calls, budget.part(1 / (len(part.steps) - k)))
        best = fastest(times)
        tiles[step.target], seconds[step.target] = options[best], times[best]
    return tiles, seconds


def _fewest(part: SparseNetwork, sample: tuple[Tensor, ...], budget: Budget) -> int:
    """Return from how many images on a vector of them takes less than they do one by one."""
    one, many = (tuple(tensor[:count] for tensor in sample) for count in (1, lanes()))
    blocks = _in_blocks(part)
    images = part.retuned(dataclasses.replace(part.tuning, few=lanes() + 1))
    alone, together = race([lambda: images(*one), lambda: blocks(*many)], budget)
    return min(_FEWS, key=lambda few: abs(math.log(few * alone / together)))


def _fastest_sharing(part: SparseNetwork, args: tuple[Tensor, ...], budget: Budget) -> int:
    """Return from how much work on threads share it.

    The example's is left to one thread if the others are slower to wake than they help.
    """
    plan, outputs = _prepared(part, args)
    work = plan.amount(args)
    calls = [partial(plan.run, args, outputs, shared) for shared in (0, work)]
    together, alone = race(calls, budget)
    if together < 0.9 * alone:
        return min(part.tuning.shared, max(work - 1, 0))
    return max(part.tuning.shared, work)


def _prepared(part: SparseNetwork, args: tuple[Tensor, ...]) -> tuple[SparsePlan, list[Tensor]]:
    """Return what runs on ``args``, and room for its outputs."""
    plan = part.plan(args)
    leading = args[0].shape[:-1] if part.rows else args[0].shape[:1]
    return plan, part.empty(plan, (len(args[0]), plan.count(args)) if part.tokens else leading)


def _step_seconds(part: SparseNetwork, args: tuple[Tensor, ...], budget: Budget) -> _Seconds:
    """Return the shortest time of every step of a sparse part, by its target."""
    plan, outputs = _prepared(part, args)
    plan.run(args, outputs)
    first, last = len(part.inputs), len(plan.operations) - len(outputs)
    targets = iter(part.steps)
    found: dict[str, float] = {}
    waiting = 0.0
    for k in range(first, last):
        share = budget.part(1 / (last - k))
        (taken,) = race([partial(plan.run, args, outputs, only=k)], share)
        waiting += taken
        # A split belongs to the convolution that it is made for, the next step.
        if plan.operations[k].kind != OperationKind.SPLIT:
            step = next(targets)
            if isinstance(step.operation, SparseConvolution):
                found[step.target] = waiting
            waiting = 0.0
    return found
