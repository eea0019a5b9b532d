"""Selection against numpy's stable sort of everything joined."""

import time

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lossprune.pruning.smallest import select_smallest


def by_sorting(saliencies, kept, count):
    """The ``count`` smallest kept entries of the concatenation, the earlier of equal ones first."""
    joined = np.concatenate([s.numpy().astype(np.float64).ravel() for s in saliencies.values()])
    alive = np.concatenate([k.numpy().ravel() for k in kept.values()])
    order = np.argsort(joined, kind="stable")
    marked = np.zeros(len(joined), dtype=bool)
    marked[order[alive[order]][:count]] = True
    sizes = [s.numel() for s in saliencies.values()]
    parts = np.split(marked, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(tuple(s.shape))
        for (name, s), part in zip(saliencies.items(), parts, strict=True)
    }


def assert_same(marked, expected):
    assert marked.keys() == expected.keys()
    for name, mark in marked.items():
        assert mark.dtype == torch.bool
        np.testing.assert_array_equal(mark.numpy(), expected[name])


SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=6)
NARROW = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, 1e-45, -1e-45, np.inf, -np.inf, -1.0])


@st.composite
def layers(draw, values):
    """Saliencies of one to four parameters, what is kept of them, and how many to mark."""
    saliencies, kept = {}, {}
    for index in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from([np.float32, np.float32, np.float64]))
        shape = draw(SHAPES)
        elements = values(dtype)
        saliencies[str(index)] = torch.from_numpy(draw(hnp.arrays(dtype, shape, elements=elements)))
        kept[str(index)] = torch.from_numpy(draw(hnp.arrays(np.bool_, shape)))
    available = sum(int(k.sum()) for k in kept.values())
    return saliencies, kept, draw(st.integers(0, available))


def any_float(dtype):
    width = 8 * np.dtype(dtype).itemsize
    return st.floats(allow_nan=False, width=width)


def few_values(dtype):
    return NARROW.map(lambda value: float(dtype(value)))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(layers(any_float))
def test_any_saliencies(drawn):
    assert_same(select_smallest(*drawn), by_sorting(*drawn))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(layers(few_values))
def test_ties_go_by_position(drawn):
    assert_same(select_smallest(*drawn), by_sorting(*drawn))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(layers(few_values), st.data())
def test_nested(drawn, data):
    """Marking more marks the same and others."""
    saliencies, kept, count = drawn
    fewer = select_smallest(saliencies, kept, data.draw(st.integers(0, count)))
    more = select_smallest(saliencies, kept, count)
    for name, mark in fewer.items():
        assert not (mark & ~more[name]).any()


def by_adding_up(saliencies, kept, amount, costs):
    """The smallest kept entries, one after the other, until they cost the amount."""
    everything = sum(int(k.sum()) for k in kept.values())
    spent = [
        sum(costs[name] * int(mark.sum()) for name, mark in by_sorting(saliencies, kept, n).items())
        for n in range(everything + 1)
    ]
    count = next(n for n, cost in enumerate(spent) if cost >= amount)
    return by_sorting(saliencies, kept, count)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(layers(few_values), st.data())
