"""Which examples are read, and that it does not matter how they come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lossprune
from lossprune.pruning import PruningError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(15, 4)
    ).double()  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 2, 5, dtype=torch.float64, generator=generator)
    return inputs, torch.arange(40) % 4


def cut(pool, sizes):
    return list(zip(pool[0].split(sizes), pool[1].split(sizes), strict=True))


def assert_same(a, b, rtol=1e-12):
    assert a.examples == b.examples
    assert a.loss == pytest.approx(b.loss, rel=rtol)
    for ours, theirs in ((a.gradient, b.gradient), (a.ggn_diagonal, b.ggn_diagonal)):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=1e-16)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(sizes=st.lists(st.integers(0, 13), min_size=1, max_size=12), examples=st.integers(1, 20))
def test_exactly_as_many_however_they_are_cut(model, pool, sizes, examples):
    sizes = [*sizes, 40]  # enough, whatever was drawn
    batches, start = [], 0
    for size in sizes:
        batches.append((pool[0][start : start + size], pool[1][start : start + size]))
        start += size

    statistics = lossprune.measure(model, batches, examples)

    first = [(pool[0][:examples], pool[1][:examples])]
    assert_same(statistics, lossprune.measure(model, first))
    assert statistics.examples == examples


def test_single_precision_depends_on_the_cut_only_by_rounding(model, pool):
    model = nn.Sequential(*model).float()
    pool = pool[0].float(), pool[1]
    try:
        whole = lossprune.measure(model, cut(pool, 40))
        ones = lossprune.measure(model, cut(pool, 1))
    finally:
        model.double()
    for name, h in whole.ggn_diagonal.items():
        assert (h - ones.ggn_diagonal[name]).abs().max() <= 1e-6 * h.max()


def test_all_examples_where_no_number_is_given(model, pool):
    assert lossprune.measure(model, cut(pool, 16)).examples == 40


def test_batches_beyond_the_examples_are_not_asked_for(model, pool):
    asked = []

    def batches():
        for index, batch in enumerate(cut(pool, 10)):
            asked.append(index)
            yield batch

    assert lossprune.measure(model, batches(), 20).examples == 20
    assert asked == [0, 1]


def test_fewer_than_asked_for_is_an_error_with_both_numbers(model, pool):
    with pytest.raises(PruningError, match=r"\b41\b.*\b40\b"):
        lossprune.measure(model, cut(pool, 16), 41)
    with pytest.raises(PruningError, match=r"stage 1 of 2.*\b50\b.*\b40\b"):
        lossprune.prune(model, "LM", sparsity=0.5, data=cut(pool, 16), examples=50, stages=2)


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 2, 5), torch.zeros(0).long())]])
def test_no_examples_at_all(model, batches):
    with pytest.raises(PruningError, match="no examples"):
        lossprune.measure(model, batches)


@pytest.mark.parametrize("examples", [0, -3, 2.0, "5", True])
def test_number_of_examples_must_be_a_whole_number_of_at_least_one(model, pool, examples):
    for call in (
        lambda: lossprune.measure(model, cut(pool, 16), examples),
        lambda: lossprune.prune(
            model, "LM", sparsity=0.5, data=cut(pool, 16), examples=examples
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"examples must be .*got " + repr(examples)):
            call()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(4, 2, 5), "pair .*got Tensor"),
        ((torch.zeros(4, 2, 5),), "pair .*got tuple of 1"),
        ({"x": 1, "y": 2}, "pair .*got dict"),
        ((torch.zeros(4, 2, 5), [0, 1, 2, 3]), "targets .*got list"),
        ((torch.zeros(4, 2, 5), torch.tensor(1)), "targets .*one entry per example"),
        ((torch.zeros(4, 2, 5), torch.zeros(3).long()), "4 inputs but 3 targets"),
    ],
)
def test_batches_that_are_not_pairs_of_one_length(model, batch, message):
    with pytest.raises(PruningError, match=message):
        lossprune.measure(model, [batch])


def test_lists_for_pairs_and_narrow_integers_for_classes(model, pool):
    expected = lossprune.measure(model, cut(pool, 40))
    for dtype in (torch.int32, torch.uint8):
        assert_same(lossprune.measure(model, [[pool[0], pool[1].to(dtype)]]), expected)


def test_a_data_loader(model, pool):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pool), batch_size=7)
    assert_same(lossprune.measure(model, loader), lossprune.measure(model, cut(pool, 40)))
