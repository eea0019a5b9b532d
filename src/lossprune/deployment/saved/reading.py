"""A deployed network from its file."""

import sys
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from torch import nn

from lossprune.deployment.deployed import Deployed
from lossprune.deployment.original import Original
from lossprune.deployment.saved.format import (
    Arrays,
    SavedCall,
    SavedNetwork,
    SavedOriginal,
    SavedPart,
    unpacked,
)
from lossprune.deployment.saved.parts import network_of
from lossprune.deployment.saved.torch_parts import torch_network_of
from lossprune.deployment.saved.values import leaves
from lossprune.deployment.saved.writing import kernels_digest
from lossprune.deployment.sparse.network import SparseNetwork
from lossprune.deployment.sparse.parts import NetworkInParts, ValueName
from lossprune.deployment.sparse.plan import lanes
from lossprune.deployment.traced import GraphInputs, TracedNetwork
from lossprune.kernels.compiler import NoCompiler
from lossprune.pruning.errors import PruningError

_ARGUMENTS = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY")


def load_deployed(path: str | Path) -> Deployed:
    """Return the network that ``Deployed.save`` wrote, ready to run.

    Neither the network's class nor its code is needed, and none is run: the file holds data alone.
    The kernels are those of this machine, from the cache of ``lossprune.deploy``; where they are
    not there yet, they are compiled first, which takes seconds.  The methods of the network's class
    are there where its module is imported already.

    Raises:
        FileNotFoundError: there is no such file.
        PruningError: it is something else, of another version or damaged; or the kernels are not
            in the cache and there is no compiler.

    >>> import tempfile, torch, lossprune
    >>> network = lossprune.networks.NETWORKS["MLP"](shape=(1, 28, 28), hidden=(300,))
    >>> mask = lossprune.Mask({"fc1.weight": torch.rand(300, 784) < 0.01})
    >>> deployed = lossprune.deploy(network, mask, torch.randn(64, 1, 28, 28), seconds=0.01)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     deployed.save(Path(folder) / "mlp.deployed")
    ...     loaded = load_deployed(Path(folder) / "mlp.deployed")
    >>> images = torch.randn(3, 1, 28, 28)
    >>> torch.equal(loaded(images), deployed(images))
    True
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no deployed network at {path}")
    saved, arrays = unpacked(path)
    try:
        network = _network(saved, arrays)
    except ValueError as error:
        raise PruningError(f"{path} contradicts itself: {error}") from None
    try:
        same = (saved.kernels, saved.lanes) == (kernels_digest(), lanes())
    except NoCompiler as error:
        raise PruningError(f"{path} needs the kernels of this machine: {error}") from None
    note = (
        "tuned on another kind of machine or by another lossprune: deployed here, it may be faster"
    )
    notes = saved.notes if same or note in saved.notes else (*saved.notes, note)
    return Deployed(network, saved.layers, dict(saved.seconds), notes)


def _network(saved: SavedNetwork, arrays: Arrays) -> nn.Module:
    """Raise ValueError where what is saved contradicts itself."""
    if len(saved.parts) != len(saved.wires):
        raise ValueError("its parts are not those that are said to be connected")
    parts = [
        network_of(part, arrays, str(k))
        if isinstance(part, SavedPart)
        else torch_network_of(part, arrays, str(k))
        for k, part in enumerate(saved.parts)
    ]
    if saved.whole:
        if len(parts) != 1 or not isinstance(parts[0], SparseNetwork):
            raise ValueError("it has several parts, and is said to be one")
        inner: nn.Module = parts[0]
    else:
        inner = NetworkInParts(parts, saved.wires, saved.inputs, _output(saved))
    return TracedNetwork(
        inner, _arguments(saved.call, len(saved.inputs)), _original(saved.original)
    )


def _output(saved: SavedNetwork) -> Any:
    known = set(saved.inputs)
    for part, (reads, makes) in zip(saved.parts, saved.wires, strict=True):
        if not known.issuperset(reads) or len(reads) != len(part.inputs):
            raise ValueError("a part reads what none before it makes")
        if len(makes) != len(part.outputs):
            raise ValueError("a part does not make what it is said to")
        known.update(makes)

    def value(name: str) -> ValueName:
        if name not in known:
            raise ValueError(f"its output {name!r} is not computed")
        return ValueName(name)

    return leaves(saved.output, value)


def _arguments(call: SavedCall, inputs: int) -> GraphInputs:
    parameters = []
    for one in call.arguments:
        if one.kind not in _ARGUMENTS and one.kind != "VAR_KEYWORD":
            raise ValueError(f"its argument {one.name!r} is of no kind")
        default = leaves(one.default) if one.optional else Parameter.empty
        parameters.append(Parameter(one.name, getattr(Parameter, one.kind), default=default))
    fixed, signature = leaves(call.fixed), Signature(parameters)
    names = {*signature.parameters}
    order = len(call.order) == inputs and names.issuperset(call.order)
    if not order or not isinstance(fixed, dict) or {n.lstrip("*") for n in fixed} - names:
        raise ValueError("it is called with arguments that it does not have")
    return GraphInputs(call.called, signature, call.order, fixed)


def _original(saved: SavedOriginal) -> Original:
    # Its module is not imported for a file's sake: that would run code which the file names.
    kind: Any = sys.modules.get(saved.module)
    for name in saved.name.split("."):
        kind = vars(kind).get(name) if kind is not None and hasattr(kind, "__dict__") else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        kind = None
    if not isinstance(saved.attributes, dict):
        raise ValueError("the network's attributes have no names")
    attributes = {name: leaves(value) for name, value in saved.attributes.items()}
    return Original(kind, saved.module, saved.name, attributes, frozenset(saved.gone))
