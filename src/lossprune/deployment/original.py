"""What a deployed network has of the network that it was made of: plain attributes, methods.

``torch.compile`` hands every attribute on to the network that it compiled, so that a method such as
``generate`` runs that one, uncompiled and unnoticed; ``DataParallel`` has none of them.  Here a
method of the network's class runs on a stand-in: of the class, with the attributes that are neither
layers nor tensors, and with the deployed network as its ``forward``.  What it may not have, as a
layer, which the deployed network has no more, and what would have no effect, as setting an
attribute that the kernels do not read, is one sentence.
"""

import pickle
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_OF_ANY = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Original:
    """The class of a network and what it knew, for the time when it is no more.

    Attributes:
        kind: its class; None where that is not to be found.
        module: where the class is, and
        name: what it is called there.
        attributes: those that hold no layers and no tensors.
        gone: the names of the others.
    """

    kind: type[nn.Module] | None
    module: str
    name: str
    attributes: Mapping[str, Any]
    gone: frozenset[str]

    @classmethod
    def of(cls, network: nn.Module) -> "Original":
        """Return what is to be known of ``network``; no tensor of it is kept.

        >>> known = Original.of(nn.Conv2d(3, 8, 5))
        >>> known.attributes["kernel_size"], sorted(known.gone)
        ((5, 5), ['bias', 'weight'])
        """
        own = {name: value for name, value in vars(network).items() if name not in _OF_ANY}
        plain = {name: value for name, value in own.items() if _is_plain(value)}
        parts = (network._modules, network._parameters, network._buffers)
        gone = {name for part in parts for name in part} | (own.keys() - plain.keys())
        kind = type(network)
        return cls(kind, kind.__module__, kind.__qualname__, plain, frozenset(gone))

    def has(self, name: str) -> bool:
        """Whether the network had an attribute of this name."""
        return name in self.attributes or name in self.gone or hasattr(self.kind, name)

    def attribute(self, name: str, deployed: nn.Module) -> Any:
        """Return what the network's attribute is, with ``deployed`` in its place.

        Raises:
            AttributeError: it had none of this name, or the deployed network cannot have it.
        """
        if name in self.attributes:
            return self.attributes[name]
        if self.kind is None or not self.has(name):
            missing = "" if self.kind else f", whose class {self.module}.{self.name} is not found"
            raise AttributeError(f"the deployed {self.short} has no attribute {name!r}{missing}")
        return getattr(self._stand_in(deployed), name)

    @property
    def short(self) -> str:
        """The name of the class alone."""
        return self.name.rpartition(".")[2]

    def refuse(self, name: str) -> NoReturn:
        """Say that the deployed network has no such part."""
        raise AttributeError(
            f"{name!r} of {self.short} is not in the deployed network, which computes all layers "
            "at once: ask the network itself, or lossprune.compact(network, mask).model"
        )

    def _stand_in(self, deployed: nn.Module) -> nn.Module:
        assert self.kind is not None
        kind: Any = type(self.short, (_StandIn, self.kind), {"__module__": self.module})
        made = object.__new__(kind)
        nn.Module.__init__(made)
        vars(made).update(self.attributes)
        vars(made).update(_modules={_DEPLOYED: deployed}, training=False, **{_ORIGINAL: self})
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "Original":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is found where it is, if it is there: the deployed network runs without it.
        attributes = {name: value for name, value in self.attributes.items() if _picklable(value)}
        return _recalled, (self.module, self.name, attributes, self.gone)


_DEPLOYED, _ORIGINAL = "_deployed_network", "_original_network"


class _StandIn(nn.Module):
    """Comes before a network's class: its methods run, and call the deployed network."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        deployed = self._modules[_DEPLOYED]
        assert deployed is not None
        return deployed(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        original: Original = vars(self)[_ORIGINAL]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if original.has(name):
                original.refuse(name)
            raise AttributeError(f"{original.short!r} object has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_to_set(vars(self)[_ORIGINAL], name)


def refuse_to_set(original: Original, name: str) -> NoReturn:
    """Say that a deployed network stays as it is."""
    raise AttributeError(
        f"{name!r} of a deployed {original.short} cannot be set, as what it computes would stay "
        "the same: set it on the network itself, and deploy that"
    )


def _recalled(module: str, name: str, attributes: Mapping[str, Any], gone: frozenset[str]) -> Any:
    try:
        kind = pkgutil.resolve_name(f"{module}:{name}")
    except (ImportError, AttributeError, ValueError):
        kind = None
    return Original(kind, module, name, attributes, gone)


def _is_plain(value: Any) -> bool:
    return not any(
        isinstance(leaf, Tensor | nn.Module)
        or isinstance(getattr(leaf, "__self__", None), nn.Module)
        for leaf in tree_leaves(value)
    )


def _picklable(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # whatever the attribute's own code raises
        return False
    return True
