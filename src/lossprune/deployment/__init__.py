"""What a mask is good for: smaller files, smaller networks, faster ones.

The names below are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossprune.deployment.compaction import Compaction as Compaction
    from lossprune.deployment.compaction import compact as compact
    from lossprune.deployment.compaction import count_live as count_live
    from lossprune.deployment.connectivity import Connectivity as Connectivity
    from lossprune.deployment.connectivity import LayerConnectivity as LayerConnectivity
    from lossprune.deployment.costs import multiply_adds as multiply_adds
    from lossprune.deployment.deployed import Deployed as Deployed
    from lossprune.deployment.deployed import LayerChoice as LayerChoice
    from lossprune.deployment.deployed import deploy as deploy

_HOMES = {
    "Compaction": "compaction",
    "Connectivity": "connectivity",
    "Deployed": "deployed",
    "LayerChoice": "deployed",
    "LayerConnectivity": "connectivity",
    "compact": "compaction",
    "count_live": "compaction",
    "deploy": "deployed",
    "multiply_adds": "costs",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lossprune.deployment.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lossprune.deployment' has no attribute {name!r}")
