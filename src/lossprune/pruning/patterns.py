"""Patterns: which weights of a layer may go together.

With N:M, in every group of M weights that are neighbours along a layer's inputs, N are kept in the
end; hardware with sparse tensor cores runs 2:4 faster.  Inputs are dimension 1 of the weight of a
linear layer or convolution (for the latter, groups are of input channels, at each output channel
and kernel position), as in NVIDIA's Automatic Sparsity, and of recurrent layers and attention's
packed projections; they are dimension 0 in transposed convolutions and in the linear layers that
``transformers`` calls ``Conv1D``.  The first of a bilinear layer's two inputs is dimension 1.
Experts' matrices, (experts, outputs, inputs) or (experts, inputs, outputs), are grouped along what
their module says by ``is_transposed``.

Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lossprune.pruning.names import did_you_mean, listed

if TYPE_CHECKING:  # the flags read what is written here, without torch
    from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """N:M: of every ``of`` neighbouring weights, ``keep`` are kept."""

    keep: int
    of: int

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def sparsity(self) -> float:
        """1 − N/M."""
        return 1 - self.keep / self.of

    def check_shapes(
        self, shapes: Mapping[str, tuple[int, ...]], inputs: Mapping[str, int]
    ) -> None:
        """Raise a ``ValueError`` unless groups fit into the inputs of every weight."""
        check_inputs_known(f"pattern {str(self)!r}", shapes, inputs)
        misfits = [
            f"{name!r} ({shape[inputs[name]]})"
            for name, shape in shapes.items()
            if shape[inputs[name]] % self.of
        ]
        if misfits:
            raise ValueError(
                f"pattern {str(self)!r} needs layers whose number of inputs is a multiple of "
                f"{self.of}; exclude the others: {listed(misfits, most=len(misfits))}"
            )

    def candidates(self, saliency: "Tensor", kept: "Tensor", inputs: int) -> "Tensor":
        """Which kept weights may go now, so that N are left in every group: a bool tensor.

        In a group with k kept, those are the k − N of smallest saliency, of equal ones the first.
        """
        groups = self._grouped(kept, inputs)
        scores = self._grouped(saliency, inputs).masked_fill(~groups, math.inf)
        rank = scores.argsort(dim=-1, stable=True).argsort(dim=-1)
        free = groups.sum(-1, keepdim=True) - self.keep
        marked = (groups & (rank < free)).flatten(-2).movedim(-1, inputs)
        return marked.reshape(kept.shape).contiguous()

    def fewest(self, kept: "Tensor", inputs: int) -> int:
        """Return how many weights are kept in the group that keeps fewest."""
        return int(self._grouped(kept, inputs).sum(-1).min())

    def _grouped(self, tensor: "Tensor", inputs: int) -> "Tensor":
        return tensor.movedim(inputs, -1).unflatten(-1, (-1, self.of))


def check_inputs_known(
    what: str, shapes: Mapping[str, tuple[int, ...]], inputs: Mapping[str, int]
) -> None:
    """Raise a ``ValueError`` unless it is known which dimension the inputs of each weight are."""
    unknown = [repr(name) for name in shapes if name not in inputs]
    if unknown:
        raise ValueError(
            f"{what} goes along a layer's inputs, but which dimension these are is not known "
            "(their module has no is_transposed); exclude these experts: "
            f"{listed(unknown, most=len(unknown))}"
        )


def find_pattern(pattern: str | None) -> Pattern | None:
    """Return the pattern written as "N:M"; None for ``"unstructured"`` or None.

    Raises:
        ValueError: anything else, or not 1 ≤ N < M.

    >>> find_pattern("2:4")
    Pattern(keep=2, of=4)
    """
    if pattern is None or pattern == "unstructured":
        return None
    written = re.fullmatch(r"(\d{1,9}):(\d{1,9})", pattern) if isinstance(pattern, str) else None
    if written and 1 <= int(written[1]) < int(written[2]):
        return Pattern(int(written[1]), int(written[2]))
    hint = did_you_mean(pattern, ["unstructured"]) if isinstance(pattern, str) else ""
    raise ValueError(
        'pattern must be "unstructured" or "N:M" with 1 ≤ N < M, such as "2:4", got '
        f"{pattern!r}{hint}"
    )


def final_sparsity(sparsity: float | None, pattern: Pattern | None) -> float:
    """Return the sparsity asked for, or else that of the pattern.

    Raises:
        ValueError: neither says it, or they contradict each other.
    """
    if pattern is None:
        if sparsity is None:
            raise ValueError("sparsity must be a number in [0, 1), got None")
        return sparsity
    if sparsity is None:
        return pattern.sparsity
    if not (isinstance(sparsity, (int, float)) and math.isclose(sparsity, pattern.sparsity)):
        raise ValueError(
            f"sparsity must be that of pattern {str(pattern)!r}, {pattern.sparsity}, or left out, "
            f"got {sparsity!r}"
        )
    return sparsity
