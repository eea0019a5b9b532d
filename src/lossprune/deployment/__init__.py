"""What a mask is good for: smaller files, smaller networks, faster ones.

The names below are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossprune.channels.compaction import Compaction as Compaction
    from lossprune.channels.compaction import compact as compact
    from lossprune.channels.compaction import count_live as count_live
    from lossprune.channels.connectivity import Connectivity as Connectivity
    from lossprune.channels.connectivity import LayerConnectivity as LayerConnectivity
    from lossprune.channels.costs import multiply_adds as multiply_adds
    from lossprune.deployment.deployed import Deployed as Deployed
    from lossprune.deployment.deployed import LayerChoice as LayerChoice
    from lossprune.deployment.fastest import deploy as deploy

_HOMES = {
    "Compaction": "channels.compaction",
    "Connectivity": "channels.connectivity",
    "Deployed": "deployment.deployed",
    "LayerChoice": "deployment.deployed",
    "LayerConnectivity": "channels.connectivity",
    "compact": "channels.compaction",
    "count_live": "channels.compaction",
    "deploy": "deployment.fastest",
    "multiply_adds": "channels.costs",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lossprune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lossprune.deployment' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
