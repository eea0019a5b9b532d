"""A network at θ ⊙ m, evaluated without touching the module it was made from."""

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node

from lossprune.pruning.choices import Choices
from lossprune.pruning.curvature.batch import Batch, Forward
from lossprune.pruning.curvature.examples import device_of
from lossprune.pruning.curvature.forms import default_forward
from lossprune.pruning.curvature.layers import LayerCall
from lossprune.pruning.curvature.running import Saving, advice_on_inputs, described, ordinary, run
from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import listed, look_up
from lossprune.pruning.prunable import prunable_weights
from lossprune.pruning.substitution import call_with
from lossprune.pruning.wholeness import check_whole

# What is raised where a gradient or curvature is asked for.
NOTHING = "the outputs do not depend on any prunable weight, so they say nothing of any"


class _ForwardCall(nn.Module):
    """A forward function as a module, so that parameters can be put in for its network's."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Any:
        return self.function(self.model, batch)


class PrunableNetwork:
    """A module, which of its weights are measured and pruned, and how it is called: found once.

    The module may be trained between two looks at it: values are read when they are asked for.

    Attributes:
        model: the module.
        names: of the weights, as ``named_parameters`` gives them.
        device: the one that all of them are on.
        step: calls the module on a batch.
        calls_own: whether it does so by a function of the user's.
        moved: parameters and buffers, by name, that have other values here than in the module.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None = None,
        parameters: Choices | None = None,
        exclude: Choices | None = None,
    ) -> None:
        weights = prunable_weights(model, parameters, exclude)
        self.model = model
        self.names = tuple(weights)
        self.device = device_of(weights.values())
        self.step = _ForwardCall(model, forward or default_forward)
        self.calls_own = self.step.function is not default_forward
        self.moved: Mapping[str, Tensor] = {}

    def moved_to(self, values: Mapping[str, Tensor]) -> "PrunableNetwork":
        """Return the network with these parameters and buffers, by name; the module stays."""
        network = copy(self)
        network.moved = {**self.moved, **values}
        return network

    def called_by(self, function: Callable[[nn.Module, Any], Any]) -> "PrunableNetwork":
        """Return the network with another function that calls the module."""
        network = copy(self)
        network.step = _ForwardCall(self.model, function)
        return network

    def of(self, names: Iterable[str]) -> "PrunableNetwork":
        """Return the network with the parameters of these names in the place of its weights."""
        network = copy(self)
        network.names = tuple(names)
        return network

    @property
    def weights(self) -> dict[str, Tensor]:
        """θ by parameter name, as it is now."""
        return {name: self.moved.get(name, own) for name, own in self.own.items()}

    @property
    def own(self) -> dict[str, Tensor]:
        """The module's own parameters of these names, as they are now.

        Raises:
            PruningError: the module no longer has one of them.
        """
        parameters = dict(self.model.named_parameters())
        gone = [repr(name) for name in self.names if name not in parameters]
        if gone:
            raise PruningError(
                f"{type(self.model).__name__} no longer has {listed(gone, 3)}: between stages its "
                "weights may change, but not which parameters they are"
            )
        return {name: parameters[name] for name in self.names}


