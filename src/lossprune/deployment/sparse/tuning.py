"""What is fastest, layer by layer: tiles, ways through the kernels, and torch's own layers."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lossprune.deployment.sparse.network import SparseNetwork, aligned, image_shape, lanes
from lossprune.deployment.sparse.parts import inputs_of, sparse_networks
from lossprune.deployment.sparse.steps import Shape, Step, tiles
from lossprune.deployment.timing import interleaved

# Calls a network with what it is to be fast on.
Caller = Callable[[nn.Module], object]


def tune_(network: nn.Module, call: Caller, seconds: float) -> None:
    """Choose every convolution's tile, and from which batch on images go in blocks, by timing."""
    for part, its in inputs_of(network, call, sparse_networks(network)).items():
        assert isinstance(part, SparseNetwork)
        _tune_part_(part, its.inputs, seconds)


def _tune_part_(part: SparseNetwork, args: tuple[Tensor, ...], seconds: float) -> None:
    args = aligned(args)
    one = tuple(_repeated(tensor[:1], 1) for tensor in args)
    block = tuple(_repeated(tensor[:1], lanes()) for tensor in args)
    # With batches smaller than a block, blocks are not what matters: they are tuned as one block.
    many = args if args[0].shape[0] >= lanes() else block
    shapes = _shapes(part, many)
    best: list[tuple[float, tuple[int, int] | None]] = [(float("inf"), None) for _ in part.steps]
    for round_ in range(5):
        trial = [
            _tile(step, source, round_) for step, source in zip(part.steps, shapes, strict=True)
        ]
        if all(tile is None for tile in trial):
            break
        part.retile_(trial)
        times = _operation_seconds(part, many, seconds / 5)
        for k, (tile, time) in enumerate(zip(trial, times, strict=True)):
            if tile is not None:
                best[k] = min(best[k], (time, tile))
    part.retile_([tile for _, tile in best])
    part.few = 0
    blocks = part
    images = copy.deepcopy(part)
    images.few = lanes() + 1
    timed = interleaved([lambda: images(*one), lambda: blocks(*block)], seconds=seconds)
    part.few = max(2, min(lanes(), round(timed[1].best / timed[0].best)))
    _share_(part, args, seconds)


def _share_(part: SparseNetwork, args: tuple[Tensor, ...], seconds: float) -> None:
    """Leave the example's work to one thread if the others are slower to wake than they help."""
    images = args[0].shape[0]
    plan = part.plan(images >= part.few, tuple(image_shape(tensor) for tensor in args))
    outputs = [torch.empty(images, *shape) for shape in plan.outputs]
    work = plan.work * images
    together, alone = interleaved(
        [lambda: plan.run(args, outputs, 0), lambda: plan.run(args, outputs, work)],
        seconds=seconds,
    )
    if together.best < 0.9 * alone.best:
        part.shared = min(part.shared, max(work - 1, 0))
    else:
        part.shared = max(part.shared, work)


def _repeated(tensor: Tensor, times: int) -> Tensor:
    return tensor.expand(times, *tensor.shape[1:]).contiguous()


def _shapes(part: SparseNetwork, args: tuple[Tensor, ...]) -> list[Shape]:
    known = {name: image_shape(tensor) for name, tensor in zip(part.inputs, args, strict=True)}
    out = []
    for step in part.steps:
        out.append(known[step.source])
        known[step.target] = step.output(known[step.source])
    return out


def _tile(step: Step, source: Shape, round_: int) -> tuple[int, int] | None:
    if step.kind != "convolution":
        return None
    fitting = tiles(step, source)
    return fitting[round_] if round_ < len(fitting) else None


def _operation_seconds(
    part: SparseNetwork, args: tuple[Tensor, ...], seconds: float
) -> list[float]:
    """Return the shortest time of every step of a sparse part."""
    images = args[0].shape[0]
    shapes = tuple(image_shape(tensor) for tensor in args)
    plan = part.plan(images >= part.few, shapes)
    outputs = [torch.empty(images, *shape) for shape in plan.outputs]
    first = len(part.inputs)
    kinds = [operation.kind for operation in plan.operations[first : first + len(plan.names)]]
    calls = [
        (lambda k=k: plan.run_part(first + k, 1, args, outputs, images))
        for k in range(len(plan.operations) - first - len(outputs))
    ]
    timings = [timing.best for timing in interleaved(calls, seconds=seconds, least=5)]
    # A split belongs to the convolution that it is made for.
    out: list[float] = []
    waiting = 0.0
    for kind, time in zip(kinds, timings, strict=False):
        if kind == 5:
            waiting += time
        else:
            out.append(time + waiting)
            waiting = 0.0
    return out


def sparse_seconds(network: nn.Module, call: Caller, seconds: float) -> dict[str, float]:
    """Return the shortest time of each sparse layer, by name."""
    found: dict[str, float] = {}
    for part, its in inputs_of(network, call, sparse_networks(network)).items():
        assert isinstance(part, SparseNetwork)
        args = aligned(its.inputs)
        times = _operation_seconds(part, args, seconds)
        for step, time in zip(part.steps, times, strict=True):
            if step.kind == "convolution":
                found[step.name] = found.get(step.name, 0.0) + time
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
        (lambda m=layer, its=seen[layer]: m(*its.inputs, **its.named)) for layer in used.values()
    ]
    timings = interleaved(calls, seconds=seconds, least=5) if calls else []
    return {name: timing.best for name, timing in zip(used, timings, strict=True)}
