"""Pruning to a share of the multiply-adds, and by saliency per multiply-add."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lossprune
from lossprune.channels.costs import multiply_adds as multiply_adds_of_modules
from lossprune.pruning import SCOPES, PruningError, prune_by_stage

KEPT_BY_LAYER = [name for name, scope in SCOPES.items() if scope.share and not scope.keeps_last]


class Twice(nn.Module):
    """Its first convolution runs at 25 places and at 9, its linear layer on 9 tokens of it."""

    def __init__(self, channels=2):
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.again = nn.Conv2d(channels, 1, 1)
        self.tokens = nn.Linear(channels, 3)
        self.last = nn.Linear(27, 4)
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        x = self.first(x)
        x = self.first(self.again(x)[..., :3, :3])
        return self.last(self.tokens(x.flatten(2).mT).tanh().flatten(1))


# How often each of its weights is used.
PLACES = {
    "first.weight": 34,
    "again.weight": 25,
    "tokens.weight": 9,
    "last.weight": 1,
    "unused.weight": 0,
}


def network(seed=0, **sizes):
    torch.manual_seed(seed)
    return Twice(**sizes).double()


def data(batch=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(12, 1, 5, 5, generator=generator, dtype=torch.float64)
    return list(zip(inputs.split(batch), (torch.arange(12) % 4).split(batch), strict=True))


X = data()[0][0]


def cost(mask):
    return sum(PLACES[name] * int(kept.sum()) for name, kept in mask.items())


def by_sorting(model, share, *, per_cost):
    """Magnitudes (per multiply-add) sorted in float64; the first go until the share is reached."""
    weights = {name: model.get_parameter(name).detach() for name in PLACES}
    prices = np.concatenate([np.full(w.numel(), PLACES[n]) for n, w in weights.items()])
    sizes = np.concatenate([0.5 * w.numpy().ravel() ** 2 for w in weights.values()])
    with np.errstate(divide="ignore"):
        # What costs nothing goes last: 1 / 0 = ∞.
        order = np.argsort(sizes / prices if per_cost else sizes, kind="stable")
    left = prices.sum() - np.concatenate([[0], np.cumsum(prices[order])])
    gone = order[: np.argmax(left <= share * prices.sum() + 1e-9)]
    kept = np.ones(len(prices), dtype=bool)
    kept[gone] = False
    parts = np.split(kept, np.cumsum([w.numel() for w in weights.values()])[:-1])
    return {n: p.reshape(w.shape) for (n, w), p in zip(weights.items(), parts, strict=True)}


SHARES = st.one_of(st.floats(0.15, 1), st.integers(15, 100).map(lambda percent: percent / 100))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10_000), SHARES, st.integers(1, 4), st.booleans())
def test_the_smallest_go_until_the_share_is_reached(seed, share, channels, per_cost):
    model = network(seed, channels=channels)
    scope = "multiply-adds" if per_cost else "global"
    result = lossprune.prune(model, "MP", multiply_adds=share, scope=scope, example=X)
    expected = by_sorting(model, share, per_cost=per_cost)
    for name, kept in result.mask.items():
        np.testing.assert_array_equal(kept.numpy(), expected[name])
    whole = cost(lossprune.Mask.dense(model))
    assert (result.cost.unit, result.cost.dense) == ("multiply-adds", whole)
    assert result.cost.left == cost(result.mask)
    assert share * whole - 34 < result.cost.left <= share * whole + 1e-9


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.15, 0.9),
    st.integers(1, 6),
    st.sampled_from(["exponential", "linear"]),
    st.sampled_from([*KEPT_BY_LAYER, "global", "multiply-adds"]),
)
def test_every_stage_is_exact_and_in_the_one_before(seed, share, stages, schedule, scope):
    model = network(seed)
    before = lossprune.Mask.dense(model)
    whole, last = cost(before), 34 if SCOPES[scope].share is None else sum(PLACES.values())
    steps = lossprune.sparsities(schedule, 1 - share, stages)
    found = prune_by_stage(
        model, "MP", multiply_adds=share, scope=scope, stages=stages, schedule=schedule, example=X
    )
    for (mask, record), gone in zip(found, steps, strict=True):
        assert (1 - gone) * whole - last < cost(mask) <= (1 - gone) * whole + 1e-6
        assert record.cost == pytest.approx(cost(mask) / whole)
        assert not any((mask[name] & ~before[name]).any() for name in mask)
        before = mask


def test_where_all_weights_cost_the_same_it_is_the_global_scope():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5))
    batches = [(torch.randn(8, 5), torch.arange(8) % 5)]
    arguments = {"data": batches, "schedule": [0.25, 0.5, 0.7]}
    plain = lossprune.prune(model, "LM", sparsity=0.7, **arguments)
    for scope in ("global", "multiply-adds"):
        found = lossprune.prune(model, "LM", multiply_adds=0.3, scope=scope, **arguments)
        assert found.mask == plain.mask
    priced = lossprune.prune(model, "LM", sparsity=0.7, scope="multiply-adds", **arguments)
    assert priced.mask == plain.mask


@pytest.mark.parametrize("criterion", ["MP", "QM"])
def test_the_size_of_a_batch_does_not_matter(criterion):
    results = [
        lossprune.prune(network(), criterion, multiply_adds=0.4, data=data(batch), stages=2,
                        scope="multiply-adds", **given)
        for batch, given in [(12, {}), (3, {}), (6, {"example": X}), (6, {"example": X[:1]}),
                             (4, {"example": (X,)}), (1, {"example": {"x": X}})]
    ]  # fmt: skip
    for result in results:
        assert result.cost == results[0].cost
        assert result.mask == results[0].mask


def test_an_amount_of_weights_can_be_ranked_per_multiply_add():
    model = network()
    result = lossprune.prune(model, "MP", sparsity=0.6, scope="multiply-adds", example=X)
    total = sum(model.get_parameter(name).numel() for name in PLACES)
    assert result.mask.removed == round(0.6 * total)
    assert result.cost.left == cost(result.mask)
    assert result.stages[0].cost is None  # as the stages go by weights
    assert result.mask["unused.weight"].all()  # as nothing is saved there
    plain = lossprune.prune(model, "MP", sparsity=0.6)
    assert plain.cost is None
    assert cost(result.mask) < cost(plain.mask)


@pytest.mark.parametrize("scope", ["multiply-adds", "global", *KEPT_BY_LAYER])
def test_going_on_gives_the_masks_of_a_pruning_never_stopped(scope):
    arguments = {"multiply_adds": 0.3, "data": data(), "stages": 5, "scope": scope}
    whole = [mask for mask, _ in prune_by_stage(network(), "LM", **arguments)]
    for completed in range(1, 5):
        rest = prune_by_stage(
            network(), "LM", **arguments, start=whole[completed - 1], completed=completed
        )
        assert [mask for mask, _ in rest] == whole[completed:]


def test_it_goes_on_from_a_mask():
    half = lossprune.prune(network(), "MP", multiply_adds=0.5, example=X)
    further = lossprune.prune(
        network(), "MP", multiply_adds=0.2, example=X, start=half.mask, stages=2
    )
    # κ₀ = 1 − 0.5: so much may be left after one stage of two to 0.2
    most = (half.cost.share * 0.2) ** 0.5
    assert most - 34 / half.cost.dense < further.stages[0].cost <= most
    assert not any((further.mask[name] & ~half.mask[name]).any() for name in half.mask)
    with pytest.raises(ValueError, match=r"start leaves \d+ of \d+ multiply-adds, fewer than the"):
        lossprune.prune(network(), "MP", multiply_adds=0.8, example=X, start=half.mask)


def test_with_stages_and_penalty_found_on_the_way():
    result = lossprune.prune(
        network(), "QM", multiply_adds=0.25, data=data(), stages="auto", reg="auto"
    )
    assert 0.25 - 34 / result.cost.dense < result.cost.share <= 0.25
    shares = [stage.cost for stage in result.stages]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(result.cost.share)
    arguments = {"data": data(), "multiply_adds": 0.25, "stages": "auto"}
    whole = list(prune_by_stage(network(), "QM", **arguments))
    assert len(whole) > 1
    running = prune_by_stage(network(), "QM", **arguments)
    mask, record = next(running)
    rest = prune_by_stage(
        network(), "QM", **arguments, start=mask, completed=1, done=[record],
        averages=running.averages,
    )  # fmt: skip
    assert [mask for mask, _ in rest] == [mask for mask, _ in whole[1:]]


def test_a_budget_ends_before_the_share():
    dense = lossprune.prune(network(), "LM", multiply_adds=0.2, data=data(), stages=3)
    rise = dense.stages[-1].loss_after - dense.stages[0].loss_before
    result = lossprune.prune(
        network(), "LM", multiply_adds=0.2, data=data(), stages=3, max_loss_increase=rise / 2
    )
    assert result.curve[-1].loss > result.curve[0].loss + rise / 2
    assert result.cost.share > 0.2
    assert result.stages[-1].loss_after <= result.stages[0].loss_before + rise / 2


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cells = nn.GRU(8, 3, batch_first=True)
        self.up = nn.ConvTranspose1d(3, 2, 4)
        self.out = nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        x = self.own(x, x, x)[0]
        x = self.other(x, x.flip(1), x.tanh())[0]
        return self.up(self.cells(x)[0].mT).flatten(1) @ self.out


def test_places_of_attention_recurrence_transposed_and_own_products():
    torch.manual_seed(0)
    names = dict(Attending().named_parameters())
    chosen = [name for name, parameter in names.items() if parameter.ndim > 1]
    result = lossprune.prune(
        Attending(), "MP", multiply_adds=1, example=torch.randn(2, 5, 8), parameters=chosen
    )
    # on 5 tokens each, but for the product of 16 numbers
    assert (
        result.cost.dense == 5 * sum(names[name].numel() for name in chosen if name != "out") + 64
    )


def test_it_counts_what_modules_are_counted_to_compute():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 6, (1, 3)),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(2), nn.Linear(4, 5), nn.Flatten(), nn.Linear(30, 3),
    )  # fmt: skip
    x = torch.randn(3, 4, 9, 9)
    before = copy.deepcopy(model.state_dict())
    result = lossprune.prune(model, "MP", multiply_adds=0.5, example=x)
    assert result.cost.dense == multiply_adds_of_modules(model, x[:1])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    left = f"{result.cost.left:,} of 5,970 multiply-adds of the prunable weights are left (49."
    assert left in repr(result)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(5, 4)
        self.two = nn.Bilinear(4, 4, 3)

    def forward(self, x):
        x = F.relu(self.one(x))
        return self.two(x, x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"multiply_adds": 0}, r"multiply_adds must be a share that is left.* \(0, 1\], got 0"),
        ({"multiply_adds": "0.5"}, "multiply_adds must be a share"),
        ({"multiply_adds": 0.5, "sparsity": 0.5}, "and so does sparsity=0.5: leave one"),
        ({"multiply_adds": 0.5, "pattern": "2:4"}, "and so does pattern '2:4': leave one"),
        ({"sparsity": 0.5, "example": X}, "example is what multiply-adds are counted on"),
        ({"multiply_adds": 0.5}, "no data is given whose first batch would do: give example="),
        ({"multiply_adds": 0.5, "data": iter(data())}, "data is an iterator"),
        ({"multiply_adds": 0.5, "example": X[..., :2]}, "could not be run on the example"),
        ({"multiply_adds": 0.01, "example": X}, "fewer than the 34 of one weight of 'first"),
        ({"multiply_adds": 0.05, "example": X, "scope": "layer", "parameters": "unused"},
         "no prunable weight is used"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        lossprune.prune(network(), "MP", **arguments)


def test_weights_in_other_functions_are_refused_by_name():
    x = torch.randn(2, 5)
    words = r"multiply-adds of 'two\.weight' are not known.* exclude=\['two\.weight'\]"
    with pytest.raises(PruningError, match=words):
        lossprune.prune(Odd(), "MP", multiply_adds=0.5, example=x)
    result = lossprune.prune(Odd(), "MP", multiply_adds=0.5, example=x, exclude=["two.weight"])
    assert (result.cost.dense, result.cost.left) == (20, 10)


def test_a_loader_is_left_as_it_was():
    torch.manual_seed(3)
    pairs = list(itertools.chain(*(zip(*batch, strict=True) for batch in data())))
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True)
    model, state = network(), torch.get_rng_state()
    found = [
        lossprune.prune(model, "LM", multiply_adds=0.5, data=loader, stages=2, **given).mask
        for given in ({}, {"example": X})
    ]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), state)