class MaskedNetwork:
    """The function batch → (outputs, targets) of a module whose removed weights are 0.

    It is at θ ⊙ m, of θ and buffers as they are now.

    Attributes:
        own: by parameter name, the module's own, whatever θ is.
        kept: m by name, of other parameters too if it names them; None where all is kept.
        weights: θ ⊙ m by parameter name: leaves of a graph, apart from the module's own.
        constants: all else that the module has, by name.
        unreached: names of the weights that no outputs have depended on so far.

    Raises:
        PruningError: the mask does not fit, or a tensor is not whole.
    """

    def __init__(self, prunable: PrunableNetwork, mask: Mapping[str, Tensor] | None) -> None:
        model = prunable.model
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        check_whole(model, parameters | buffers)
        if mask is not None and not mask.keys() <= parameters.keys():
            mask = _as_named_in(model, mask)
        self.prunable = prunable
        self.device = prunable.device
        self.own = own = prunable.own
        # What is no weight is a constant; buffers are copies, in case the network writes them.
        values = {name: ordinary(parameter.detach()) for name, parameter in parameters.items()}
        values |= {name: buffer.clone() for name, buffer in buffers.items()}
        # Copies too: a buffer may be written, and a weight becomes a leaf.
        values |= {name: value.detach().clone() for name, value in prunable.moved.items()}
        self.kept = None if mask is None else _checked(mask, own, values, self.device)
        for name, kept in (self.kept or {}).items():
            if int(kept.count_nonzero()) < kept.numel():  # else the weight itself will do
                values[name] = values[name] * kept
        self.weights = {name: values.pop(name).requires_grad_() for name in own}
        self.constants = values
        self.unreached = set(self.weights)

    def __call__(self, batch: Batch) -> tuple[Tensor, Any]:
        """Outputs of the network at θ ⊙ m, (n, ...), and targets."""
        own = self.prunable.calls_own
        result = self.returned(
            batch,
            f"{'forward' if own else 'the network'} could not be run on a batch of "
            f"{described(batch.value)}",
            lambda text: (
                "it gets the batch as it is, and returns (outputs, targets)"
                if own
                else advice_on_inputs(batch.value, self.weights.values(), text)
            ),
        )
        return _checked_result(result)

    def returned(self, batch: Batch, what: str, advice: Callable[[str], str]) -> Any:
        """Return what the network's step returns; ``what`` and ``advice`` are as in ``run``."""
        values = {f"model.{name}": v for name, v in (self.constants | self.weights).items()}
        # A copy, in case the network changes its inputs in place.
        given = batch.map(torch.clone).value
        with Saving():
            return run(what, lambda: call_with(values, self.prunable.step, given), advice)

    def map(self, function: Callable[[Tensor], Tensor]) -> "MaskedNetwork":
        """Return the network with the function applied to every weight, constant and buffer."""
        network = copy(self)
        network.weights = {
            name: function(weight.detach()).requires_grad_()
            for name, weight in self.weights.items()
        }
        network.constants = {name: function(x) for name, x in self.constants.items()}
        return network

    def along(self, direction: Mapping[str, Tensor]) -> "MaskedNetwork":
        """Return the network with these tangents at its weights, in a forward-mode level."""
        network = copy(self)
        network.weights = {
            name: forward_ad.make_dual(weight, direction[name].to(weight.dtype))
            if name in direction
            else weight
            for name, weight in self.weights.items()
        }
        return network

    def zeros(self) -> dict[str, Tensor]:
        """One zero for every prunable weight, to sum in: float32, or wider as the weight is."""
        return {
            name: torch.zeros(
                weight.shape,
                dtype=torch.promote_types(weight.dtype, torch.float32),
                device=weight.device,
            )
            for name, weight in self.weights.items()
        }

    def note_reached(self, outputs: Tensor, calls: Iterable[LayerCall] = ()) -> None:
        """Take the weights that these outputs depend on from those that none has depended on."""
        if self.unreached:
            self.unreached -= self.reached(outputs, calls)

    def reached(self, outputs: Tensor, calls: Iterable[LayerCall] = ()) -> set[str]:
        """Return the names of the weights that these outputs depend on.

        That is seen in the graph, by the weights or by recorded calls: a layer behind a ReLU that
        is shut, or one whose gradient is zero, is depended on.
        """
        leaves = {id(weight): name for name, weight in self.weights.items()}
        layers = {call.output.node: call.name for call in calls}
        found: set[str | None] = set()
        seen: set[Node] = set()
        waiting = [outputs.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = id(getattr(node, "variable", None))  # of a node that ends at a tensor
            found |= {layers.get(node), leaves.get(leaf)}
            waiting += [following for following, _ in node.next_functions]
        return {name for name in found if name is not None}


def _checked_result(result: Any) -> tuple[Tensor, Any]:
    """What a network or a user's ``forward`` returned, if it is outputs and targets."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise PruningError(
            f"forward must return a pair (outputs, targets), got {type(result).__name__}"
        )
    outputs, targets = result
    if not isinstance(outputs, Tensor) or outputs.ndim == 0:
        raise PruningError(
            f"the network must return a tensor of outputs, got {type(outputs).__name__}"
            + ("" if not isinstance(outputs, Tensor) else " without dimensions")
        )
    if not outputs.is_floating_point():
        raise PruningError(f"the network must return real numbers, got {outputs.dtype}")
    return outputs, targets


def _as_named_in(model: nn.Module, mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mask by the names that ``named_parameters`` gives, but for those of no parameter.

    It may have them as they are without a wrapper, and by any of the names of a module.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named: dict[str, Tensor] = {}
    for name, found in look_up(mask, parameters).items():
        own = name if found is None else names[id(parameters[found])]
        named[own] = mask[name] & named[own] if own in named else mask[name]
    return named


def _checked(
    mask: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    """The mask where the weights are, if it names all of them, and nothing that is not there."""
    for name in weights:
        if name not in mask:
            raise PruningError(f"the mask has nothing for the prunable weight {name!r}")
    for name, kept in mask.items():
        if name not in values:
            raise PruningError(f"the mask names {name!r}, which the network lacks")
        if kept.shape != values[name].shape:
            raise PruningError(
                f"the mask of {name!r} has shape {tuple(kept.shape)}, the weight "
                f"{tuple(values[name].shape)}"
            )
    # In one layout, as a mask made like a weight of another has that one.
    return {name: kept.to(device).contiguous() for name, kept in mask.items()}
