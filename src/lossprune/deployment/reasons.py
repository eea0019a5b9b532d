"""Why a layer stays dense, in plain words."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from lossprune.channels.costs import weighted_layers
from lossprune.channels.nodes import changed, paddings
from lossprune.pruning.names import listed

FASTER = "torch's dense layer is faster here"
ALTOGETHER = "the whole network is faster with dense layers here"
NOT_SEMI_STRUCTURED = "PyTorch's semi-structured product does not take it, or is no faster"
NOT_TAKEN = "its code could not be followed, or it is called with what the kernels do not take"


def reasons(
    network: nn.Module,
    outputs: Mapping[str, int],
    sparse: Collection[str],
    losing: Collection[str],
    otherwise: str,
) -> dict[str, str]:
    """Return why each layer that is not in ``sparse`` stays dense, by name.

    Args:
        network: the one that is deployed, before that.
        outputs: how many numbers each layer gives on the example.
        sparse: the names of layers with a sparse kernel.
        losing: of layers whose sparse kernel is slower than torch's.
        otherwise: the reason of those of which no more is known.
    """
    found = {}
    for name, layer in weighted_layers(network).items():
        if name in sparse:
            continue
        slower = FASTER if name in losing else otherwise
        found[name] = obstacle(layer, outputs.get(name, 0)) or slower
    return found


def obstacle(layer: nn.Module, outputs: int) -> str | None:
    """Return why no sparse kernel takes a layer; None: one does.

    >>> obstacle(nn.Linear(3, 2).double(), 2)
    'the kernels compute in float32, and its weights are float64'
    """
    kind, weight = type(layer), layer.weight
    if kind not in (nn.Linear, nn.Conv2d):
        return f"the kernels take nn.Linear and nn.Conv2d, and it is of the class {kind.__name__}"
    if why := changed(layer):
        return why
    if not outputs:
        return "the network does not call it on the example"
    if weight.dtype != torch.float32:
        type_ = str(weight.dtype).removeprefix("torch.")
        return f"the kernels compute in float32, and its weights are {type_}"
    return _padding(layer) if isinstance(layer, nn.Conv2d) else None


def _padding(layer: nn.Conv2d) -> str | None:
    if layer.padding_mode != "zeros":
        return f"the kernels pad with zeros, and it pads with {layer.padding_mode!r}"
    alike = all(before == after for before, after in paddings(layer))
    return None if alike else "the kernels pad both sides alike, and it does not"


def told(why: Mapping[str, str]) -> list[str]:
    """Return a line for each reason, and the layers that have it.

    >>> told({"fc1": FASTER, "fc2": FASTER, "out": "it has hooks"})
    ["dense: fc1, fc2, as torch's dense layer is faster here", 'dense: out, as it has hooks']
    """
    groups: dict[str, list[str]] = {}
    for name, reason in why.items():
        groups.setdefault(reason, []).append(name)
    return [f"dense: {listed(names, most=4)}, as {reason}" for reason, names in groups.items()]
