"""A network in a folder, pruned block by block into another folder: only a block is in memory."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossprune.checkpoints.reading import Checkpoint, put_
from lossprune.checkpoints.writing import CheckpointWriter
from lossprune.pruning.block_call import Values, names_in, pruned_blocks
from lossprune.pruning.block_settings import BlockPruning, block_pruning
from lossprune.pruning.blocks import Call, calls_of, find_blocks
from lossprune.pruning.choices import Choices
from lossprune.pruning.criteria import Criterion
from lossprune.pruning.curvature.batch import Forward
from lossprune.pruning.curvature.examples import take
from lossprune.pruning.curvature.forms import default_forward
from lossprune.pruning.curvature.running import outside_inference
from lossprune.pruning.mask import LayerCounts, Mask
from lossprune.pruning.prunable import (
    check_numbers,
    chosen_weights,
    input_dimensions,
    stacked_weights,
)
from lossprune.pruning.reconstruction import DAMPING
from lossprune.pruning.scopes import Scope
from lossprune.pruning.skipped import find_skipped, numbers_in
from lossprune.pruning.watching import shown


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What a pruning has written.

    Attributes:
        folder: for ``from_pretrained``; the masks of its parts are beside these.
        criterion: which went by.
        layers: the counts of each pruned weight.
        seconds: how long it took.
    """

    folder: Path
    criterion: str
    layers: tuple[LayerCounts, ...]
    seconds: float

    @property
    def total(self) -> int:
        """How many weights could go."""
        return sum(layer.total for layer in self.layers)

    @property
    def removed(self) -> int:
        """How many went."""
        return sum(layer.removed for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of them that went."""
        return self.removed / max(1, self.total)

    def __repr__(self) -> str:
        return (
            f"PrunedCheckpoint({self.criterion}, {self.removed:,} of {self.total:,} weights "
            f"removed, {len(self.layers)} parameters, in {self.folder})"
        )


@outside_inference()
def prune_checkpoint(
    source: Path | str,
    folder: Path | str,
    criterion: str | Criterion,
    *,
    sparsity: float | None = None,
    data: Iterable[Any] | None = None,
    examples: int | None = None,
    pattern: str | None = "unstructured",
    scope: str | Scope | None = None,
    compensate: bool = False,
    damping: float = DAMPING,
    blocks: str | None = None,
    parameters: Choices | None = None,
    exclude: Choices | None = None,
    forward: Forward | None = None,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
) -> PrunedCheckpoint:
    """Prune a network in a folder of ``save_pretrained`` into another one, block by block.

    As :func:`lossprune.prune_by_block`, but the network is never in memory as a whole: beside what
    is outside of blocks there are one block, its statistics, and the states of the examples.  The
    new folder has the pruned weights, zeros in place, in one file a block, the mask of each beside
    it, the other files of the old one, and ``record.json``.  Nothing is fetched or unpickled.

    Args:
        source: with ``config.json`` and safetensors, in one file or several.
        folder: to write into, new or empty.
        criterion: this and all others as in :func:`lossprune.prune_by_block`.
        sparsity: as there.
        data: as there.
        examples: as there.
        pattern: as there.
        scope: as there.
        compensate: as there.
        damping: as there.
        blocks: the name of the module that lists the blocks.
        parameters: as there.
        exclude: as there.
        forward: as there.
        device: where a block is, while it is pruned.
        progress: as there.

    Raises:
        ValueError, PruningError: as there; a folder does not do.
    """
    began = time.perf_counter()
    checkpoint = Checkpoint(Path(source))
    network = checkpoint.network()
    keys = checkpoint.keys_of(network)
    found = find_blocks(network, blocks)
    chosen = chosen_weights(network, parameters, exclude)
    inside = names_in(found, chosen)
    asked = block_pruning(
        criterion,
        shapes={name: chosen[name].shape for names in inside.values() for name in names},
        inputs=input_dimensions(network),
        stacked=stacked_weights(network),
        sparsity=sparsity,
        pattern=pattern,
        scope=scope,
        compensate=compensate,
        damping=damping,
    )
    if asked.measures and data is None:
        raise ValueError(f"criterion {asked.name!r} needs data: an iterable of batches")
    written = CheckpointWriter(Path(folder), checkpoint.folder, len(found) + 1)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    own = {
        block: {local: names[id(p)] for local, p in module.named_parameters()}
        for block, module in found.items()
    }
    outside = set(keys) - {name for block in own.values() for name in block.values()}
    in_blocks = {keys[name] for block in own.values() for name in block.values()}
    written.write(1, checkpoint.read(set(checkpoint.files) - in_blocks), None)
    calls: list[dict[str, Call]] = []
    if asked.measures:
        assert data is not None
        first = set(own[next(iter(found))].values())
        with _having(network, {n: keys[n] for n in outside | first}, checkpoint):
            step = partial(forward or default_forward, network)
            batches = take(data, examples, forward)
            calls = calls_of(network, step, torch.device("cpu"), found, batches)

    def values_of(block: str) -> Values:
        read = checkpoint.read(keys[name] for name in own[block].values())
        check_numbers({name: read[keys[name]] for name in inside[block]})
        values = {local: read[keys[name]].to(device) for local, name in own[block].items()}
        return values | {n: b.to(device) for n, b in found[block].named_buffers()}

    layers: list[LayerCounts] = []
    with shown(progress) as told:
        steps = pruned_blocks(asked, found, inside, calls, values_of, told)
        for part, (block, (pruned, values)) in enumerate(zip(found, steps, strict=True), 2):
            mask = Mask({n: w.kept.cpu() for n, w in pruned.items()}, criterion=asked.name)
            written.write(part, {keys[n]: values[local] for local, n in own[block].items()}, mask)
            layers += mask.layers()
    result = PrunedCheckpoint(Path(folder), asked.name, tuple(layers), time.perf_counter() - began)
    written.finish(_record(result, network, asked, checkpoint.folder))
    return result


@contextmanager
def _having(network: nn.Module, keys: Mapping[str, str], checkpoint: Checkpoint) -> Iterator[None]:
    """Let parameters have their values for a while, of which ``keys`` has the names in files."""
    read = checkpoint.read(keys.values())
    parameters = dict(network.named_parameters())
    without = {name: parameters[name].detach().to("meta") for name in keys}
    put_(network, {name: read[key] for name, key in keys.items()})
    del read
    try:
        yield
    finally:
        put_(network, without)


def _record(
    result: PrunedCheckpoint, network: nn.Module, asked: BlockPruning, source: Path
) -> dict[str, Any]:
    pattern = asked.selection.pattern
    dense = find_skipped(network, [layer.name for layer in result.layers])
    return {
        "format": "lossprune checkpoint 1",
        "source": source.name,
        "criterion": result.criterion,
        "scope": asked.selection.scope.name,
        "pattern": None if pattern is None else str(pattern),
        "moved": asked.moves,
        "damping": asked.damping if asked.moves else None,
        "removed": result.removed,
        "prunable": result.total,
        "sparsity": result.sparsity,
        "model_parameters": numbers_in(network),
        "layers": [{**asdict(layer), "removed": layer.removed} for layer in result.layers],
        "skipped": {name: asdict(part) for name, part in dense.items()},
        "seconds": result.seconds,
    }
