"""A network as it was deployed: what computes, and how each layer was chosen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lossprune.deployment.choices import LayerChoice
from lossprune.deployment.original import refuse_to_set
from lossprune.deployment.saved.writing import save_network
from lossprune.deployment.sparse.network import check_conversion
from lossprune.deployment.sparse.parts import sparse_networks
from lossprune.deployment.traced import TracedNetwork, inner_call
from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import listed

__all__ = ["Deployed", "LayerChoice"]

_OWN = frozenset({"network", "layers", "seconds", "notes"})


class Deployed(nn.Module):
    """A pruned network for inference; an ordinary module, always in evaluation mode.

    It is called as the network itself, by position or by name, and has its other attributes and
    methods, of which ``forward`` is the deployed one (``original.py``).  Its parameters are the
    kept weights.

    Attributes:
        network: what computes.
        layers: a :class:`LayerChoice` for each linear layer and convolution, in order.
        seconds: the shortest time on the example of each way that was tried.
        notes: what could not be done, and why.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[LayerChoice],
        seconds: dict[str, float],
        notes: Sequence[str] = (),
    ) -> None:
        """Hold ``network`` and the account of how it was chosen."""
        super().__init__()
        self.network = network
        self.layers, self.seconds, self.notes = tuple(layers), dict(seconds), tuple(notes)
        self.eval().requires_grad_(False)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the masked network returns, to rounding."""
        return inner_call(self)(*inputs, **named)

    def save(self, path: str | Path) -> None:
        """Write all of it into one file, for :func:`lossprune.load_deployed`; no pickle, no code.

        A file that is there is replaced as a whole.

        Args:
            path: of the file, such as ``"network.deployed"``.

        Raises:
            PruningError: torch computes all of the network, or an operation in it that files do not
                hold, which is named; or layers were replaced one by one.
            FileNotFoundError: the folder to write into does not exist.
        """
        save_network(self.network, self.layers, self.seconds, self.notes, Path(path))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "network" not in self.__dict__.get("_modules", {}) or name.startswith("__"):
                raise
        return getattr(self.network, name)

    def __setattr__(self, name: str, value: Any) -> None:
        network = self.__dict__.get("_modules", {}).get("network")
        own = name in _OWN or name in vars(self) or hasattr(type(self), name)
        if network is None or own:
            super().__setattr__(name, value)
        elif not isinstance(network, TracedNetwork):
            setattr(network, name, value)  # which its code reads
        elif network.original.has(name):
            refuse_to_set(network.original, name)
        else:
            super().__setattr__(name, value)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load the state of a network that was deployed in the same way.

        Raises:
            PruningError: it is of another, such as the network itself.
        """
        try:
            return super().load_state_dict(state_dict, *args, **options)
        except RuntimeError as error:
            raise PruningError(
                "a deployed network takes the state dict of one that was deployed in the same way: "
                "load other weights into the network itself, and deploy that"
            ) from error

    def train(self, mode: bool = True) -> "Deployed":
        """Stay in evaluation mode: batch norms are part of the weights."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Deployed":
        if sparse_networks(self.network):
            check_conversion(fn)  # before any part is converted
        super()._apply(fn, recurse)
        return self

    def __prepare_scriptable__(self) -> "Deployed":
        """Let sparse parts refuse ``torch.jit.script`` first, and give it what it can compile."""
        for part in sparse_networks(self.network):
            part.__prepare_scriptable__()
        return self

    def extra_repr(self) -> str:
        """Say which layers are computed how."""
        kinds: dict[str, list[str]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, []).append(layer.name)
        told = [f"{kind}: {listed(names, most=4)}" for kind, names in kinds.items()]
        return "; ".join((*told, *self.notes))
