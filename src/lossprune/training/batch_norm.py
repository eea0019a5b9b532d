"""Batch normalisation over a batch that several processes share.

Index letters: n entry of a channel (example and position) over all processes, c channel.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class SharedBatchNorm(_BatchNorm):
    """Batch norm whose statistics are those of the whole batch, for processes that work on a CPU.

    In training mode, with μ_c and v_c the mean and the (biased) variance over the shares of all
    processes,

        y_nc = γ_c (x_nc − μ_c) / √(v_c + ε) + β_c,

    and the running variance takes the unbiased v_c N / (N − 1): what ``nn.BatchNorm2d`` does in one
    process.  ``nn.SyncBatchNorm`` does the same on GPUs alone.  A share may be empty.  In
    evaluation mode, and under no group, it is ``nn.BatchNorm2d``.

    Raises:
        ValueError: the whole batch has one entry a channel: its variance says nothing.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (torch's name for it)
        if input.ndim < 2:
            raise ValueError(f"batch norm needs inputs (n, channels, …), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalise ``input`` (n, channels, …)."""
        batchwise = self.training or self.running_mean is None
        if not (batchwise and dist.is_initialized()):
            return super().forward(input)
        self._check_input_dim(input)
        mean, variance, count = whole_moments(input.detach())
        if count <= 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{tuple(input.shape)}"
            )
        self._follow(mean, variance * (count / (count - 1)))
        return _Normalise.apply(input, self.weight, self.bias, mean, variance, count, self.eps)

    @torch.no_grad()
    def _follow(self, mean: Tensor, unbiased: Tensor) -> None:
        """Move the running statistics, as ``nn.BatchNorm2d`` does."""
        if not (self.training and self.track_running_stats):
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step = self.momentum
        if step is None:  # the plain average of all batches
            step = 1 / float(self.num_batches_tracked)
        self.running_mean.mul_(1 - step).add_(mean.to(self.running_mean.dtype), alpha=step)
        self.running_var.mul_(1 - step).add_(unbiased.to(self.running_var.dtype), alpha=step)


def share_batch_norm_(network: nn.Module) -> None:
    """Put what works on shared batches in the place of every batch norm of ``network``.

    ``nn.SyncBatchNorm`` where the network is on a GPU, else :class:`SharedBatchNorm`.  Parameters
    and buffers stay the same objects under the same names.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):  # a norm of two names has both in it
            if isinstance(child, _BatchNorm) and not isinstance(
                child, (SharedBatchNorm, nn.SyncBatchNorm)
            ):
                if child not in replaced:
                    replaced[child] = _shared(child)
                setattr(parent, name, replaced[child])


def _shared(norm: _BatchNorm) -> _BatchNorm:
    on_gpu = any(tensor.is_cuda for tensor in (*norm.parameters(), *norm.buffers()))
    if on_gpu:
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    with torch.device("meta"):  # its own tensors are replaced below
        shared = SharedBatchNorm(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
    shared._parameters.update(norm._parameters)
    shared._buffers.update(norm._buffers)
    return shared.train(norm.training)


def whole_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean and biased variance of each channel (float64), and the entries, of all shares.

    Each process computes the moments of its share, they are gathered, and every process merges
    them in the order of the ranks, so that all get the same to the last bit:

        μ = Σ_r n_r μ_r / N,   v = Σ_r n_r (v_r + (μ_r − μ)²) / N.

    No difference of large sums is taken.  Source: Chan, Golub, LeVeque, "Updating formulae and a
    pairwise algorithm for computing sample variances", 1979.
    """
    channels = x.shape[1]
    mine = torch.zeros(2 * channels + 1, dtype=torch.float64)
    entries = x.numel() // channels
    if entries:
        wide = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(wide, _others(x), correction=0)
        mine = torch.cat([mean.double(), variance.double(), torch.tensor([entries]).double()])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    means, variances, counts = torch.stack(every).split([channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, variance, int(total)


def _others(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [0, *range(2, x.ndim)]


class _Normalise(torch.autograd.Function):
    """y = γ (x − μ) / √(v + ε) + β with μ and v depending on the x of all processes.

    Of the gradient g in y every process needs two sums over the whole batch:

        ∂/∂x_nc = γ_c i_c (g_nc − Σ_n g_nc / N − z_nc Σ_n g_nc z_nc / N),   z = (x − μ) i,
        i = 1 / √(v + ε).

    The gradients in γ and β are of this process's share: who trains adds up those of all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: int,
        eps: float,
    ) -> Tensor:
        kind = torch.promote_types(x.dtype, torch.float32)
        scale = (variance + eps).rsqrt().to(kind)
        ctx.save_for_backward(x, weight, mean.to(kind), scale)
        ctx.count = count
        return F.batch_norm(x, mean.to(kind), variance.to(kind), weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, scale = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.ndim - 2)
        normalised = (x - mean.view(shape)) * scale.view(shape)
        wide = gradient.to(normalised.dtype)
        sums = torch.stack([wide.sum(_others(x)), (wide * normalised).sum(_others(x))])
        whole = sums.to(torch.float64, copy=True)  # `sums` stay those of this process
        dist.all_reduce(whole)
        means = (whole / ctx.count).to(wide.dtype)
        inputs = wide - means[0].view(shape) - normalised * means[1].view(shape)
        factor = scale if weight is None else scale * weight
        inputs = (inputs * factor.view(shape)).to(x.dtype)
        in_weight = sums[1] if weight is not None else None
        in_bias = sums[0] if ctx.needs_input_grad[2] else None
        return inputs, in_weight, in_bias, None, None, None, None