def test_the_fewest_that_cost_the_amount(drawn, data):
    saliencies, kept, _ = drawn
    costs = {name: data.draw(st.integers(0, 9)) for name in saliencies}
    everything = sum(c * int(kept[name].sum()) for name, c in costs.items())
    amount = data.draw(st.integers(0, everything))
    expected = by_adding_up(saliencies, kept, amount, costs)
    marked = select_smallest(saliencies, kept, amount, costs)
    free = [name for name, cost in costs.items() if cost == 0]
    for name in marked.keys() - free:
        np.testing.assert_array_equal(marked[name].numpy(), expected[name])
    for name in free:  # all of a saliency go together where they cost nothing
        assert not (torch.from_numpy(expected[name]) & ~marked[name]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_count_of_one_layer(dtype):
    saliencies = {"a": torch.tensor([2.0, -0.0, 0.0, -3.0, 2.0, torch.inf, 1.0], dtype=dtype)}
    kept = {"a": torch.tensor([True, True, True, True, True, True, False])}
    order = [3, 1, 2, 0, 4, 5]  # −0 and 0 are equal
    for count in range(7):
        marked = select_smallest(saliencies, kept, count)["a"]
        assert sorted(marked.nonzero().flatten().tolist()) == sorted(order[:count])


def test_nothing_and_everything():
    saliencies = {"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.ones(1)}
    kept = {name: torch.ones_like(s, dtype=torch.bool) for name, s in saliencies.items()}
    kept["a"][0, 0] = False
    assert not any(mark.any() for mark in select_smallest(saliencies, kept, 0).values())
    everything = select_smallest(saliencies, kept, 6)
    for name, mark in everything.items():
        assert torch.equal(mark, kept[name])


@pytest.mark.parametrize("count", [-1, 4])
def test_amount_out_of_range(count):
    saliencies = {"a": torch.ones(4)}
    kept = {"a": torch.tensor([True, True, True, False])}
    with pytest.raises(
        ValueError, match=rf"between 0 and the 3 that the kept weights cost, got {count}"
    ):
        select_smallest(saliencies, kept, count)


def test_half_precision_is_exact():
    values = torch.tensor([3.0, 1.0, 2.0, 1.0])
    for dtype in (torch.float16, torch.bfloat16):
        marked = select_smallest({"a": values.to(dtype)}, {"a": torch.ones(4).bool()}, 2)
        assert marked["a"].tolist() == [False, True, False, True]


@pytest.mark.parametrize("ties", [False, True])
def test_any_memory_layout(ties):
    """Positions are those of the indices, whatever the strides are."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(4, 5, 3, 3, generator=generator)
    if ties:
        dense = dense.round()
    alive = torch.rand(4, 5, 3, 3, generator=generator) < 0.8
    expected = by_sorting({"a": dense}, {"a": alive}, 50)
    last = torch.channels_last
    for saliency in (dense, dense.to(memory_format=last), dense.transpose(0, 1).clone().mT.mT):
        for kept in (alive, alive.to(memory_format=last), alive.flip(0).flip(0)):
            if saliency.shape == kept.shape:
                assert_same(select_smallest({"a": saliency}, {"a": kept}, 50), expected)
    transposed = dense.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not transposed.is_contiguous()
    assert_same(select_smallest({"a": transposed}, {"a": alive}, 50), expected)


def test_saliencies_and_what_is_kept_are_not_changed():
    saliencies = {"a": torch.tensor([3.0, -0.0, 1.0])}
    kept = {"a": torch.tensor([True, True, False])}
    select_smallest(saliencies, kept, 1)
    assert saliencies["a"].tolist() == [3.0, -0.0, 1.0]
    assert torch.signbit(saliencies["a"]).tolist() == [False, True, False]
    assert kept["a"].tolist() == [True, True, False]


def test_deterministic():
    generator = torch.Generator().manual_seed(0)
    saliencies = {str(i): torch.rand(1000, generator=generator).round(decimals=1) for i in range(3)}
    kept = {name: torch.ones(1000, dtype=torch.bool) for name in saliencies}
    first = select_smallest(saliencies, kept, 1234)
    for _ in range(5):
        again = select_smallest(saliencies, kept, 1234)
        assert all(torch.equal(again[name], mark) for name, mark in first.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("magnitude", [0.0, 1.0, 40.0])
def test_large(dtype, magnitude):
    """A million entries, of the same order, of equal value, or over eighty decades."""
    generator = torch.Generator().manual_seed(0)
    exponents = magnitude * torch.randn(1_000_000, generator=generator, dtype=torch.float64)
    values = exponents.clamp(-37, 37).mul(2.302585).exp().to(dtype)
    saliencies = {"a": values[:600_000].view(600, 1000), "b": values[600_000:]}
    kept = {name: torch.rand(s.shape, generator=generator) < 0.7 for name, s in saliencies.items()}
    for count in (1, 350_000, 690_000):
        assert_same(
            select_smallest(saliencies, kept, count), by_sorting(saliencies, kept, count)
        )  # fmt: skip


def test_more_than_one_chunk():
    """17 million entries of one parameter; selection reads 2²⁴ at a time."""
    size = 17_000_000
    values = torch.arange(size, dtype=torch.float32).flip(0).div(7, rounding_mode="floor")
    marked = select_smallest({"a": values}, {"a": torch.ones(size, dtype=torch.bool)}, 100)["a"]
    # The smallest stand at the end, seven of a value, the first of them first: 98 of 14 whole
    # sevens and two of the next.
    assert int(marked.sum()) == 100
    assert marked[-98:].all()
    assert marked[-105:-98].tolist() == [True, True, False, False, False, False, False]


@pytest.mark.slow
def test_ten_million_in_reasonable_time_and_memory():
    """As many weights as PreActResNet18 has, in layers like its widest."""
    generator = torch.Generator().manual_seed(0)
    saliencies = {
        str(i): torch.randn(512, 512, 3, 3, generator=generator).square_() for i in range(4)
    }
    kept = {name: torch.ones_like(s, dtype=torch.bool) for name, s in saliencies.items()}
    total = sum(s.numel() for s in saliencies.values())
    select_smallest({"a": torch.ones(10)}, {"a": torch.ones(10).bool()}, 5)

    process = psutil.Process()
    resident = process.memory_info().rss
    began = time.perf_counter()
    marked = select_smallest(saliencies, kept, round(0.956 * total))
    seconds = time.perf_counter() - began
    grown = process.memory_info().rss - resident

    assert sum(int(mark.sum()) for mark in marked.values()) == round(0.956 * total)
    threshold = max(float(s[marked[name]].max()) for name, s in saliencies.items())
    assert all((s[~marked[name]] >= threshold).all() for name, s in saliencies.items())
    assert seconds < 10
    assert grown < 400 * 2**20
