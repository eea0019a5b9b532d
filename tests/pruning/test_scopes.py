"""How many weights each layer loses: exact, nested, and as the published rules say."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lossprune
from lossprune.pruning import SCOPES, PruningError, Scope, prune_by_stage
from lossprune.pruning.scopes import quotas


@st.composite
def layers(draw):
    """Sizes of layers, their shares, and a rising sequence of counts."""
    n = draw(st.integers(1, 8))
    sizes = {str(i): draw(st.integers(1, 60)) for i in range(n)}
    shares = {name: draw(st.integers(1, 40)) for name in sizes}
    total = sum(sizes.values())
    counts = sorted(draw(st.lists(st.integers(0, total), min_size=1, max_size=12)))
    return sizes, shares, counts


def ideal(sizes, shares, count):
    """n_i − min(n_i, ε a_i) in fractions: layers that would keep more than they have are dense."""
    keep = sum(sizes.values()) - count
    dense: set[str] = set()
    while True:
        rest = {name for name in sizes if name not in dense}
        if not rest:
            return dict.fromkeys(sizes, Fraction(0))
        epsilon = Fraction(
            keep - sum(sizes[name] for name in dense), sum(shares[name] for name in rest)
        )
        full = {name for name in rest if epsilon * shares[name] > sizes[name]}
        if not full:
            return {
                name: Fraction(0) if name in dense else sizes[name] - epsilon * shares[name]
                for name in sizes
            }
        dense |= full


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(layers())
def test_one_stage_is_within_one_of_the_ideal_and_sums_exactly(drawn):
    sizes, shares, counts = drawn
    quota = quotas(sizes, shares, counts[-1])
    assert sum(quota.values()) == counts[-1]
    for name, wanted in ideal(sizes, shares, counts[-1]).items():
        assert 0 <= quota[name] <= sizes[name]
        assert abs(quota[name] - wanted) < 1 + Fraction(1, 10**6)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(layers())
def test_stages_are_nested_and_every_one_sums_exactly(drawn):
    sizes, shares, counts = drawn
    removed = dict.fromkeys(sizes, 0)
    for count in counts:
        quota = quotas(sizes, shares, count, removed=removed)
        assert sum(quota.values()) == count
        for name in sizes:
            assert removed[name] <= quota[name] <= sizes[name]
        removed = quota


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(layers(), st.data())
def test_never_beyond_what_a_layer_may_lose(drawn, data):
    sizes, shares, counts = drawn
    most = {name: data.draw(st.integers(0, size)) for name, size in sizes.items()}
    removed = dict.fromkeys(sizes, 0)
    for count in counts:
        count = min(count, sum(most.values()))
        quota = quotas(sizes, shares, count, removed=removed, most=most)
        assert sum(quota.values()) == count
        assert all(removed[name] <= quota[name] <= most[name] for name in sizes)
        removed = quota


def test_largest_remainders_alone_would_not_be_nested():
    """The Alabama paradox: one more in all would mean one fewer for the smallest."""
    sizes = {"a": 6, "b": 6, "c": 2}
    ten = quotas(sizes, sizes, 10)
    assert ten == {"a": 4, "b": 4, "c": 2}
    assert quotas(sizes, sizes, 11) == {"a": 5, "b": 5, "c": 1}
    assert quotas(sizes, sizes, 11, removed=ten) == {"a": 5, "b": 4, "c": 2}


@pytest.mark.parametrize("count", [-1, 41])
def test_counts_out_of_range(count):
    with pytest.raises(ValueError, match=f"between 0 and 40, got {count}"):
        quotas({"a": 10, "b": 30}, {"a": 1, "b": 1}, count)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False),  # 288
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),  # 64
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 20),  # 640
        nn.ReLU(),
        nn.Linear(20, 4),  # 80
    ).double()


N = 288 + 64 + 640 + 80  # 1072


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 4, 6, 6, dtype=torch.float64, generator=generator)
    return [(inputs, torch.arange(12) % 4)]


def removed(mask) -> list[int]:
    return [layer.removed for layer in mask.layers()]


def test_per_layer_by_hand():
    mask = lossprune.prune(network(), "MP", sparsity=0.75, scope="layer").mask
    assert removed(mask) == [216, 48, 480, 60]
    # round(0.9 · 1072) = 965; 259.25…, 57.61…, 576.12…, 72.01…: one is missing
    mask = lossprune.prune(network(), "MP", sparsity=0.9, scope="layer").mask
    assert removed(mask) == [259, 58, 576, 72]


def test_uniform_by_hand():
    # 536 of the 992 weights of all but the last layer
    mask = lossprune.prune(network(), "MP", sparsity=0.5, scope="uniform").mask
    expected = [288 * 536 / 992, 64 * 536 / 992, 640 * 536 / 992]  # 155.6, 34.6, 345.8
    assert [round(x, 1) for x in expected] == [155.6, 34.6, 345.8]
    assert removed(mask) == [156, 34, 346, 0]


def test_erdos_renyi_by_hand():
    # Shares: (8 + 4)·9, 8 + 8, 20 + 32, 4 + 20: 108, 16, 52, 24, in all 200; kept 107 = 200 ε.
    mask = lossprune.prune(network(), "MP", sparsity=0.9, scope="erdos-renyi").mask
    kept = [108 * 0.535, 16 * 0.535, 52 * 0.535, 24 * 0.535]  # 57.78, 8.56, 27.82, 12.84
    assert [layer.kept for layer in mask.layers()] == [58, 8, 28, 13]
    assert sum(kept) == 107


def test_erdos_renyi_with_kernels_by_hand():
    # Shares: 8 + 4 + 3 + 3, 8 + 8 + 1 + 1, 20 + 32, 4 + 20: 18, 18, 52, 24, in all 112.
    mask = lossprune.prune(network(), "MP", sparsity=0.9, scope="erdos-renyi-kernel").mask
    # ε = 107/112: 17.20, 17.20, 49.68, 22.93
    assert [layer.kept for layer in mask.layers()] == [17, 17, 50, 23]


def test_layers_that_would_be_more_than_dense_are_dense():
    mask = lossprune.prune(network(), "MP", sparsity=0.5, scope="erdos-renyi-kernel").mask
    # ε = 536/112 = 4.8 would keep 86 of 64 and 115 of 80; then (536 − 144)/(18 + 52) = 5.6
    assert [layer.kept for layer in mask.layers()] == [101, 64, 291, 80]
    assert pytest.approx((100.8, 291.2)) == (18 * 5.6, 52 * 5.6)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_exact_counts_and_nested_masks_in_every_stage(scope, schedule):
    stages = list(
        prune_by_stage(
            network(), "LM", sparsity=0.9, data=data(), stages=9, schedule=schedule, scope=scope
        )
    )
    before = lossprune.Mask.dense(network())
    for (mask, record), target in zip(stages, lossprune.sparsities(schedule, 0.9, 9), strict=True):
        assert record.removed == mask.removed == round(target * N)
        assert not any((mask[name] & ~before[name]).any() for name in mask)
        before = mask


@pytest.mark.parametrize(
    "scope", [name for name, scope in SCOPES.items() if scope.share and not scope.by_row]
)
def test_in_each_layer_the_smallest_go(scope):
    model = network()
    mask = lossprune.prune(model, "MP", sparsity=0.7, scope=scope, stages=3).mask
    for name, kept in mask.items():
        size = model.get_parameter(name).detach().abs()
        if not kept.all():
            assert size[~kept].max() <= size[kept].min()


@pytest.mark.parametrize("scope", SCOPES)
def test_going_on_gives_the_mask_of_a_pruning_never_stopped(scope):
    arguments = {"sparsity": 0.9, "data": data(), "stages": 5, "scope": scope}
    whole = [mask for mask, _ in prune_by_stage(network(), "LM", **arguments)]
    rest = prune_by_stage(network(), "LM", **arguments, start=whole[1], completed=2)
    assert [mask for mask, _ in rest] == whole[2:]


def test_uniform_keeps_the_networks_last_layer_whether_or_not_it_is_pruned():
    mask = lossprune.prune(network(), "MP", sparsity=0.5, scope="uniform", exclude="last").mask
    assert removed(mask) == [144, 32, 320]


def test_uniform_cannot_remove_more_than_the_other_layers_have():
    with pytest.raises(PruningError, match=r"keeps '8\.weight' dense .* 992 at most"):
        lossprune.prune(network(), "MP", sparsity=0.95, scope="uniform")
    start = lossprune.prune(network(), "MP", sparsity=0.2, scope="layer").mask
    with pytest.raises(ValueError, match=r"start has weights of '8\.weight' removed"):
        list(prune_by_stage(network(), "MP", sparsity=0.5, scope="uniform", start=start))


def test_a_scope_of_ones_own():
    square = Scope("square root", lambda shape: math.sqrt(math.prod(shape)))
    mask = lossprune.prune(network(), "MP", sparsity=0.9, scope=square).mask
    roots = [math.sqrt(n) for n in (288, 64, 640, 80)]
    for layer, root in zip(mask.layers(), roots, strict=True):
        assert abs(layer.kept - 107 * root / sum(roots)) < 1


def test_unknown_scope():
    with pytest.raises(
        ValueError, match=f"unknown scope 'local'; choose one of: {', '.join(SCOPES)}"
    ):
        lossprune.prune(network(), "MP", sparsity=0.5, scope="local")
