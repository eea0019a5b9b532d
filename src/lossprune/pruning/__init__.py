"""The library: prune any ``torch.nn.Module`` by a model of its loss.

Tensors in, tensors out: no configuration, no printing, no files but a mask's own.  The names below
are imported on first use, so that the tables of criteria and schedules can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossprune.pruning.block_call import prune_by_block as prune_by_block
    from lossprune.pruning.call import prune as prune
    from lossprune.pruning.call import prune_by_stage as prune_by_stage
    from lossprune.pruning.compensation import Compensation as Compensation
    from lossprune.pruning.compensation import CompensationRecord as CompensationRecord
    from lossprune.pruning.costs import Cost as Cost
    from lossprune.pruning.criteria import CRITERIA as CRITERIA
    from lossprune.pruning.criteria import Criterion as Criterion
    from lossprune.pruning.curvature.cross_entropy import CrossEntropy as CrossEntropy
    from lossprune.pruning.curvature.elementwise import BinaryCrossEntropy as BinaryCrossEntropy
    from lossprune.pruning.curvature.elementwise import MeanSquaredError as MeanSquaredError
    from lossprune.pruning.curvature.estimators import ESTIMATORS as ESTIMATORS
    from lossprune.pruning.curvature.estimators import EmpiricalFisher as EmpiricalFisher
    from lossprune.pruning.curvature.estimators import Estimator as Estimator
    from lossprune.pruning.curvature.estimators import Exact as Exact
    from lossprune.pruning.curvature.estimators import MonteCarlo as MonteCarlo
    from lossprune.pruning.curvature.estimators import Tolerance as Tolerance
    from lossprune.pruning.curvature.losses import LOSSES as LOSSES
    from lossprune.pruning.curvature.losses import Loss as Loss
    from lossprune.pruning.curvature.measure import measure as measure
    from lossprune.pruning.curvature.statistics import Statistics as Statistics
    from lossprune.pruning.errors import PruningError as PruningError
    from lossprune.pruning.interoperation import MaskParametrization as MaskParametrization
    from lossprune.pruning.interoperation import read_mask as read_mask
    from lossprune.pruning.interoperation import remove_masks_ as remove_masks_
    from lossprune.pruning.interoperation import write_parametrizations_ as write_parametrizations_
    from lossprune.pruning.interoperation import write_torch_pruning_ as write_torch_pruning_
    from lossprune.pruning.layer_curves import LayerSensitivity as LayerSensitivity
    from lossprune.pruning.layer_curves import Sensitivity as Sensitivity
    from lossprune.pruning.layer_curves import SensitivityPoint as SensitivityPoint
    from lossprune.pruning.layer_scan import sensitivity as sensitivity
    from lossprune.pruning.mask import LayerCounts as LayerCounts
    from lossprune.pruning.mask import Mask as Mask
    from lossprune.pruning.outliers import outlier_scope as outlier_scope
    from lossprune.pruning.pace import Forecast as Forecast
    from lossprune.pruning.pace import LongPruningWarning as LongPruningWarning
    from lossprune.pruning.prunable import prunable_weights as prunable_weights
    from lossprune.pruning.recalibration import recalibrate as recalibrate
    from lossprune.pruning.result import PruningResult as PruningResult
    from lossprune.pruning.schedules import SCHEDULES as SCHEDULES
    from lossprune.pruning.schedules import sparsities as sparsities
    from lossprune.pruning.scopes import SCOPES as SCOPES
    from lossprune.pruning.scopes import Scope as Scope
    from lossprune.pruning.skipped import Skipped as Skipped
    from lossprune.pruning.stages import StageRecord as StageRecord
    from lossprune.pruning.terms import STATISTICS as STATISTICS
    from lossprune.pruning.validation import CurvePoint as CurvePoint

_NAMES = {
    "block_call": "prune_by_block",
    "call": "prune prune_by_stage",
    "compensation": "Compensation CompensationRecord",
    "costs": "Cost",
    "criteria": "CRITERIA Criterion",
    "curvature.cross_entropy": "CrossEntropy",
    "curvature.elementwise": "BinaryCrossEntropy MeanSquaredError",
    "curvature.estimators": "EmpiricalFisher Estimator ESTIMATORS Exact MonteCarlo Tolerance",
    "curvature.losses": "Loss LOSSES",
    "curvature.measure": "measure",
    "curvature.statistics": "Statistics",
    "errors": "PruningError",
    "interoperation": "MaskParametrization read_mask remove_masks_ "
    "write_parametrizations_ write_torch_pruning_",
    "layer_curves": "LayerSensitivity Sensitivity SensitivityPoint",
    "layer_scan": "sensitivity",
    "mask": "LayerCounts Mask",
    "pace": "Forecast LongPruningWarning",
    "outliers": "outlier_scope",
    "prunable": "prunable_weights",
    "recalibration": "recalibrate",
    "result": "PruningResult",
    "schedules": "SCHEDULES sparsities",
    "scopes": "Scope SCOPES",
    "skipped": "Skipped",
    "stages": "StageRecord",
    "terms": "STATISTICS",
    "validation": "CurvePoint",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lossprune.pruning.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lossprune.pruning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
