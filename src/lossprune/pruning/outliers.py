"""Shares of layers by how many of their weights stand out."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lossprune.pruning.choices import Choices
from lossprune.pruning.criteria import CRITERIA
from lossprune.pruning.curvature.batch import Forward
from lossprune.pruning.curvature.examples import take
from lossprune.pruning.curvature.losses import Loss, LossFunction, find_loss
from lossprune.pruning.curvature.measure import Objective
from lossprune.pruning.curvature.network import PrunableNetwork
from lossprune.pruning.curvature.probe import checked_memory
from lossprune.pruning.curvature.running import outside_inference
from lossprune.pruning.scopes import Scope
from lossprune.pruning.scoring import Scoring


@outside_inference()
def outlier_scope(
    model: nn.Module,
    data: Iterable[Any],
    sparsity: float,
    *,
    outlier: float = 5.0,
    spread: float = 0.08,
    examples: int | None = None,
    loss: str | Loss | LossFunction = "cross_entropy",
    forward: Forward | None = None,
    memory: int | None = None,
    parameters: Choices | None = None,
    exclude: Choices | None = None,
) -> Scope:
    """Measure how many weights of each layer stand out, as a scope in which such layers keep more.

    With Wanda's scores s = |θ| ‖x‖ let D_i be the share of layer i with s > M · mean(s), and D̄ the
    mean of D over all weights.  At sparsity κ layer i then keeps the share

        d_i = (1 − κ) + λ (D_i − D̄) / max_j |D_j − D̄|

    of its weights: Σ n_i d_i is what a pruning keeps, and no layer is further than λ from the mean.
    Earlier stages keep in proportion to n_i d_i, as far as a layer has so many.  Within a layer
    every output loses the same share.

    Args:
        model: left as it is.
        data: as in :func:`lossprune.prune`.
        sparsity: κ, in (0, 1), that the scope is for.
        outlier: M > 0.
        spread: λ, at least 0 and below κ and 1 − κ.
        examples: as there, and so are all that follow.
        loss: which the examples must suit.
        forward: as there.
        memory: as there.
        parameters: as there.
        exclude: as there.

    Source: Yin et al., "Outlier weighed layerwise sparsity (OWL): a missing secret sauce for
    pruning LLMs to high sparsity", ICML 2024; there 2 λ is the distance between the lowest and the
    highest share, and all layers count alike.

    Raises:
        ValueError: an argument out of range.
        PruningError: the data does not do; the inputs of a weight are not known (named).

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> scope = outlier_scope(model, [(torch.randn(32, 8), torch.arange(32) % 4)], 0.5)
    >>> sum(scope.shares.values())
    96.0
    """
    for name, value, low, high in (
        ("sparsity", sparsity, 0, 1),
        ("outlier", outlier, 0, float("inf")),
        ("spread", spread, -1, min(sparsity, 1 - sparsity)),
    ):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and low < value < high and (name != "spread" or value >= 0)):
            least = "at least 0" if name == "spread" else f"above {low}"
            raise ValueError(f"{name} must be a number {least} and below {high:g}, got {value!r}")
    network = PrunableNetwork(model, forward, parameters, exclude)
    objective = Objective(
        network,
        list(take(data, examples, forward)),
        find_loss(loss),
        memory=checked_memory(memory, network.weights),
        generator=lambda: torch.default_generator,
        sharded=False,
    )
    norms = objective.measure(None, inputs=True).input_norms
    share, sizes = {}, {name: weight.numel() for name, weight in network.weights.items()}
    for name, weight in network.weights.items():
        scores = Scoring(CRITERIA["Wanda"], {name: weight}, None, norms).saliencies(0.0)[name]
        scores = scores.clamp(min=0)  # of weights that are 0, which have none
        mean = scores.mean(dtype=torch.float64)
        share[name] = int((scores > outlier * mean).count_nonzero()) / sizes[name]
    middle = sum(share[name] * size for name, size in sizes.items()) / sum(sizes.values())
    furthest = max(abs(part - middle) for part in share.values()) or 1.0
    kept = {
        name: size * ((1 - sparsity) + spread * (share[name] - middle) / furthest)
        for name, size in sizes.items()
    }
    return Scope("outliers", None, by_row=True, shares=kept)
