"""Softmax cross-entropy: of whole examples, and of every position (pixel, token) of an example."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lossprune.pruning.curvature.drawing import drawn_classes
from lossprune.pruning.curvature.forms import (
    check_class_shapes,
    check_classes,
    check_probabilities,
)
from lossprune.pruning.errors import PruningError

# Elements of one example's exact factor beyond which it is no longer formed.
_MOST = 1 << 28


@dataclass(frozen=True)
class CrossEntropy:
    r"""Softmax cross-entropy with class indices, ℓ(z, t) = −log softmax(z)_t, or probabilities.

    With class weights w and label smoothing ε, as torch defines them,

        ℓ(z, t) = −(1 − ε) w_t log p_t − (ε / C) Σ_c w_c log p_c,    p = softmax(z),

    and 0 where t is ``ignore_index``.  An example with several positions (tokens, pixels) has the
    sum over them.  L is Σ ℓ / Σ w_t over everything that is not ignored, to rounding what
    ``torch.nn.functional.cross_entropy`` gives with ``reduction="mean"``: the mean over examples,
    or positions, where there are no weights.

    At a position ∂ℓ/∂z = s p − (1 − ε) w_t e_t − (ε / C) w and ∂²ℓ/∂z² = s (diag(p) − p pᵀ) with
    s = (1 − ε) w_t + (ε / C) Σ_c w_c.  The matrix has rank C − 1, and its Cholesky factor is known
    in closed form: with the tail sums r_k = Σ_{j ≥ k} p_j,

        S_kk = √(p_k r_{k+1} / r_k),    S_jk = −(p_j / r_{k+1}) S_kk  for j > k,    k < C.

    Targets of floating numbers in the outputs' shape are class probabilities y, as torch has them:
    with y′ = (1 − ε) y + ε / C,

        ℓ(z, y) = −Σ_c w_c y′_c log p_c,    ∂ℓ/∂z = s p − w y′,    s = Σ_c w_c y′_c,

    and ∂²ℓ/∂z² = s (diag(p) − p pᵀ).  None is ignored, and each counts 1 whatever its weights, as
    in torch's mean.

    Every entry of S is a product of positive numbers, so unlike √p_k (e_k − p), which has one
    column more, it loses no digits where the network is confident (1 − p_k small).  With T
    positions an example has T (C − 1) columns, each a backward pass: for language models ask for
    ``estimator="monte-carlo"``.

    Attributes:
        weight: w, of the C classes; None: ones.
        label_smoothing: ε in [0, 1).
        ignore_index: a target that counts nothing.
        class_dim: which dimension of the outputs is the classes: 1 as in torch, (n, c, *positions),
            or −1 as language models have it, (n, *positions, c).
        shift: the output at position p predicts the target at p + shift: 1 for a language model
            whose labels are its own input tokens, of which the first is predicted by nothing.

    >>> z = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    >>> s = CrossEntropy().hessian_factor(z)[:, 0]
    >>> p = z.softmax(1)[0]
    >>> s.shape, torch.allclose(s.T @ s, p.diag() - p.outer(p))
    (torch.Size([2, 3]), True)
    """

    weight: Sequence[float] | Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    class_dim: int = 1
    shift: int = 0

    def __post_init__(self) -> None:
        if self.weight is not None:  # numbers, so that losses compare and print
            weight = torch.as_tensor(self.weight, dtype=torch.float64)
            if weight.ndim != 1 or not bool((weight.isfinite() & (weight >= 0)).all()):
                raise ValueError(
                    f"weight must be one finite number of at least 0 per class, got {self.weight!r}"
                )
            object.__setattr__(self, "weight", tuple(weight.tolist()))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be a number in [0, 1), got {self.label_smoothing!r}"
            )
        if self.class_dim not in (1, -1):
            raise ValueError(f"class_dim must be 1 or -1, got {self.class_dim!r}")
        if self.shift not in (0, 1):
            raise ValueError(f"shift must be 0 or 1, got {self.shift!r}")

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise unless targets are whole numbers in [0, c) or ignored, one for each position.

        They may also be class probabilities.
        """
        check_class_shapes(outputs, targets, self.class_dim, self.shift)
        classes = outputs.shape[self.class_dim]
        if self.weight is not None and len(self.weight) != classes:
            raise PruningError(
                f"weight must have one number for each of {classes} classes, got {len(self.weight)}"
            )
        if targets.is_floating_point():
            check_probabilities(targets)
        else:
            check_classes(targets.long(), classes, self.ignore_index)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ℓ of each example, summed over its positions: (n,)."""
        soft = targets.is_floating_point()
        wanted = targets.to(outputs.dtype) if soft else self._aligned(targets)
        logits = outputs
        if self.class_dim == -1:  # each position a row, as torch would copy them otherwise
            logits, wanted = outputs.flatten(0, -2), wanted.flatten(0, -2 if soft else -1)
        values = F.cross_entropy(
            logits,
            wanted,
            weight=self._weights(outputs),
            ignore_index=-100 if soft else self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return values if outputs.ndim == 2 else values.view(len(outputs), -1).sum(1)

    def amount(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return how much each example counts, Σ w_t over what is not ignored: (n,).

        With probabilities, the number of its positions.
        """
        if targets.is_floating_point():
            positions = targets[0].numel() // targets.shape[self.class_dim]
            return outputs.new_full((len(targets),), positions, dtype=torch.float64)
        targets = self._aligned(targets)
        counts = (targets != self.ignore_index).to(torch.float64)
        weights = self._weights(counts)
        if weights is not None:
            counts = counts * weights[self._index(targets)]
        return counts if counts.ndim == 1 else counts.flatten(1).sum(1)

    def positions(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the dimensions of the outputs that are positions."""
        return tuple(range(2, outputs.ndim) if self.class_dim == 1 else range(1, outputs.ndim - 1))

    def rank(self, outputs: Tensor, targets: Tensor) -> int:
        """Return (C − 1) times the positions that are not ignored, of the example with most."""
        counted = (self._aligned(targets) != self.ignore_index).reshape(len(targets), -1).sum(1)
        return int(counted.max()) * (outputs.shape[self.class_dim] - 1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ∂ℓ/∂z: like the outputs."""
        gradient = outputs.softmax(self.class_dim).movedim(self.class_dim, -1)
        if targets.is_floating_point():
            weighted = self._weighted(outputs, targets)
            gradient = gradient * weighted.sum(-1, keepdim=True) - weighted
            return gradient.movedim(-1, self.class_dim)
        targets = self._aligned(targets)
        index = self._index(targets)[..., None]
        scale = self._scale(outputs, targets)
        counted = (targets != self.ignore_index)[..., None].to(gradient.dtype)
        weights = self._weights(outputs)
        if weights is None:
            weights = gradient.new_ones(gradient.shape[-1])
        hit = -(1 - self.label_smoothing) * weights[index] * counted
        if scale is not None:
            gradient *= scale[..., None]
        gradient = gradient.scatter_add_(-1, index, hit)
        if self.label_smoothing:
            gradient -= self.label_smoothing / gradient.shape[-1] * weights * counted
        return gradient.movedim(-1, self.class_dim)

    def hessian_factor(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the Cholesky factor of s (diag(p) − p pᵀ) at every position: (c − 1, *outputs).

        Without targets, of what every position would have with s = 1.
        """
        classes = outputs.shape[self.class_dim]
        size = outputs[0].numel() * classes
        if size > _MOST:
            raise PruningError(
                f"the exact curvature of outputs {tuple(outputs.shape[1:])} needs a factor of "
                f"{size} numbers for an example, more than {_MOST}: give "
                "estimator='monte-carlo'"
            )
        rows = outputs.movedim(self.class_dim, -1)
        factor = _cholesky(rows.reshape(-1, classes))
        factor = factor.view(classes - 1, *rows.shape)
        scale = None if targets is None else self._scale(outputs, self._aligned(targets))
        if scale is not None:
            factor *= scale.sqrt()[..., None]
        return factor.movedim(-1, self.class_dim if self.class_dim == -1 else 2)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """Return s p ∘ (u − pᵀu) at every position, for vectors u like the outputs."""
        p = outputs.double().softmax(self.class_dim)
        u = vectors.double()
        product = p * (u - (p * u).sum(self.class_dim, keepdim=True))
        scale = self._scale(outputs, self._aligned(targets))
        if scale is not None:
            product *= scale.unsqueeze(self.class_dim)
        return product.to(outputs.dtype)

    def draw(
        self, outputs: Tensor, targets: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        """Return √s (p − e_y) for labels y drawn from p, at every position: (n, count, *outputs).

        Mean 0 and covariance ∂²ℓ/∂z², as labels at different positions are drawn independently.
        """
        rows = outputs.movedim(self.class_dim, -1)
        places, classes = rows.shape[:-1], rows.shape[-1]
        # Drawn on the CPU, so that every device gets the same labels.
        uniform = torch.rand(places.numel(), count, dtype=torch.float64, generator=generator)
        p = rows.softmax(-1)
        drawn = drawn_classes(p.reshape(-1, classes), uniform.to(p.device)).view(*places, count)
        scale = self._scale(outputs, self._aligned(targets))
        columns = p[:, None]
        if count > 1:
            columns = columns.repeat_interleave(count, 1)
        for k, y in enumerate(drawn.unbind(-1)):
            column = columns[:, k]
            column.scatter_add_(-1, y[..., None], torch.full_like(column[..., :1], -1.0))
            if scale is not None:
                column *= scale.sqrt()[..., None]
        return columns.movedim(-1, self.class_dim if self.class_dim == -1 else 2)

    def _aligned(self, targets: Tensor) -> Tensor:
        """What the output at each position is to predict: a class, or probabilities."""
        if targets.is_floating_point():
            return targets
        targets = targets.long()  # of uint8, 156 equals −100
        if not self.shift:
            return targets
        ahead = torch.full_like(targets, self.ignore_index)
        ahead[:, :-1] = targets[:, 1:]
        return ahead

    def _index(self, targets: Tensor) -> Tensor:
        """Targets that may be used as indices; class 0 where ignored."""
        return targets.masked_fill(targets == self.ignore_index, 0)

    def _weights(self, like: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        return torch.tensor(self.weight, dtype=like.dtype, device=like.device)

    def _weighted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Class probabilities, smoothed and weighted, w y′: (n, *positions, c)."""
        rows = targets.to(outputs.dtype).movedim(self.class_dim, -1)
        rows = (1 - self.label_smoothing) * rows + self.label_smoothing / rows.shape[-1]
        weights = self._weights(outputs)
        return rows if weights is None else rows * weights

    def _scale(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The factor s of every position, (n, *positions); None where it is 1 everywhere."""
        if targets.is_floating_point():
            return self._weighted(outputs, targets).sum(-1)
        ignored = targets == self.ignore_index
        if self.weight is None:  # (1 − ε) + (ε / C) C
            return (~ignored).to(outputs.dtype) if bool(ignored.any()) else None
        weights = self._weights(outputs)
        assert weights is not None
        scale = (1 - self.label_smoothing) * weights[self._index(targets)]
        scale = scale + self.label_smoothing * weights.mean()
        return scale.masked_fill(ignored, 0.0)


def _cholesky(logits: Tensor) -> Tensor:
    """The Cholesky factor of diag(p) − p pᵀ of logits (n, c): (c − 1, n, c)."""
    p = logits.double().softmax(1)
    tail = p.flip(1).cumsum(1).flip(1)  # r_k
    after = tail[:, 1:]  # r_{k+1}
    # Where a class and all after it have vanished (0 / 0), so has their part of the Hessian.
    diagonal = (p[:, :-1] * (after / tail[:, :-1]).nan_to_num(nan=0.0)).sqrt()
    ratio = (p[:, None, :] / after[:, :, None]).nan_to_num(nan=0.0, posinf=0.0)
    factor = -diagonal[:, :, None] * ratio.triu(1)
    factor.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return factor.transpose(0, 1).to(logits.dtype)
