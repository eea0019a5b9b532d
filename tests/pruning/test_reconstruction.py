"""SparseGPT against Optimal Brain Surgeon, row by row, with an inverse for each column."""

import pytest
import torch

from lossprune.pruning import PruningError
from lossprune.pruning.patterns import Pattern
from lossprune.pruning.reconstruction import reconstruct

ROWS, INPUTS, POSITIONS = 6, 20, 50


def problem(seed=0, inputs=INPUTS):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, inputs, dtype=torch.float64, generator=generator)
    mix = torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    x = mix @ torch.randn(inputs, POSITIONS, dtype=torch.float64, generator=generator)
    return weight, x


def surgeon(weight, x, choose, block, damping=0.01):
    """Column by column, the inverse of what remains made anew; ``choose`` decides for a block."""
    h = x @ x.T
    h = h + damping * h.diagonal().mean() * torch.eye(len(h)).double()
    left, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for q in range(len(h)):
        if q % block == 0:
            stop = min(q + block, len(h))
            scores = torch.stack(
                [left[:, j] ** 2 / torch.linalg.inv(h[j:, j:])[0, 0] for j in range(q, stop)], 1
            )
            kept[:, q:stop] = ~choose(scores, q)
        inverse = torch.linalg.inv(h[q:, q:])
        for row in range(len(weight)):
            if not kept[row, q]:
                left[row, q:] -= left[row, q] / inverse[0, 0] * inverse[0]
                left[row, q] = 0.0
    return left, kept


def smallest(scores, count):
    marked = torch.zeros(scores.numel(), dtype=torch.bool)
    marked[scores.flatten().argsort()[:count]] = True
    return marked.view_as(scores)


@pytest.mark.parametrize("block", [1, 7, 20, 128])
@pytest.mark.parametrize("count", [1, 60, 71])
def test_a_share_of_each_block_goes_and_the_rest_makes_up_for_it(block, count):
    weight, x = problem()

    def choose(scores, start):
        stop = start + scores.shape[1]
        return smallest(scores, round(count * stop / INPUTS) - round(count * start / INPUTS))

    expected, kept = surgeon(weight, x, choose, block)
    moved, mask = reconstruct(weight, x @ x.T, count=count, block=block)
    assert torch.equal(mask, kept)
    assert int((~mask).sum()) == int((moved == 0).sum()) == count
    torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("block", [4, 10, 128])
def test_n_of_m(block):
    weight, x = problem()

    def choose(scores, start):
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argsort(1)[:, :2], True)

    expected, kept = surgeon(weight, x, choose, 4)
    moved, mask = reconstruct(weight, x @ x.T, pattern=Pattern(2, 4), block=block)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-10)


def test_a_mask_that_is_given_is_kept_to():
    weight, x = problem()
    kept = weight.abs() > 0.6
    expected, _ = surgeon(weight, x, lambda scores, start: ~kept[:, start : start + 1], 1)
    moved, mask = reconstruct(weight, x @ x.T, kept=kept)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_outputs_change_less_than_by_masks_alone(seed, share):
    weight, x = problem(seed)
    count = round(share * weight.numel())

    def error(moved):
        return float(((weight - moved) @ x).norm())

    norms = x.norm(dim=1)
    magnitude = weight * ~smallest(weight.abs(), count)
    each = (weight.abs() * norms).argsort(1)[:, : count // ROWS]
    wanda = weight.scatter(1, each, 0.0)
    moved, _ = reconstruct(weight, x @ x.T, count=count)
    same, _ = reconstruct(weight, x @ x.T, kept=wanda != 0)
    assert error(moved) < min(error(magnitude), error(wanda))
    assert error(same) < error(wanda)


def test_weights_of_inputs_that_are_always_zero_go_first():
    weight, x = problem()
    x[[3, 11]] = 0.0
    moved, mask = reconstruct(weight, x @ x.T, count=2 * ROWS, block=128)
    assert not mask[:, [3, 11]].any()
    assert torch.equal(moved[:, 4], weight[:, 4])  # nothing that matters has gone


def test_moments_without_an_inverse_are_told():
    weight, x = problem()
    with pytest.raises(PruningError, match="no inverse: there are too few examples"):
        reconstruct(weight, x[:, :1] @ x[:, :1].T, count=5, damping=0.0)
