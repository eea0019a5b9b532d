"""A deployed network into one file."""

import hashlib
from collections.abc import Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any, NoReturn

from torch import fx, nn

from lossprune.deployment.choices import LayerChoice
from lossprune.deployment.layer_by_layer import replaced_layers
from lossprune.deployment.original import Original
from lossprune.deployment.saved.format import (
    SavedArgument,
    SavedCall,
    SavedNetwork,
    SavedOriginal,
    SavedPart,
    packed,
)
from lossprune.deployment.saved.parts import part_of
from lossprune.deployment.saved.torch_parts import SavedTorchPart, TorchPart, torch_part_of
from lossprune.deployment.saved.values import tree
from lossprune.deployment.sparse.network import SparseNetwork
from lossprune.deployment.sparse.parts import NetworkInParts, ValueName
from lossprune.deployment.sparse.plan import SOURCE, lanes
from lossprune.deployment.traced import GraphInputs, TracedNetwork
from lossprune.files import check_folder_of, write_whole
from lossprune.kernels.interface import texts
from lossprune.pruning.errors import PruningError


def kernels_digest() -> str:
    """Return the SHA-256 of the kernels' source."""
    return hashlib.sha256("".join(texts(SOURCE).values()).encode()).hexdigest()


def save_network(
    network: nn.Module,
    layers: Sequence[LayerChoice],
    seconds: Mapping[str, float],
    notes: Sequence[str],
    path: Path,
) -> None:
    """Write what ``Deployed`` holds; see ``Deployed.save``."""
    check_folder_of(path)
    if not isinstance(network, TracedNetwork):
        _refuse(_reason(network))
    inner, arrays, parts = network.network, {}, []
    found = list(inner.parts) if isinstance(inner, NetworkInParts) else [inner]
    for k, part in enumerate(found):
        saved, own = _part(part, str(k))
        parts.append(saved)
        arrays |= own
    if isinstance(inner, NetworkInParts):
        wires, inputs, output = inner.wires, inner.inputs, inner.output
    else:
        (part,) = parts
        wires, inputs, output = ((part.inputs, ()),), part.inputs, None
    saved = SavedNetwork(
        tuple(parts), wires, inputs, _told("its output", output),
        isinstance(inner, SparseNetwork), _call(network.arguments), _original(network.original),
        tuple(layers), seconds, tuple(notes), kernels_digest(), lanes(),
    )  # fmt: skip
    write_whole(path, packed(saved, arrays))


def _part(part: nn.Module, prefix: str) -> tuple[SavedPart | SavedTorchPart, dict[str, Any]]:
    if isinstance(part, SparseNetwork):
        return part_of(part, prefix)
    assert isinstance(part, (fx.GraphModule, TorchPart))
    try:
        return torch_part_of(part, prefix)
    except TypeError as error:
        _refuse(f"torch computes {error} in it, which a file does not hold")


def _reason(network: nn.Module) -> str:
    if replaced_layers(network):
        return "its layers were replaced one by one, and the rest is code of its own"
    return "torch computes all of it, which was fastest"


def _refuse(reason: str) -> NoReturn:
    raise PruningError(
        f"this deployed network cannot be in a file, as {reason}: save the network itself with "
        "lossprune.save_sparse(network, mask, path), and deploy it where it is loaded"
    )


def _told(what: str, value: Any) -> Any:
    def name(leaf: Any) -> str | None:
        return leaf.name if isinstance(leaf, ValueName) else None

    try:
        return tree(value, name)
    except TypeError as error:
        _refuse(f"{what} is {error}")


def _call(arguments: GraphInputs) -> SavedCall:
    saved = []
    for name, parameter in arguments.signature.parameters.items():
        optional = parameter.default is not Parameter.empty
        default = _told(f"the default of {name!r}", parameter.default) if optional else None
        saved.append(SavedArgument(name, parameter.kind.name, optional, default))
    fixed = _told("a fixed argument", arguments.fixed)
    return SavedCall(arguments.called, tuple(saved), arguments.order, fixed)


def _original(original: Original) -> SavedOriginal:
    """Return what is known of the network; attributes that are objects are as those it lost."""
    attributes, gone = {}, set(original.gone)
    for name, value in original.attributes.items():
        try:
            attributes[name] = tree(value)
        except TypeError:
            gone.add(name)
    return SavedOriginal(original.module, original.name, attributes, tuple(sorted(gone)))
