"""Sums of squared per-example weight gradients: what the GGN diagonal is made of.

With the patches x[n, g, i, p] that a layer saw and the gradients y[n, k, g, o, p] at its output,
example n's weight gradient for column k is Σ_p y[n,k,g,o,p] x[n,g,i,p], and

    h[g, o, i] = Σ_n Σ_k (Σ_p y[n,k,g,o,p] x[n,g,i,p])².

Three ways to compute it, chosen by counted cost:

- one position (linear layers): the squares factor, h = Σ_n (Σ_k y²) x²: one matrix product;
- few positions, *pairs*: with the pairs p ≤ q of positions,
  h = Σ_n Σ_{p≤q} c_pq (Σ_k y_kp y_kq) (x_p x_q),  c_pq = 1 if p = q else 2:
  one matrix product of inner length (examples × P(P+1)/2) in which columns no longer count;
- many positions, *direct*: one product over positions for every example and column, squared and
  summed while it is still in the cache.

docs/curvature.md has their costs and measurements.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Numbers of elements: a product that is squared next should still be in the cache; pairs, which
# are read once by one product, may be longer; on a GPU, calls need enough work.
_CACHED = 3 << 19
_PAIRS = 1 << 22
_BATCHED = 1 << 25
# One more pass over an element costs about as much as this many multiply-adds in a product.
_PASS = 16

Block = Callable[[slice], Tensor]


def add_squares_(total: Tensor, patches: Block, gradients: Block, examples: int) -> None:
    """Add h[g, o, i] of ``examples`` examples to ``total``.

    Args:
        total: (g, o, i), added to in place.
        patches: gives x of a slice of the examples, (n, g, i, p).
        gradients: gives y of a slice of the examples, (n, k, g, o, p).
        examples: how many there are.
    """
    first = gradients(slice(0, 1))
    columns, positions = first.shape[1], first.shape[4]
    if positions == 1:
        everything = slice(0, examples)
        squares = gradients(everything).square().sum(1)[..., 0]
        add_factored_(total, patches(everything)[..., 0], squares)
    elif not prefers_direct(total.shape, columns, positions):
        _add_pairs_(total, patches, gradients, examples, positions)
    elif has_fast_product(first) and total.shape[0] == 1:
        _add_direct_(total, patches, gradients, examples)
    else:
        _add_batched_(total, patches, gradients, examples, columns)


def prefers_direct(shape: Sequence[int], columns: int, positions: int) -> bool:
    """Whether a weight of shape (g, o, i) is cheaper done directly than by pairs of positions.

    Counted for one example: multiply-adds, and passes in their worth.
    """
    groups, outputs, inputs = shape
    direct = columns * math.prod(shape) * (positions + _PASS)
    pairs = positions * (positions + 1) // 2
    forming = groups * (outputs * (columns * positions**2 + _PASS * pairs) + _PASS * inputs * pairs)
    return positions > 1 and direct <= math.prod(shape) * pairs + forming


def _blocks(examples: int, elements: int, most: int) -> Iterator[slice]:
    """Cut the examples into slices of at most ``most`` elements, ``elements`` an example."""
    size = max(1, min(examples, most // max(1, elements)))
    for start in range(0, examples, size):
        yield slice(start, min(start + size, examples))


def add_factored_(total: Tensor, x: Tensor, squares: Tensor) -> None:
    """Add h[g, o, i] = Σ_n squares x² at one position: x (n, g, i), squares Σ_k y² (n, g, o)."""
    x = x.square()
    for group, part in enumerate(total):
        part += product(squares[:, group].T, x[:, group].T)


def _add_pairs_(
    total: Tensor, patches: Block, gradients: Block, examples: int, positions: int
) -> None:
    groups, outputs, inputs = total.shape
    pairs = positions * (positions + 1) // 2
    most = _BATCHED if total.is_cuda else _PAIRS
    for block in _blocks(examples, groups * (outputs + inputs) * pairs, most):
        y, x = gradients(block), patches(block)
        gram = torch.einsum("nkgop,nkgoq->gonpq", y, y)
        y_pairs = _lags(lambda lag, gram=gram: gram.diagonal(lag, 3, 4) * (1 + (lag > 0)), gram)
        x = x.permute(1, 2, 0, 3)  # (g, i, n, p)
        x_pairs = _lags(lambda lag, x=x: x[..., : positions - lag] * x[..., lag:], x)
        for part, y_group, x_group in zip(total, y_pairs, x_pairs, strict=True):
            part += product(y_group.flatten(1), x_group.flatten(1))
    total.clamp_(min=0)  # a sum of squares; rounding may have taken it below


def _lags(pairs_of_lag: Callable[[int], Tensor], like: Tensor) -> Tensor:
    """Lay out all pairs of positions, those of lag 0 first, then lag 1, …: (g, rows, n, pairs)."""
    positions = like.shape[-1]
    pairs = positions * (positions + 1) // 2
    out = like.new_empty(*like.shape[:3], pairs)
    start = 0
    for lag in range(positions):
        width = positions - lag
        out[..., start : start + width] = pairs_of_lag(lag)
        start += width
    return out


def _add_direct_(total: Tensor, patches: Block, gradients: Block, examples: int) -> None:
    """Per example, as many columns or output channels at once as stay in the cache."""
    _, outputs, inputs = total.shape
    flat = total[0]
    rows = max(1, min(outputs, _CACHED // inputs))
    for example in range(examples):
        one = slice(example, example + 1)
        x, y = patches(one)[0, 0], gradients(one)[0, :, 0]  # (i, p), (k, o, p)
        if rows < outputs:
            for column in y:
                for start in range(0, outputs, rows):
                    part = product(column[start : start + rows], x)
                    flat[start : start + rows].addcmul_(part, part)
            continue
        for some in y.split(max(1, _CACHED // (outputs * inputs))):
            part = product(some.flatten(0, 1), x)
            if len(some) == 1:
                flat.addcmul_(part, part)
            else:
                flat += part.view(len(some), outputs, inputs).square_().sum(0)


def _add_batched_(
    total: Tensor, patches: Block, gradients: Block, examples: int, columns: int
) -> None:
    groups, outputs, inputs = total.shape
    most = _BATCHED if total.is_cuda else _CACHED
    for block in _blocks(examples, columns * total.numel(), most):
        y, x = gradients(block).transpose(1, 2).flatten(2, 3), patches(block)
        part = (y @ x.transpose(2, 3)).square_()  # (n, g, k·o, i)
        total += part.view(-1, groups, columns, outputs, inputs).sum((0, 2))


# On the CPU, torch multiplies float32 matrices with MKL, which keeps to 256-bit instructions on
# processors not made by Intel, half their rate or less.  oneDNN, which torch has for convolutions,
# does not; this operator of torch's compiler back end is the way to its plain product.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_fast_product(tensor: Tensor) -> bool:
    """Whether :func:`product` of such tensors goes to oneDNN."""
    return _ONEDNN and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a bᵀ, (m, n), of a (m, k) and b (n, k).

    >>> product(torch.ones(1, 3), torch.arange(6.0).view(2, 3))
    tensor([[ 3., 12.]])
    """
    if has_fast_product(a):
        return torch.ops.mkldnn._linear_pointwise(
            a.contiguous(), b.contiguous(), None, "none", [], ""
        )
    return a @ b.T
