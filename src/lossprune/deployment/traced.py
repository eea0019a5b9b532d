"""A traced network that is called as the network itself is."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Signature
from typing import Any

from torch import Tensor, nn

from lossprune.channels.calls import fixed_by, usual_fixed
from lossprune.channels.tracing import Trace, UntraceableError, trace
from lossprune.deployment.original import Original
from lossprune.pruning.errors import PruningError


class GraphInputs:
    """Where a graph finds its inputs among the arguments of a network's ``forward``.

    What a network computes may depend on whether an argument is there, None, True or False; a graph
    holds one way, and is refused to calls that ask for another.
    """

    def __init__(
        self, called: str, signature: Signature, order: Sequence[str], fixed: Mapping[str, Any]
    ) -> None:
        """Take what is called and what it takes, besides the network itself.

        ``order`` are the names that the graph reads; ``fixed``, the values others must have.
        """
        self.called, self.signature = called, signature
        self.order, self.fixed = tuple(order), dict(fixed)
        parameters = signature.parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        plain = tuple(parameters)[: len(order)] == self.order
        self._usual = plain and all(defaults.get(name) is value for name, value in fixed.items())

    @classmethod
    def of(cls, model: nn.Module, order: Sequence[str], fixed: Mapping[str, Any]) -> "GraphInputs":
        """Return those of a graph of ``model``."""
        signature = inspect.signature(type(model).forward)
        own = signature.replace(parameters=list(signature.parameters.values())[1:])
        return cls(f"{type(model).__name__}.forward()", own, order, fixed)

    def __call__(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Sequence[Any]:
        """Return the graph's inputs, in order.

        Raises:
            PruningError: an argument is not as it was in the example.
            TypeError: the network does not take these arguments.
        """
        if self._usual and not named and len(inputs) == len(self.order):
            return inputs  # by far the most calls: nothing to look up
        try:
            given = self.signature.bind(*inputs, **named)
        except TypeError as error:
            raise TypeError(f"{self.called} {error}") from None
        given.apply_defaults()
        for name, value in self.fixed.items():
            key = name.lstrip("*")
            if not _same(given.arguments[key], value):
                raise PruningError(
                    f"deployed for {key} = {value!r}, as in the example, but it got "
                    f"{_short(given.arguments[key])}: deploy the network with such an example"
                )
        return [given.arguments[name] for name in self.order]


class TracedNetwork(nn.Module):
    """A network made from a graph, and the way to call it; with the attributes of the original."""

    def __init__(self, network: nn.Module, arguments: GraphInputs, original: Original) -> None:
        """Take what computes, where it finds its inputs, and what it was made of."""
        super().__init__()
        self.network, self.arguments = network, arguments
        self.original = original

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = vars(self).get("original")
            if original is None or name.startswith("__"):  # it is being copied
                raise
        if name in original.gone:
            original.refuse(name)
        return original.attribute(name, self)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the network returns."""
        return inner_call(self)(*self.arguments(inputs, named))


def inner_call(module: nn.Module) -> Callable[..., Any]:
    """Return what calls the module's ``network``: its ``forward`` alone where no hooks are on it.

    A small network takes fifteen microseconds in all: it is looked up as it is quickest.
    """
    network = module._modules["network"]
    assert network is not None
    return network if network._forward_hooks or network._forward_pre_hooks else network.forward


def traced(model: nn.Module, example: Any) -> tuple[Trace, GraphInputs]:
    """Return the operations of ``model``, called as in ``example``, and where they find inputs.

    Numbers and strings are inputs, too, if the network's code lets them be any.

    Raises:
        UntraceableError: there is no such graph.
    """
    try:
        found = trace(model, fixed := usual_fixed(model, example))
    except UntraceableError:
        found = trace(model, fixed := fixed_by(example, model))
    order = [str(node.target) for node in found.graph.nodes if node.op == "placeholder"]
    if any(name.startswith("*") for name in order):
        raise UntraceableError("the network takes any number of arguments")
    return found, GraphInputs.of(model, order, fixed)


def _same(one: Any, other: Any) -> bool:
    return one is other or (
        not isinstance(one, Tensor) and type(one) is type(other) and bool(one == other)
    )


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else f"{value!r:.60}"
