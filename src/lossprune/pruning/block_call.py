"""The call that prunes block by block, as what one block makes of examples goes into the next."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.progress import Progress
from lossprune.pruning.block_settings import BlockPruning, PrunedWeight, block_pruning
from lossprune.pruning.blocks import Call, calls_of, find_blocks, ran
from lossprune.pruning.choices import Choices
from lossprune.pruning.criteria import Criterion
from lossprune.pruning.curvature.batch import Forward
from lossprune.pruning.curvature.examples import take
from lossprune.pruning.curvature.layers import WeightCalls
from lossprune.pruning.curvature.network import PrunableNetwork
from lossprune.pruning.curvature.running import outside_inference
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.prunable import input_dimensions, stacked_weights
from lossprune.pruning.reconstruction import DAMPING
from lossprune.pruning.result import PruningResult
from lossprune.pruning.scopes import Scope
from lossprune.pruning.skipped import find_skipped, numbers_in
from lossprune.pruning.stage_record import StageRecord
from lossprune.pruning.watching import shown

# Parameters and buffers of a block, by their names in it.
Values = Mapping[str, Tensor]


@outside_inference()
def prune_by_block(
    model: nn.Module,
    criterion: str | Criterion,
    *,
    sparsity: float | None = None,
    data: Iterable[Any] | None = None,
    examples: int | None = None,
    pattern: str | None = "unstructured",
    scope: str | Scope | None = None,
    compensate: bool = False,
    damping: float = DAMPING,
    blocks: str | Sequence[nn.Module] | None = None,
    parameters: Choices | None = None,
    exclude: Choices | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> PruningResult:
    """Prune the blocks of ``model`` one after the other, each by what the last one gives.

    The examples go through what is before the blocks, once.  Then, block by block: what each of its
    weights is given is measured, in the block as it is; its weights are pruned, and moved where
    that is asked for; and the examples go through the pruned block, which makes what the next one
    is given.  No gradients are taken, and only one block and the states of the examples between two
    blocks need to be on ``device``.

    Only weights in blocks are pruned; others, of embeddings and heads, stay as they are and are in
    ``result.skipped``.  Moved weights are in ``result.weights``; ``result.apply_(model)`` prunes.

    Args:
        model: left unchanged.
        criterion: ``"SparseGPT"``, ``"Wanda"``, ``"MP"``, or a :class:`Criterion` of weights alone
            or with the statistic ``"input-norm"``.
        sparsity: κ, the fraction of the blocks' weights removed, in [0, 1).
        data: iterable of batches, as for :func:`lossprune.prune`, iterated once; their states are
            kept in memory.  MP without ``compensate`` does without.
        examples: how many to read, exactly; None reads all.
        pattern: ``"unstructured"``, or ``"N:M"``.
        scope: how weights are shared among the layers: a name in ``SCOPES`` or a :class:`Scope`
            with a quota for each; if not given, ``"row"`` for Wanda and ``"layer"`` for others.
        compensate: whether the weights that the criterion leaves are moved to where the outputs of
            their layer change least; SparseGPT always does.
        damping: what is added to the diagonal of X Xᵀ, as a share of its mean, where weights move.
        blocks: the name of the module that lists the blocks, or the blocks; if not given, the
            longest list of two or more modules of one type.
        parameters: which of their weights, and
        exclude: which of these not; as in :func:`lossprune.prune`.
        forward: ``forward(model, batch)`` calls the model; as in :func:`lossprune.measure`.
        device: where a block is, while it is pruned; if not given, where the weights are.
        progress: as in :func:`lossprune.prune`.

    Source: Frantar and Alistarh, "SparseGPT", ICML 2023.

    Raises:
        ValueError: an argument out of range; there are no blocks.
        PruningError: the data does not do; the network does not call its blocks one after the
            other, each on what the last one gave; the inputs of a weight are not known (named).

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    >>> batches = [(torch.randn(4, 5, 8), torch.zeros(4))]
    >>> prune_by_block(model, "SparseGPT", sparsity=0.5, data=batches).mask
    Mask(768 of 1,536 weights removed, 12 parameters)
    """
    began = time.perf_counter()
    network = PrunableNetwork(model, forward, parameters, exclude)
    found = find_blocks(model, blocks)
    inside = names_in(found, network.own)
    asked = block_pruning(
        criterion,
        shapes={name: network.own[name].shape for names in inside.values() for name in names},
        inputs=input_dimensions(model),
        stacked=stacked_weights(model),
        sparsity=sparsity,
        pattern=pattern,
        scope=scope,
        compensate=compensate,
        damping=damping,
    )
    calls: list[dict[str, Call]] = []
    if asked.measures:
        if data is None:
            raise ValueError(f"criterion {asked.name!r} needs data: an iterable of batches")
        calls = calls_of(model, network.step, network.device, found, take(data, examples, forward))
    place = network.device if device is None else torch.device(device)

    def values_of(name: str) -> Values:
        own = (*found[name].named_parameters(), *found[name].named_buffers())
        return {local: tensor.detach().to(place) for local, tensor in own}

    kept, moved = {}, {}
    with shown(progress) as told:
        for pruned, _ in pruned_blocks(asked, found, inside, calls, values_of, told):
            for name, weight in pruned.items():
                kept[name] = weight.kept.to(network.device)
                if asked.moves:
                    moved[name] = weight.value.to(network.device)
    mask = Mask(kept, criterion=asked.name)
    seconds = time.perf_counter() - began
    record = StageRecord(1, mask.sparsity, mask.removed, None, None, None, None, seconds)
    return PruningResult(
        mask, (record,), (), find_skipped(model, mask), numbers_in(model), weights=moved
    )


def names_in(
    blocks: Mapping[str, nn.Module], weights: Mapping[str, Tensor]
) -> dict[str, dict[str, str]]:
    """Return, of each block, the names of the weights in it, and their names within the block.

    Raises:
        ValueError: none of the weights is in a block.
        PruningError: a weight is in several blocks.
    """
    names = {id(weight): name for name, weight in weights.items()}
    found: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    for block, module in blocks.items():
        own = {names[id(p)]: local for local, p in module.named_parameters() if id(p) in names}
        if shared := seen & own.keys():
            raise PruningError(
                f"{min(shared)!r} is in several blocks, which are pruned one after the other: give "
                f"exclude={min(shared)!r}, or take lossprune.prune"
            )
        seen |= own.keys()
        found[block] = own
    if not seen:
        raise ValueError(
            f"none of the weights to prune is in a block, of which the first is {min(blocks)!r}: "
            "give other blocks="
        )
    return found


def pruned_blocks(
    asked: BlockPruning,
    blocks: Mapping[str, nn.Module],
    inside: Mapping[str, Mapping[str, str]],
    calls: Sequence[Mapping[str, Call]],
    values_of: Callable[[str], Values],
    told: Progress,
) -> Iterator[tuple[dict[str, PrunedWeight], Values]]:
    """Prune block after block; yield what becomes of its weights, and all its values.

    Args:
        asked: how.
        blocks: by name, whose tensors are not looked at.
        inside: of each block, the names of weights to prune, and their names within it.
        calls: of each batch; none where no inputs are looked at.
        values_of: gives a block's tensors, by its name.
        told: is told of each block.
    """
    states = [next(iter(call.values())).states for call in calls]
    last = list(blocks)[-1]
    for count, (name, block) in enumerate(blocks.items()):
        told.advance("block", count, len(blocks))
        values = values_of(name)
        weights = {full: values[local] for full, local in inside[name].items()}
        norms = moments = None
        if calls and weights:
            squares, products = asked.watching(weights)
            for call, given in zip(calls, states, strict=True):
                with squares:
                    ran(name, block, values, call[name], given, products or WeightCalls({}))
            squares.check(weights)
            norms = squares.norms()
            moments = None if products is None else products.totals
        pruned = asked.pruned(weights, norms, moments)
        del norms, moments
        values = {**values, **{inside[name][full]: part.value for full, part in pruned.items()}}
        if name != last:
            states = [
                ran(name, block, values, call[name], given, WeightCalls({}))
                for call, given in zip(calls, states, strict=True)
            ]
        yield pruned, values
    told.advance("block", len(blocks), len(blocks))
