"""Matrix products at the machine's rate."""

import torch
from torch import Tensor

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
