"""Statistics averaged over stages, as one stage's examples alone say little of a single weight.

With g_i what stage i measures and the share β_i that is kept of what was known before,

    ḡ_i = (g_i + β_i w_{i−1} ḡ_{i−1}) / w_i,    w_i = 1 + β_i w_{i−1},    w_0 = 0,

and the same of the diagonal h.  Stages are close to each other where there are many of them, so
what the average is late by is little beside the noise it takes away.  Where they are not, what was
known is of other weights: a stage that left the share e^(−s) keeps

    β_i = β^max(1, s / s₀),    s₀ = 0.05.

The bias correction w is that of Kingma & Ba, "Adam: A method for stochastic optimization", 2015.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lossprune.pruning.curvature.statistics import Statistics

# s₀: β is the share that is kept over a stride of so much, or less.
STRIDE = 0.05
_WEIGHT, _LEFT = "weight", "left"
_KINDS = ("gradient", "ggn_diagonal")


class Averages:
    """ḡ and h̄ after the stages so far.

    Args:
        share: β in [0, 1); 0: each stage has its own statistics alone.
        earlier: :attr:`tensors` after the last stage, to go on from there.

    >>> from lossprune.pruning import measure
    >>> averages = Averages(0.5)
    >>> model = torch.nn.Linear(2, 2)
    >>> one = measure(model, [(torch.randn(4, 2), torch.arange(4) % 2)])
    >>> averages.with_(one, left=4) is averages.with_(one, left=4)
    False
    """

    def __init__(self, share: float, earlier: Mapping[str, Tensor] | None = None) -> None:
        self._share = share
        self._tensors = dict(earlier or {})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is known: ``gradient.NAME``, ``ggn_diagonal.NAME``, ``weight`` and ``left``."""
        return dict(self._tensors)

    @torch.no_grad()
    def with_(self, statistics: Statistics, left: int) -> Statistics:
        """Take what a stage measured, and return it with the averages in the place of its own.

        Args:
            statistics: at the mask that the stage begins with.
            left: how many weights that mask keeps.
        """
        if not self._share:
            return statistics
        kept = 0.0
        if self._tensors:
            stride = math.log(float(self._tensors[_LEFT]) / left)
            kept = self._share ** max(1, stride / STRIDE) * float(self._tensors[_WEIGHT])
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        for kind in _KINDS:
            for name, value in getattr(statistics, kind).items():
                known = self._tensors.get(f"{kind}.{name}")
                if known is not None:
                    value = (value + kept * known.to(value.device)) / (1 + kept)
                found[kind][name] = self._tensors[f"{kind}.{name}"] = value
        for name, value in ((_WEIGHT, 1 + kept), (_LEFT, left)):
            self._tensors[name] = torch.tensor(value, dtype=torch.float64)
        return replace(statistics, **found)
