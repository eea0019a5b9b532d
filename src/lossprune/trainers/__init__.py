"""Masks in other people's training loops: callbacks that hold one, or prune on the way.

:mod:`lossprune.trainers.transformers` is for Hugging Face's ``Trainer``,
:mod:`lossprune.trainers.lightning` for Lightning's; each needs that package, and is imported by
its own name alone.  Both take a mask, or a :class:`GradualPruning`.
"""

from lossprune.trainers.gradual import GradualPruning as GradualPruning

__all__ = ["GradualPruning"]
