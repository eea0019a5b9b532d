"""The curvature of weights in any use whatever: one example at a time, by their own gradients.

What layers saw and gave is not enough where a weight is in another function than a product or a
convolution (an einsum, a bilinear layer, experts in one parameter), or where the
rows of a product are not the examples one after the other (tokens first, the tokens that a gate
sends to an expert).  The definition is: h = Σ_n Σ_k (∂(z_n · S_nk)/∂θ)², a backward pass for every
example and column, with θ's gradient.
"""

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.curvature.columns import Columns
from lossprune.pruning.curvature.network import MaskedNetwork
from lossprune.pruning.errors import PruningError


def add_one_by_one_(
    totals: Mapping[str, Tensor],
    network: MaskedNetwork,
    batch: Batch,
    outputs: Tensor,
    columns: Columns,
    names: Collection[str],
    tell: Callable[[float], None],
) -> None:
    """Add Σ_n Σ_k (∂(z_n · S_nk)/∂θ)² to the totals of these weights.

    Args:
        totals: by parameter name, of the weight's shape; added to in place.
        network: whose weights they are.
        batch: the examples.
        outputs: z, (n, ...), of all of them, with its graph, which is kept.
        columns: S.
        names: of the weights.
        tell: is called after each example but the last, with 1.
    """
    weights = [network.weights[name] for name in names]
    for example, z, row in _each(network, batch, outputs):
        of_one = Columns(columns.vectors[example : example + 1], columns.positions)
        keys = of_one.keys()  # the other examples' columns at other positions are none of its
        for key in keys:
            seed = torch.zeros_like(z)
            seed[row] = of_one[key][0]
            found = torch.autograd.grad(z, weights, seed, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    gradient = gradient.to(totals[name].dtype)
                    totals[name].addcmul_(gradient, gradient)
        if example + 1 < len(outputs):
            tell(1)


def check_alone(
    network: MaskedNetwork, batch: Batch, outputs: Tensor, names: Collection[str]
) -> None:
    """Raise unless an example alone has the outputs that it has among these, to rounding.

    ``names`` are the weights for which it matters, to tell of.
    """
    depends = (
        f"the output of one example depends on others through {min(names)!r}: an example alone "
        "has other outputs than in a batch, so its curvature cannot be measured"
    )
    most = torch.finfo(outputs.dtype).eps ** 0.5 * float(outputs.detach().abs().max())
    try:
        with torch.no_grad():
            for example, z, row in _each(network, batch, outputs):
                if float((z[row] - outputs[example]).abs().max()) > most:
                    raise PruningError(depends)
    except PruningError as error:
        if str(error) == depends:
            raise
        raise PruningError(
            f"the curvature of {min(names)!r}, in a use of its own, takes one example at a time, "
            f"and an example alone could not be run: {error}"
        ) from error


def _each(
    network: MaskedNetwork, batch: Batch, outputs: Tensor
) -> Iterator[tuple[int, Tensor, int]]:
    """Yield each example, outputs that it is among, and its row there.

    Its own graph is short to go through; only a batch that cannot be cut has one for all.
    """
    for example in range(len(outputs)):
        if batch.size is None or len(outputs) == 1:
            yield example, outputs, example
            continue
        alone, _ = network(batch[example : example + 1])
        if alone.shape != (1, *outputs.shape[1:]):
            raise PruningError(
                "the network must return a row of outputs for each example, got "
                f"{tuple(alone.shape)} for one and {tuple(outputs.shape)} for {len(outputs)}"
            )
        yield example, alone, 0
