"""Sums of squared per-example weight gradients: what the GGN diagonal is made of.

With the patches x[n, g, i, p] that a layer saw and the gradients y[k, n, g, o, p] at its output,
example n's weight gradient for column k is Σ_p y[k,n,g,o,p] x[n,g,i,p], and

    h[g, o, i] = Σ_n Σ_k (Σ_p y[k,n,g,o,p] x[n,g,i,p])².
"""

import torch
from torch import Tensor


def sum_of_squares(patches: Tensor, gradients: Tensor) -> Tensor:
    """Return h[g, o, i] of patches (n, g, i, p) and gradients (k, n, g, o, p)."""
    if patches.shape[-1] == 1:
        squares = gradients.square().sum(0).squeeze(-1)
        return torch.einsum("ngo,ngi->goi", squares, patches.squeeze(-1).square())
    total = patches.new_zeros(patches.shape[1], gradients.shape[3], patches.shape[2])
    for column in gradients:
        total += torch.einsum("ngop,ngip->ngoi", column, patches).square().sum(0)
    return total
