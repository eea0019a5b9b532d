"""Estimates of the GGN diagonal against the exact one."""

import pytest
import torch
from torch import nn

import lossprune

CLASSES = 5


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    with torch.no_grad():
        model[2].weight.mul_(6)  # confident on some examples, not on others
    return model


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(30, 6, dtype=torch.float64, generator=generator)
    return inputs, torch.arange(30) % CLASSES


@pytest.fixture(scope="module")
def exact(model, batch):
    return lossprune.measure(model, [batch])


def test_skipping_nothing_is_exact(model, batch, exact):
    statistics = lossprune.measure(model, [batch], estimator="tolerance:0")
    assert statistics.skipped == pytest.approx(0, abs=1e-12)
    for name, h in exact.ggn_diagonal.items():
        torch.testing.assert_close(statistics.ggn_diagonal[name], h, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("memory", [1, None])
def test_tolerance_bounds_what_is_skipped(model, batch, exact, tolerance, memory):
    statistics = lossprune.measure(
        model, [batch], estimator=f"tolerance:{tolerance}", memory=memory
    )
    assert 0 < statistics.skipped <= tolerance
    assert statistics.loss == pytest.approx(exact.loss, rel=1e-12)
    for name, h in exact.ggn_diagonal.items():
        ours = statistics.ggn_diagonal[name]
        assert (ours <= h * (1 + 1e-9) + 1e-15).all()  # a sum of squares with some left out
        assert (ours >= 0).all()
        torch.testing.assert_close(statistics.gradient[name], exact.gradient[name])
    # Weights on an input of 1 have the diagonal of H itself, so their sum is the trace.
    biased = nn.Sequential(nn.Linear(1, CLASSES, bias=False)).double()
    biased[0].weight.data = model(batch[0])[:1].detach().T
    one = [(torch.ones(1, 1, dtype=torch.float64), torch.tensor([0]))]
    whole = lossprune.measure(biased, one).ggn_diagonal["0.weight"].sum()
    part = lossprune.measure(biased, one, estimator=f"tolerance:{tolerance}")
    assert float(part.ggn_diagonal["0.weight"].sum() / whole) == pytest.approx(1 - part.skipped)


def test_monte_carlo_is_unbiased(model, batch, exact):
    """The mean of 400 draws lies within 5 standard errors; a biased one would be far off."""
    generator = torch.Generator().manual_seed(2)
    draws = [
        lossprune.measure(
            model, [batch], gradient=False, estimator="monte-carlo:1", generator=generator
        ).ggn_diagonal
        for _ in range(400)
    ]
    for name, h in exact.ggn_diagonal.items():
        values = torch.stack([draw[name] for draw in draws])
        error = values.std(0) / 400**0.5
        assert ((values.mean(0) - h).abs() <= 5 * error + 1e-12).all()
        assert (error <= 0.2 * h.max()).all()


def test_more_labels_vary_less(model, batch):
    def spread(labels):
        generator = torch.Generator().manual_seed(3)
        draws = torch.stack(
            [
                lossprune.measure(
                    model, [batch], estimator=f"monte-carlo:{labels}", generator=generator
                ).ggn_diagonal["0.weight"]
                for _ in range(60)
            ]
        )
        return float(draws.var(0).sum())

    assert spread(16) == pytest.approx(spread(1) / 16, rel=0.4)


def test_monte_carlo_draws_from_the_generator_given(model, batch):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return lossprune.measure(
            model, [batch], estimator="monte-carlo", generator=generator
        ).ggn_diagonal["0.weight"]

    state = torch.get_rng_state()
    assert torch.equal(draw(4), draw(4))
    assert not torch.equal(draw(4), draw(5))
    lossprune.measure(model, [batch], estimator="monte-carlo")
    assert torch.equal(torch.get_rng_state(), state)


def test_empirical_fisher_is_the_mean_squared_gradient(model, batch, by_autograd):
    statistics = lossprune.measure(model, [batch], estimator="empirical-fisher")
    squares = [
        by_autograd(model, batch[0][i : i + 1], batch[1][i : i + 1])[1]["0.weight"] ** 2
        for i in range(30)
    ]
    torch.testing.assert_close(
        statistics.ggn_diagonal["0.weight"], torch.stack(squares).mean(0), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hutchinson", r"estimator 'hutchinson'.*exact.*monte-carlo"),
        ("monte-carlo:0", "'monte-carlo' does not take the value '0'"),
        ("monte-carlo:2.5", r"'monte-carlo' does not take the value '2\.5'"),
        ("monte-carlo:1000000000", "labels must be a whole number from 1 to 10,000, got 1000"),
        ("monte-carlo:" + "9" * 5000, "'monte-carlo' does not take the value '999"),
        ("tolerance:1", "'tolerance' does not take the value '1'"),
        ("tolerance:-0.1", "does not take the value"),
        ("tolerance:nan", "does not take the value"),
        ("tolerance:", "does not take the value ''"),
        ("exact:0", "'exact' does not take the value '0'"),
        ("exact:0.5", r"'exact' does not take the value '0\.5'"),
    ],
)
def test_what_is_not_accepted(model, batch, name, message):
    with pytest.raises(ValueError, match=message):
        lossprune.measure(model, [batch], estimator=name)


def test_tolerance_leaves_out_the_smallest_eigenvalues_and_nothing_else():
    """Against the definition: all eigenvalues of all examples, sorted, cut at the tolerance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    inputs, targets = torch.randn(30, 6).double() * 3, torch.arange(30) % 4
    tolerance = 0.2

    statistics = lossprune.measure(model, [(inputs, targets)], estimator=f"tolerance:{tolerance}")

    p = model(inputs).detach().softmax(1)
    values, vectors = torch.linalg.eigh(p.diag_embed() - p[:, :, None] * p[:, None, :])
    threshold = None
    skipped = 0.0
    for value in sorted(values.clamp(min=0).flatten().tolist()):
        if skipped + value > tolerance * float(values.sum()):
            threshold = value
            break
        skipped += value
    weights = dict(model.named_parameters())
    expected = {name: torch.zeros_like(weights[name]) for name in statistics.ggn_diagonal}
    for n in range(len(inputs)):
        outputs = model(inputs[n : n + 1])[0]
        for k in range(4):
            if values[n, k] < threshold - 1e-12:
                continue
            column = vectors[n, :, k] * values[n, k].sqrt()
            found = torch.autograd.grad(
                outputs @ column, [weights[name] for name in expected], retain_graph=True
            )
            for total, part in zip(expected.values(), found, strict=True):
                total += part.square() / len(inputs)
    assert statistics.skipped == pytest.approx(skipped / float(values.sum()), rel=1e-9)
    assert 0.1 < statistics.skipped <= tolerance
    for name, tensor in expected.items():
        torch.testing.assert_close(statistics.ggn_diagonal[name], tensor, rtol=1e-9, atol=1e-15)
