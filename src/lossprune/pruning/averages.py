"""Statistics averaged over stages, as one stage's examples alone say little of a single weight.

With g_i what stage i measures and the share β that is kept of what was known before,

    ḡ_i = (g_i + β w_{i−1} ḡ_{i−1}) / w_i,    w_i = 1 + β w_{i−1},    w_0 = 0,

and the same of the diagonal h.  Stages are close to each other where there are many of them, so
what the average is late by is little beside the noise it takes away.  The bias correction w is that
of Kingma & Ba, "Adam: A method for stochastic optimization", 2015.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lossprune.pruning.curvature.statistics import Statistics

_WEIGHT = "weight"
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
    >>> averages.with_(one) is averages.with_(one)
    False
    """

    def __init__(self, share: float, earlier: Mapping[str, Tensor] | None = None) -> None:
        self._share = share
        self._tensors = dict(earlier or {})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is known, by name: ``gradient.NAME``, ``ggn_diagonal.NAME``, ``weight``."""
        return dict(self._tensors)

    @torch.no_grad()
    def with_(self, statistics: Statistics) -> Statistics:
        """Take what a stage measured, and return it with the averages in the place of its own."""
        if not self._share:
            return statistics
        before = self._tensors.pop(_WEIGHT, torch.zeros((), dtype=torch.float64))
        kept = self._share * float(before)
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        for kind in _KINDS:
            for name, value in getattr(statistics, kind).items():
                known = self._tensors.get(f"{kind}.{name}")
                if known is not None:
                    value = (value + kept * known.to(value.device)) / (1 + kept)
                found[kind][name] = self._tensors[f"{kind}.{name}"] = value
        self._tensors[_WEIGHT] = torch.tensor(1 + kept, dtype=torch.float64)
        return replace(statistics, **found)
