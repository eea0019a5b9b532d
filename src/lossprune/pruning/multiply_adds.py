"""How many multiply-adds a weight takes part in for one example: as many as it has places of use.

The weight of a linear function is used once for each row of its input (a token, say), that of a
convolution at each of its output positions, also where padding lies under it, and that of a
transposed convolution at each of its input positions; uses in several calls add up.  Seen are the
functions that are called on a weight, not the layers.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lossprune.pruning.costs import WeightCosts
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.curvature.examples import take
from lossprune.pruning.curvature.geometry import Linear, Lookup, TransposedConvolution
from lossprune.pruning.curvature.layers import LayerCall
from lossprune.pruning.curvature.network import MaskedNetwork, PrunableNetwork
from lossprune.pruning.curvature.probe import ProbingCalls, looked_up, used_elsewhere
from lossprune.pruning.curvature.running import described, evaluating, outside_inference
from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import listed
from lossprune.pruning.randomness import PrivateRandomness

MULTIPLY_ADDS = "multiply-adds"


@outside_inference()
def count_multiply_adds(
    network: PrunableNetwork, example: Any, data: Iterable[Any] | None, *, sharded: bool
) -> WeightCosts:
    """Count the multiply-adds that a weight of each parameter takes part in, for one example.

    Args:
        network: run once, in evaluation mode, and left as it is.
        example: a batch of inputs, a tuple of arguments or a dict of keyword arguments, of which
            the first example is run, or all where they cannot be cut apart.
        data: whose first batch is taken where ``example`` is None.
        sharded: whether other processes have other data.

    Raises:
        ValueError: there is no example, and no data that can be read for one.
        PruningError: the network cannot be run on it; a weight is used in a way that is not
            counted, or none in one that is.
    """
    if example is None:
        _check_readable(data, sharded=sharded)
    # What is drawn, by a loader or the network, is nobody's else.
    with PrivateRandomness(distributed.shared_random_state()), distributed.together(network.device):
        if example is None:
            assert data is not None
            own = network.step.function if network.calls_own else None
            batch = next(take(data, None, own))
        else:
            batch = Batch.of(example, _call)
            network = network.called_by(_call)
        batch = (batch if batch.size is None else batch[:1]).to(network.device)
        masked = MaskedNetwork(network, None)
        with evaluating(network.model), _Uses(masked.weights, masked.own) as uses:
            if example is None:
                outputs, _ = masked(batch)
            else:
                outputs = _called(masked, batch)
        counts = dict.fromkeys(masked.weights, 0)
        for call in uses.calls:
            counts[call.name] += _places(call, masked.weights[call.name])
        elsewhere = used_elsewhere(masked.weights, outputs) if outputs.requires_grad else set()
        elsewhere |= looked_up(uses.calls)
        _check_counted(counts, elsewhere)
    prices = {name: float(count) for name, count in counts.items()}
    return WeightCosts(MULTIPLY_ADDS, counts, prices)


class _Uses(ProbingCalls):
    """Calls of functions on weights; of a packed projection one, where it is computed in thirds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begun = len(self.calls)
        result = super().__torch_function__(func, types, args, kwargs)
        if func is F.multi_head_attention_forward:
            thirds = self.calls[begun : begun + 3]
            if len({call.name for call in thirds}) == 1 < len(thirds):
                if len({call.output_shape for call in thirds}) > 1:
                    raise PruningError(
                        f"weights of {thirds[0].name!r}, the projections of queries, keys and "
                        "values in one, are used at different numbers of places, so that their "
                        f"multiply-adds are not the same: give exclude={thirds[0].name!r}"
                    )
                del self.calls[begun + 1 : begun + 3]
        return result


def _places(call: LayerCall, weight: Tensor) -> int:
    """How often one weight is used in a call: multiply-adds of the call / weights."""
    outputs = call.output_shape.numel()
    if isinstance(call.geometry, Lookup):
        return 0
    if isinstance(call.geometry, Linear):
        across = -2 if call.geometry.transposed and weight.ndim > 1 else -1
        return outputs * weight.shape[across] // weight.numel()
    if isinstance(call.geometry, TransposedConvolution):
        return call.inputs.numel() // weight.shape[0]
    return outputs // weight.shape[0]


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _called(masked: MaskedNetwork, batch: Batch) -> Tensor:
    """All numbers that the network returns for an example, in one tensor with a graph."""
    returned = masked.returned(
        batch,
        f"the network could not be run on the example, {described(batch.value)}",
        lambda text: "it is a batch of inputs, a tuple of arguments or a dict of keyword arguments",
    )
    leaves = tree_leaves(getattr(returned, "logits", returned))
    numbers = [part for part in leaves if isinstance(part, Tensor) and part.requires_grad]
    real = [torch.view_as_real(part) if part.is_complex() else part for part in numbers]
    # Of no numbers, what is returned depends on no weight.
    return torch.cat([part.flatten() for part in real] or [torch.zeros(1)])


def _check_readable(data: Iterable[Any] | None, *, sharded: bool) -> None:
    problem = ""
    if data is None:
        problem = "no data is given whose first batch would do"
    elif isinstance(data, Iterator):
        problem = "data is an iterator, which can be used only once"
    elif sharded and distributed.processes() > 1:
        problem = "the data of each process are others"
    if problem:
        raise ValueError(
            f"{MULTIPLY_ADDS} are counted on an example, and {problem}: give example=, a batch of "
            "inputs, a tuple of arguments or a dict of keyword arguments"
        )


def _check_counted(counts: Mapping[str, int], elsewhere: set[str]) -> None:
    uncounted = [repr(name) for name, count in counts.items() if not count and name in elsewhere]
    if uncounted:
        raise PruningError(
            f"the multiply-adds of {listed(uncounted, 3)} are not known, as other functions than "
            "linear ones and convolutions of the weight as a whole use it: give "
            f"exclude=[{listed(uncounted, len(uncounted)).replace(' and ', ', ')}]"
        )
    if not any(counts.values()):
        raise PruningError("no prunable weight is used in a linear function or convolution")
