"""Sparse inference: a pruned network as fast as this machine computes it.

The network is compacted, then every layer is either torch's dense one or the project's sparse
kernel, whichever is faster here for a batch like the example.  Consecutive sparse layers run by one
call, in one layout; see ``sparse/sparse_network.c``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lossprune.channels.compaction import cut_copy, masked_copy
from lossprune.channels.costs import count_outputs, weighted_layers
from lossprune.deployment.candidates import Candidates
from lossprune.deployment.choices import LayerChoice
from lossprune.deployment.deployed import Deployed
from lossprune.deployment.layer_by_layer import with_semi_structured
from lossprune.deployment.opened import opened
from lossprune.deployment.plans import DeploymentPlan, keep, plan_key, recalled
from lossprune.deployment.race import fastest
from lossprune.deployment.reasons import (
    ALTOGETHER,
    FASTER,
    NOT_SEMI_STRUCTURED,
    NOT_TAKEN,
    reasons,
    told,
)
from lossprune.deployment.sparse.parts import sparse_networks
from lossprune.deployment.ways import REPLACED, Way, add_sparse_ways, remade
from lossprune.pruning.mask import Mask

_LAST = ("compacted", "masked")  # of ways that are alike


@torch.no_grad()
def deploy(
    model: nn.Module, mask: Mask, example: Any, *, seconds: float = 5.0, remeasure: bool = False
) -> Deployed:
    """Return the pruned network, as fast as this machine computes it.

    The result takes what ``model`` takes, in batches of any size, and gives what the masked model
    gives in evaluation mode, to rounding; it computes no gradients.  ``model`` is left as it is.
    On a GPU, linear layers with 2:4 masks become PyTorch's semi-structured ones.

    What was found to be fastest is kept in the cache folder (``plans.py``) for the next network of
    these layers and densities on this machine.

    Args:
        model: any network; what cannot be traced by ``torch.fx`` is replaced layer by layer.
        mask: which weights are kept.
        example: a batch as it will come: its size decides what is fastest.  A tuple or list holds
            the network's arguments, a mapping those by name; or it is itself the argument of a
            network that takes such a thing.  Arguments that are left out, None, True or False
            here are to be so whenever the result is called.
        seconds: what all comparisons together may take, beside one call of each way to compute the
            network, by the clock that they are timed by: the thread's processor time where torch
            has one thread.  Most networks need less; where it is short, a cost model decides.
        remeasure: whether to compare anew, though a plan was kept.

    Raises:
        PruningError: the mask does not fit the model, or the model does not run on ``example``.

    >>> import lossprune
    >>> network = lossprune.networks.NETWORKS["MLP"](shape=(1, 8, 8), hidden=(32,))
    >>> mask = Mask({"fc1.weight": torch.rand(32, 64) < 0.05})
    >>> deployed = deploy(network, mask, torch.randn(1, 1, 8, 8), seconds=0.01)
    >>> deployed(torch.randn(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """
    masked, mask = masked_copy(model, mask)
    candidates = Candidates(masked, example, seconds)
    if candidates.call.on_gpu:
        return _on_gpu(candidates, masked)
    cut = candidates.attempt("compacted", lambda: cut_copy(masked, mask, candidates.call.example))
    small = masked if cut is None else cut[0].eval()
    key = plan_key(small, candidates.call)
    plan = None if remeasure else recalled(key, seconds)
    if plan is not None:
        network = remade(candidates, small, plan)
        if network is not None:
            return _deployed(network, small, plan, before=True)
    plan, network = _compared(candidates, small, seconds, compacted=cut is not None)
    keep(key, plan)
    return _deployed(network, small, plan, before=False)


def _on_gpu(candidates: Candidates, masked: nn.Module) -> Deployed:
    """Return the masked network with semi-structured products where masks and types allow."""
    made = candidates.attempt(
        "semi-structured",
        lambda: with_semi_structured(masked, candidates.call, candidates.budget),
    )
    network, changed = made or (masked, set())
    candidates.add("semi-structured", network)
    if "semi-structured" not in candidates.networks:
        network, changed = masked, set()
    outputs = count_outputs(masked, weighted_layers(masked), candidates.call)
    why = dict.fromkeys(weighted_layers(masked).keys() - changed, NOT_SEMI_STRUCTURED)
    layers = _choices(masked, outputs, dict.fromkeys(changed, "2:4"), {}, {}, why)
    note = f"{len(changed)} of {len(layers)} layers run as PyTorch's semi-structured products"
    return Deployed(network, layers, {}, [note, *candidates.notes])


def _compared(
    candidates: Candidates, small: nn.Module, seconds: float, *, compacted: bool
) -> tuple[DeploymentPlan, nn.Module]:
    """Return the way that is fastest on the whole network, and the network."""
    if compacted and not candidates.add("compacted", small, ready=True):
        small = candidates.networks["masked"]
    ways, watch = add_sparse_ways(candidates, small)
    taken = candidates.seconds()
    names = sorted(taken, key=lambda name: _LAST.index(name) if name in _LAST else -1)
    best = names[fastest([taken[name] for name in names])]
    network = candidates.networks[best]
    way = ways.get(best, Way(network))
    tunings = [part.tuning for part in sparse_networks(network)]
    plan = DeploymentPlan(
        seconds, best, way.dense, tunings, taken, way.sparse_seconds, watch.seconds,
        dict(watch.outputs), candidates.notes,
    )  # fmt: skip
    return plan, network


def _deployed(
    network: nn.Module, small: nn.Module, plan: DeploymentPlan, *, before: bool
) -> Deployed:
    """Return the network with the account of its plan, which was found just now or ``before``."""
    sparse = dict.fromkeys(plan.sparse_seconds, "sparse")
    written = opened(small)
    why = reasons(written, plan.outputs, sparse, plan.dense, _otherwise(plan))
    layers = _choices(written, plan.outputs, sparse, plan.sparse_seconds, plan.dense_seconds, why)
    where = f"fastest here before ({plan.chosen})" if before else f"fastest here ({plan.chosen})"
    note = f"torch's dense layers, all through, {'were' if before else 'are'} {where}"
    if sparse:
        note = f"{len(sparse)} of {len(layers)} layers are sparse, which "
        note += f"{'was' if before else 'is'} {where}"
    return Deployed(network, layers, dict(plan.seconds), [*plan.notes, *told(why), note])


def _otherwise(plan: DeploymentPlan) -> str:
    """Return why layers stay dense of which no more is known."""
    if plan.chosen in _LAST:
        return ALTOGETHER if plan.seconds.keys() - set(_LAST) else FASTER
    return FASTER if plan.chosen in REPLACED else NOT_TAKEN


def _choices(
    network: nn.Module,
    outputs: Mapping[str, int],
    kinds: Mapping[str, str],
    sparse: Mapping[str, float],
    dense: Mapping[str, float],
    why: Mapping[str, str],
) -> list[LayerChoice]:
    """Return how each layer is computed, dense where not in ``kinds``, and its seconds."""
    choices = []
    for name, layer in weighted_layers(network).items():
        weight: Any = layer.weight  # which a parametrisation may compute
        kept, positions = int(torch.count_nonzero(weight)), outputs.get(name, 0) // len(weight)
        choices.append(
            LayerChoice(
                name, kinds.get(name, "dense"), kept, weight.numel(), kept * positions,
                sparse.get(name), dense.get(name, 0.0), why.get(name, ""),
            )
        )  # fmt: skip
    return choices
