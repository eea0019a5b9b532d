"""Running a network with other parameters and buffers in the places of its own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def places(model: nn.Module) -> dict[str, str]:
    """Return every place that holds a parameter or a buffer, once, and the name of what it holds.

    A place is an attribute of a module.  A module that has several names has its attributes once,
    under the first of them; a tensor that several modules share is in several places, under the one
    name that ``named_parameters`` or ``named_buffers`` gives it.

    >>> cell, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    >>> other.weight = cell.weight
    >>> places(nn.Sequential(cell, cell, other))
    {'0.weight': '0.weight', '2.weight': '0.weight'}
    """
    tensors = (*model.named_buffers(), *model.named_parameters())
    names = {id(tensor): name for name, tensor in tensors}
    return {
        f"{prefix}.{attribute}" if prefix else attribute: names[id(tensor)]
        for prefix, module in model.named_modules()
        for own in (module._parameters, module._buffers)
        for attribute, tensor in own.items()
        if tensor is not None
    }


def call_with(values: Mapping[str, Tensor], model: nn.Module, *inputs: Any) -> Any:
    """Return ``model(*inputs)`` with these values, by name, for its parameters and buffers.

    The network is left as it was.  torch's own tying of weights would write a module that has two
    names twice, and then put the second value back for its own.

    Args:
        values: by name as :func:`places` gives it; what has no value here keeps its own.
        model: the network.
        inputs: of the network.
    """
    given = {place: values[name] for place, name in places(model).items() if name in values}
    lists = [(vars(module), _lists(module)) for module in model.modules()]
    try:
        return functional_call(model, given, inputs, tie_weights=False)
    finally:
        for attributes, kept in lists:
            attributes.update(kept)


def _lists(module: nn.Module) -> dict[str, Any]:
    """The list in which a recurrent layer has its parameters a second time, if it is one."""
    attributes = vars(module) if isinstance(module, nn.RNNBase) else {}
    return {name: value for name, value in attributes.items() if name.startswith("_flat_weight")}
