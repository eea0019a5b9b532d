"""How sparse each layer became, read from a run's mask."""

from pathlib import Path

from lossprune.experiment.folder import MASK
from lossprune.pruning import Mask, PruningError
from lossprune.torch_state import using_threads


def layer_sparsity(folder: Path) -> dict[str, float] | None:
    """Return the fraction removed of each prunable parameter, in order; None without a mask.

    A damaged mask counts as none: the record alone carries the results.
    """
    with using_threads(1):  # thousands of small sums, for which others would only be waited for
        try:
            mask = Mask.load(folder / MASK)
        except (OSError, PruningError):
            return None
        return {name: 1 - float(kept.float().mean()) for name, kept in mask.items() if kept.numel()}
