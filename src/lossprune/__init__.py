"""lossprune: prune any PyTorch network by modelling the loss.

>>> import lossprune
>>> lossprune.sparsities("linear", 0.5, 2)
(0.25, 0.5)

The names below are imported on first use, so that ``lossprune --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossprune import data as data
    from lossprune import networks as networks
    from lossprune import pruning as pruning
    from lossprune.channels.compaction import Compaction as Compaction
    from lossprune.channels.compaction import compact as compact
    from lossprune.checkpoints.pruning import PrunedCheckpoint as PrunedCheckpoint
    from lossprune.checkpoints.pruning import prune_checkpoint as prune_checkpoint
    from lossprune.deployment.c_library.writing import write_c as write_c
    from lossprune.deployment.deployed import Deployed as Deployed
    from lossprune.deployment.fastest import deploy as deploy
    from lossprune.deployment.file_size import FileSize as FileSize
    from lossprune.deployment.latency import DeployedTime as DeployedTime
    from lossprune.deployment.latency import latency_scope as latency_scope
    from lossprune.deployment.onnx import export_onnx as export_onnx
    from lossprune.deployment.saved.reading import load_deployed as load_deployed
    from lossprune.deployment.sparse_file import load_sparse as load_sparse
    from lossprune.deployment.sparse_file import save_sparse as save_sparse
    from lossprune.pruning import CRITERIA as CRITERIA
    from lossprune.pruning import Compensation as Compensation
    from lossprune.pruning import CompensationRecord as CompensationRecord
    from lossprune.pruning import Criterion as Criterion
    from lossprune.pruning import Mask as Mask
    from lossprune.pruning import PruningError as PruningError
    from lossprune.pruning import PruningResult as PruningResult
    from lossprune.pruning import Sensitivity as Sensitivity
    from lossprune.pruning import StageRecord as StageRecord
    from lossprune.pruning import Statistics as Statistics
    from lossprune.pruning import measure as measure
    from lossprune.pruning import outlier_scope as outlier_scope
    from lossprune.pruning import prune as prune
    from lossprune.pruning import prune_by_block as prune_by_block
    from lossprune.pruning import prune_by_stage as prune_by_stage
    from lossprune.pruning import recalibrate as recalibrate
    from lossprune.pruning import sensitivity as sensitivity
    from lossprune.pruning import sparsities as sparsities
    from lossprune.training.convolution.model import SparseModel as SparseModel
    from lossprune.training.convolution.model import sparse as sparse

__version__: str

_NAMES = {
    "channels.compaction": "Compaction compact",
    "checkpoints.pruning": "PrunedCheckpoint prune_checkpoint",
    "deployment.c_library.writing": "write_c",
    "deployment.deployed": "Deployed",
    "deployment.fastest": "deploy",
    "deployment.onnx": "export_onnx",
    "deployment.saved.reading": "load_deployed",
    "deployment.file_size": "FileSize",
    "deployment.latency": "DeployedTime latency_scope",
    "deployment.sparse_file": "load_sparse save_sparse",
    "pruning": "CRITERIA Compensation CompensationRecord Criterion Mask PruningError "
    "PruningResult Sensitivity StageRecord Statistics measure outlier_scope prune prune_by_block "
    "prune_by_stage recalibrate sensitivity sparsities",
    "training.convolution.model": "SparseModel sparse",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
_ROOMS = ("data", "networks", "pruning")

__all__ = list(_HOMES) + list(_ROOMS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _ROOMS:
        return import_module(f"lossprune.{name}")
    if name in _HOMES:
        return getattr(import_module(f"lossprune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lossprune' has no attribute {name!r}")


def _version() -> str:
    """Return the version that is installed; of a tree that only lies on the path none is known."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lossprune")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
