"""N:M: groups, candidates, counts, and how it goes with stages and scopes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lossprune
from lossprune.pruning import SCOPES, prune_by_stage
from lossprune.pruning.patterns import Pattern, find_pattern


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False),  # 288
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=2),  # 576, four inputs each
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 12),  # 768
        nn.ReLU(),
        nn.Linear(12, 4),  # 48
    ).double()


N = 288 + 576 + 768 + 48  # 1680


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 4, 8, 8, dtype=torch.float64, generator=generator)
    return [(inputs, torch.arange(12) % 4)]


def groups(kept: torch.Tensor, of: int, inputs: int = 1) -> np.ndarray:
    """How many are kept in every group, by plain loops over indices."""
    array = np.moveaxis(kept.numpy(), inputs, 0)
    return np.array(
        [array[start : start + of].sum(0) for start in range(0, len(array), of)]
    ).ravel()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2"])
def test_every_group_keeps_exactly_as_many(pattern):
    keep, of = (int(part) for part in pattern.split(":"))
    result = lossprune.prune(network(), "QM", data=data(), pattern=pattern)
    assert result.mask.removed == N * (of - keep) // of
    for kept in result.mask.values():
        assert (groups(kept, of) == keep).all()


def test_in_every_group_the_smallest_go():
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -4.0, 3.0, 0.2, 5.0, 6.0, -8.0, 7.0]]))
    mask = lossprune.prune(layer, "MP", pattern="2:4").mask
    assert mask["weight"].tolist() == [[False, True, True, False, False, False, True, True]]


def test_convolutions_have_groups_of_input_channels():
    layer = nn.Conv1d(4, 1, 2, bias=False)
    with torch.no_grad():  # channels down, kernel positions across
        layer.weight.copy_(torch.tensor([[[1.0, 9.0], [2.0, 8.0], [3.0, 7.0], [4.0, 6.0]]]))
    mask = lossprune.prune(layer, "MP", pattern="2:4").mask
    assert mask["weight"].tolist() == [[[False, True], [False, True], [True, False], [True, False]]]


def test_stages_take_the_smallest_that_may_go():
    """Two of the first group are smallest of all, and the third would be, but for the pattern."""
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0, 6.0]]))
    stages = prune_by_stage(layer, "MP", pattern="2:4", schedule="linear", stages=4)
    seen = [mask["weight"].flatten().int().tolist() for mask, _ in stages]
    assert seen == [
        [0, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
    ]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_exact_counts_nested_stages_and_no_group_below(scope, schedule):
    stages = prune_by_stage(
        network(), "LM", data=data(), stages=6, schedule=schedule, scope=scope, pattern="2:4"
    )
    patterned = N - 48 if scope == "uniform" else N
    before = lossprune.Mask.dense(network())
    for (mask, record), target in zip(stages, lossprune.sparsities(schedule, 0.5, 6), strict=True):
        assert record.removed == mask.removed == round(target * patterned)
        for name, kept in mask.items():
            assert not (kept & ~before[name]).any()
            assert (groups(kept, 4) >= 2).all()
        before = mask
    for name, kept in before.items():
        dense = scope == "uniform" and name == "8.weight"
        assert (groups(kept, 4) == (4 if dense else 2)).all()


@st.composite
def drawn(draw):
    keep = draw(st.integers(1, 4))
    of = draw(st.integers(keep + 1, 6))
    shape = (draw(st.integers(1, 4)), of * draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.randint(0, 4, shape, generator=generator).double()  # many ties
    kept = torch.rand(shape, generator=generator) < draw(st.floats(0, 1))
    inputs = draw(st.sampled_from([0, 1]))
    if inputs == 0:
        saliency, kept = saliency.movedim(0, 1), kept.movedim(0, 1)
    return Pattern(keep, of), saliency, kept, inputs


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(drawn())
def test_candidates_are_the_smallest_kept_of_each_group_but_n(drawn):
    pattern, saliency, kept, inputs = drawn
    candidates = pattern.candidates(saliency, kept, inputs)
    assert candidates.shape == kept.shape
    scores, alive = (np.moveaxis(x.numpy(), inputs, -1) for x in (saliency, kept))
    found = np.moveaxis(candidates.numpy(), inputs, -1)
    for index in np.ndindex(scores.shape[:-1]):
        for start in range(0, scores.shape[-1], pattern.of):
            places = [start + j for j in range(pattern.of) if alive[index][start + j]]
            ranked = sorted(places, key=lambda place: (scores[index][place], place))
            expected = set(ranked[: max(0, len(places) - pattern.keep)])
            group = range(start, start + pattern.of)
            assert {place for place in group if found[index][place]} == expected


def test_inputs_of_transposed_convolutions_come_first():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 3, 2))
    mask = lossprune.prune(model, "MP", parameters="1.weight", pattern="2:4").mask
    assert mask["1.weight"].shape == (8, 3, 2, 2)
    assert (groups(mask["1.weight"], 4, inputs=0) == 2).all()


def test_layers_that_groups_do_not_fit_are_all_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(
        ValueError, match=r"multiple of 4; exclude the others: '0\.weight' \(3\), '3\.weight' \(6\)"
    ):
        lossprune.prune(model, "MP", pattern="2:4")
    mask = lossprune.prune(model, "MP", pattern="2:4", exclude="first and last").mask
    assert list(mask) == ["1.weight"]


@pytest.mark.parametrize("sparsity", [0.4, 0.9, 0, "0.5"])
def test_a_sparsity_that_is_not_the_patterns(sparsity):
    with pytest.raises(ValueError, match=r"that of pattern '2:4', 0\.5, or left out, got"):
        lossprune.prune(network(), "MP", sparsity=sparsity, pattern="2:4")


def test_the_patterns_sparsity_may_be_given_in_any_rounding():
    layer = nn.Linear(9, 100)
    for sparsity in (None, 1 / 3, 1 - 2 / 3):
        assert lossprune.prune(layer, "MP", sparsity=sparsity, pattern="2:3").mask.removed == 300


def test_without_a_pattern_a_sparsity_is_needed():
    for pattern in ("unstructured", None):
        with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\), got None"):
            lossprune.prune(network(), "MP", pattern=pattern)


@pytest.mark.parametrize("pattern", ["4:4", "5:4", "0:4", "2-4", "2:4 ", "", "dense", 24, (2, 4)])
def test_other_patterns(pattern):
    with pytest.raises(ValueError, match=r'"unstructured" or "N:M" with 1 ≤ N < M'):
        find_pattern(pattern)


def test_a_start_with_too_few_kept_in_a_group():
    start = dict(lossprune.Mask.dense(network()))
    start["6.weight"] = start["6.weight"].clone()
    start["6.weight"][0, :3] = False
    with pytest.raises(ValueError, match=r"only 1 weights in a group of '6\.weight', too few"):
        prune_by_stage(network(), "MP", pattern="2:4", start=lossprune.Mask(start))


def test_going_on_gives_the_mask_of_a_pruning_never_stopped():
    arguments = {"data": data(), "stages": 4, "pattern": "2:4", "scope": "layer"}
    whole = [mask for mask, _ in prune_by_stage(network(), "LM", **arguments)]
    rest = prune_by_stage(network(), "LM", **arguments, start=whole[1], completed=2)
    assert [mask for mask, _ in rest] == whole[2:]
