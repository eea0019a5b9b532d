"""A second loss behind the interface, and the factor of the Hessian of the first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lossprune
from lossprune.pruning import LOSSES, PruningError


class SquaredError:
    """ℓ(z, t) = Σ_c w_c (z_c − t_c)², with a Hessian of full rank."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights

    def check(self, outputs, targets):
        if outputs.shape != targets.shape:
            raise PruningError(f"{tuple(outputs.shape)} against {tuple(targets.shape)}")

    def value(self, outputs, targets):
        return (self.weights * (outputs - targets) ** 2).sum(1)

    def gradient(self, outputs, targets):
        return 2 * self.weights * (outputs - targets)

    def hessian_factor(self, outputs):
        factor = (2 * self.weights).sqrt().diag()
        return factor[:, None, :].expand(-1, len(outputs), -1)


def test_another_loss(agrees):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs, targets = torch.randn(7, 4).double(), torch.randn(7, 3).double()
    weights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)

    statistics = lossprune.measure(model, [(inputs, targets)], loss=SquaredError(weights))

    agrees(
        statistics, model, inputs, targets, loss=lambda z, t: (weights * (z - t) ** 2).sum()
    )  # fmt: skip


def test_prunes_by_another_loss():
    """Least squares on one-hot inputs: each weight is alone responsible for its own error."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    batch = (torch.eye(3), torch.tensor([[1.0], [0.5], [2.9]]))

    result = lossprune.prune(
        model, "QM", sparsity=1 / 3, data=[batch], stages=1, loss=SquaredError(torch.ones(1))
    )

    # Losses of removing each, by hand: 1² − 0², 0.5² − 1.5², 2.9² − 0.1²; the middle one gains,
    # and |ΔL| is the saliency: 1, 2, 8.4, over 3 examples.
    assert result.mask["weight"].tolist() == [[False, True, True]]
    assert result.stages[0].predicted_change == pytest.approx(1 / 3, rel=1e-6)
    assert result.stages[0].realised_change == pytest.approx(1 / 3, rel=1e-6)


def test_errors_of_another_loss_reach_the_user():
    with pytest.raises(PruningError, match=r"\(2, 3\) against \(2, 1\)|\(2, 1\) against"):
        lossprune.measure(
            nn.Linear(4, 3),
            [(torch.zeros(2, 4), torch.zeros(2, 1))],
            loss=SquaredError(torch.ones(3)),
        )


def test_unknown_loss():
    with pytest.raises(ValueError, match=r"'hinge'.*cross_entropy"):
        lossprune.measure(
            nn.Linear(1, 2), [(torch.zeros(1, 1), torch.zeros(1).long())], loss="hinge"
        )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    logits=st.lists(st.lists(st.floats(-800, 800), min_size=3, max_size=3), min_size=1, max_size=4)
)
def test_factor_of_the_hessian_of_cross_entropy(logits):
    z = torch.tensor(logits, dtype=torch.float64)
    factor = LOSSES["cross_entropy"].hessian_factor(z)
    p = z.softmax(1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert factor.isfinite().all()
    torch.testing.assert_close(
        torch.einsum("knc,knd->ncd", factor, factor), expected, rtol=1e-9, atol=1e-15
    )


def test_value_and_gradient_of_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    t = torch.tensor([0, 1, 2, 3, 4, 0])
    loss = LOSSES["cross_entropy"]
    (expected,) = torch.autograd.grad((z.logsumexp(1) - z.gather(1, t[:, None])[:, 0]).sum(), z)
    torch.testing.assert_close(loss.gradient(z.detach(), t), expected, rtol=1e-12, atol=1e-15)
    assert loss.value(torch.zeros(1, 4), torch.tensor([2])).item() == pytest.approx(1.3862943611)
