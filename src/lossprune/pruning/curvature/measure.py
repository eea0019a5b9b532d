"""Measuring a network on data: mean loss, its gradient and the diagonal of its GGN matrix."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.pruning.choices import Choices
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Forward
from lossprune.pruning.curvature.estimators import Estimator, find_estimator
from lossprune.pruning.curvature.examples import take
from lossprune.pruning.curvature.losses import Loss, LossFunction, find_loss
from lossprune.pruning.curvature.network import PrunableNetwork
from lossprune.pruning.curvature.objective import Objective
from lossprune.pruning.curvature.plainly import outside_inference
from lossprune.pruning.curvature.statistics import Statistics
from lossprune.pruning.wholeness import check_whole


@outside_inference()
def measure(
    model: nn.Module,
    batches: Iterable[Any],
    examples: int | None = None,
    *,
    mask: Mapping[str, Tensor] | None = None,
    loss: str | Loss | LossFunction = "cross_entropy",
    gradient: bool = True,
    ggn_diagonal: bool = True,
    estimator: str | Estimator = "exact",
    memory: int | None = None,
    generator: torch.Generator | None = None,
    forward: Forward | None = None,
    parameters: Choices | None = None,
    exclude: Choices | None = None,
    sharded: bool = False,
) -> Statistics:
    r"""Measure loss, gradient and GGN diagonal of a network's prunable weights.

    With the loss ℓ of one example, the Jacobian J of its outputs and the Hessian H of ℓ in the
    outputs, the generalised Gauss-Newton matrix is G = mean over examples of Jᵀ H J.  H = S Sᵀ for
    a factor S with a column for each rank of H, hence

        diag(G) = mean over examples of Σ_k (Jᵀ S_k)²,

    one backward pass a column, with gradients at the layers' outputs only.  Source: Schraudolph,
    "Fast curvature matrix-vector products", 2002; the column form as in Dangel et al., "BackPACK",
    2020; the computation is described in docs/curvature.md.

    Under an initialised ``torch.distributed`` group every process must call this, with the same
    batches, of each of which it takes its part, or with ``sharded`` and batches of its own; all
    return the same sums.  What an estimator draws depends on how many they are.

    Args:
        model: left as it is, its gradients, hooks, mode and buffers included; measured in
            evaluation mode.  The first dimension of every layer's input must be the examples.
        batches: (inputs, targets) pairs, or dicts of the network's keyword arguments and
            ``labels``; moved to the network's device as needed.
        examples: how many to read, exactly (the last batch is cut); None reads all.
        mask: weights to take as 0, by parameter name, True where kept.
        loss: a name in ``LOSSES``, a :class:`Loss`, or a function of (outputs, targets), for which
            the only estimator is ``"empirical-fisher"``.
        gradient: whether to measure the gradient.
        ggn_diagonal: whether to measure the GGN diagonal.
        estimator: of the GGN diagonal: a name in ``ESTIMATORS`` or an :class:`Estimator`.
        memory: bytes that activations, gradients and products may take at once, beside the
            network, its statistics and the batches; 256 MiB on a CPU and 4 GiB on a GPU if not
            given.  At least one example and one column are always taken.
        generator: CPU generator of what the estimator draws; torch's global one if not given.
        forward: ``forward(model, batch)`` gives (outputs, targets) of batches of any other form.
            Those of tensors with one entry per example, in tuples, lists and dicts, are cut and
            joined as needed; others are taken whole.
        parameters: whose gradient and curvature to measure, and
        exclude: which of these not; as in :func:`lossprune.prune`.
        sharded: whether the batches of each process of a ``torch.distributed`` group are its own
            share of the data, as a ``DistributedSampler`` gives it.  ``examples`` counts those of
            all processes together, of which each reads an equal part, to one.

    Raises:
        PruningError: too few examples; processes with different data that is not ``sharded``, or
            with a sampler that divides it; outputs or targets that the loss cannot take; a prunable
            weight used outside a linear or convolution function, or under examples that are not
            independent (named); a loss, gradient or curvature that is not finite (named).

    >>> from torch import nn
    >>> model = nn.Linear(4, 3)
    >>> stats = measure(model, [(torch.randn(8, 4), torch.arange(8) % 3)])
    >>> stats.examples, stats.ggn_diagonal["weight"].shape
    (8, torch.Size([3, 4]))
    """
    check_whole(model)
    objective = Objective(
        PrunableNetwork(model, forward, parameters, exclude),
        take(batches, examples, forward, sharded=sharded),
        find_loss(loss),
        memory=memory,
        generator=lambda: generator or torch.default_generator,
        sharded=sharded,
    )
    found = find_estimator(estimator) if ggn_diagonal else None
    if not sharded:
        distributed.check_undivided(batches)
    return objective.measure(mask, gradient=gradient, estimator=found)
