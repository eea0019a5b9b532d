"""How much of a network a mask leaves connected, layer by layer."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, fx, nn

from lossprune.channels.analysis import Analysis, analyse
from lossprune.channels.calls import Fixed
from lossprune.channels.tracing import UntraceableError
from lossprune.channels.values import Channels, Unknown
from lossprune.pruning.names import listed
from lossprune.pruning.prunable import input_dimensions, stacked_weights

_NEVER = "the network never uses it"


@dataclass(frozen=True)
class LayerConnectivity:
    """What the mask leaves of one weight.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        total: numbers in it.
        kept: those that the mask keeps.
        live: those on a path of kept weights from the network's input to an output.
        units: output units or channels of the layer.
        dead_units: those on no such path.
    """

    name: str
    shape: tuple[int, ...]
    total: int
    kept: int
    live: int
    units: int
    dead_units: int

    @property
    def removed(self) -> int:
        """``total − kept``."""
        return self.total - self.kept


@dataclass(frozen=True)
class Connectivity:
    """What a mask leaves of a network.

    Attributes:
        layers: of each parameter in the mask, in its order.
        left_dense: why the channels of a layer could not all be followed, by the layer's name; all
            its kept weights then count as live unless a path is known to be broken.
    """

    layers: tuple[LayerConnectivity, ...]
    left_dense: dict[str, str]

    def __repr__(self) -> str:
        dead, units = sum(x.dead_units for x in self.layers), sum(x.units for x in self.layers)
        left = f", {len(self.left_dense)} left dense" if self.left_dense else ""
        return (
            f"Connectivity({len(self.layers)} layers, {dead:,} of {units:,} units dead, "
            f"sparsity {self.nominal_sparsity:.5g}, effective {self.effective_sparsity:.5g}{left})"
        )

    @property
    def nominal_sparsity(self) -> float:
        """The fraction of the weights that the mask removes."""
        return self._without("kept")

    @property
    def effective_sparsity(self) -> float:
        """The fraction of the weights that is removed or on no path from input to output."""
        return self._without("live")

    @property
    def notes(self) -> list[str]:
        """What ``left_dense`` says, with the layers of each reason together."""
        return grouped(self.left_dense, "unreachable units could not all be found")

    def with_reason(self, reason: str) -> "Connectivity":
        """The same, with every layer left dense for ``reason``."""
        return replace(self, left_dense={_layer(layer.name): reason for layer in self.layers})

    def _without(self, count: str) -> float:
        total = sum(layer.total for layer in self.layers)
        return (total - sum(getattr(layer, count) for layer in self.layers)) / max(total, 1)


def grouped(left_dense: Mapping[str, str], what: str) -> list[str]:
    """Return a note for each reason: ``what`` is so of which layers, and why.

    >>> grouped({"a": "it has hooks", "b": "it has hooks", "c": "it is tied"}, "nothing is known")
    ['nothing is known in 2 layers (a, b): it has hooks', 'nothing is known in c: it is tied']
    """
    layers: dict[str, list[str]] = {}
    for layer, reason in left_dense.items():
        layers.setdefault(reason, []).append(layer or "the network itself")
    notes = []
    for reason, names in layers.items():
        where = f"{len(names)} layers ({listed(names, most=2)})" if len(names) > 1 else names[0]
        notes.append(f"{what} in {where}: {reason}")
    return notes


def connectivity_of(
    masked: nn.Module, mask: Mapping[str, Tensor], fixed: Fixed
) -> tuple[Connectivity, Analysis | None]:
    """Return what ``mask`` leaves of ``masked``, to which it has been applied, and the analysis.

    ``fixed`` are the arguments of the network's calls that are no tensors (``calls.py``).  The
    analysis is None where the network cannot be traced, which ``left_dense`` then says.
    """
    units = partial(_units, input_dimensions(masked), stacked_weights(masked))
    try:
        analysis = analyse(masked, mask, fixed)
    except UntraceableError as error:
        layers = tuple(_dense(name, kept, units(name, kept)) for name, kept in mask.items())
        return Connectivity(layers, {}).with_reason(str(error)), None
    known = analysis.layers()
    reasons = _reasons(analysis, [_layer(name) for name in mask])
    layers = []
    for name, kept in mask.items():
        layer = _layer(name)
        if layer in known and name == f"{layer}.weight":
            paths = analysis.on_path(*known[layer]).flatten(1)
            dead = len(paths) - int(paths.any(1).sum())
            layers.append(_counted(name, kept, int(paths.sum()), len(paths), dead))
        else:
            counts = _dense(name, kept, units(name, kept))
            if reasons.get(layer) == _NEVER:
                counts = replace(counts, live=0, dead_units=counts.units)
            layers.append(counts)
    return Connectivity(tuple(layers), reasons), analysis


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _units(inputs: Mapping[str, int], stacked: Collection[str], name: str, kept: Tensor) -> Tensor:
    """The mask with a row for each output unit; for each expert, where units are not known."""
    dimension = inputs.get(name)
    if name in stacked:
        return kept if dimension is None else kept.movedim(dimension, -1).flatten(0, 1)
    return kept.transpose(0, 1) if dimension == 0 else kept


def _dense(name: str, kept: Tensor, units: Tensor) -> LayerConnectivity:
    """With all kept weights live, and dead units where there are none."""
    dead = len(units) - int(units.reshape(len(units), -1).any(1).sum())
    return _counted(name, kept, int(kept.sum()), len(units), dead)


def _counted(name: str, kept: Tensor, live: int, units: int, dead: int) -> LayerConnectivity:
    shape = tuple(kept.shape)
    return LayerConnectivity(name, shape, kept.numel(), int(kept.sum()), live, units, dead)


def _reasons(analysis: Analysis, layers: list[str]) -> dict[str, str]:
    """Why layers keep channels that the mask alone would not, in the order of ``layers``."""
    known = analysis.layers()
    refused = {
        str(node.target): reason
        for node, reason in analysis.refused.items()
        if node.op == "call_module"
    }
    required = _required(analysis)
    reasons = {}
    for name in layers:
        if name in known:
            reason = _known_reason(analysis, known[name][0], required)
        else:
            whole = next((n for n in refused if name == n or name.startswith(f"{n}.")), None)
            reason = refused[whole] if whole is not None else _unseen(analysis, name)
        if reason:
            reasons[name] = reason
    return reasons


def _unseen(analysis: Analysis, layer: str) -> str:
    """Why a layer is not among those called."""
    read = (str(node.target) for node in analysis.graph.nodes if node.op == "get_attr")
    if any(not layer or name.startswith(f"{layer}.") for name in read):
        return "the network uses its parameters without calling it"
    return _NEVER


def _required(analysis: Analysis) -> dict[int, str]:
    """Why channels must all stay, by group."""
    groups, required = analysis.groups.representatives().tolist(), {}
    for node, reason in analysis.required:
        value = analysis.values[node]
        if reason and isinstance(value, Channels):
            required |= {groups[i]: reason for i in value.groups.tolist()}
    return {i: required[group] for i, group in enumerate(groups) if group in required}


def _known_reason(analysis: Analysis, node: fx.Node, required: dict[int, str]) -> str | None:
    (before,), after = analysis.inputs(node), analysis.values[node]
    if isinstance(before, Unknown) and before.reason:
        return f"what it reads keeps all channels ({before.reason})"
    assert isinstance(after, Channels)
    reason = required.get(int(after.groups[0])) if len(after) else None
    return f"what reads it needs all channels ({reason})" if reason else None
