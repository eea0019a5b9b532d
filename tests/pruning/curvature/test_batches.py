"""Batches as dicts, of any shape by ``forward=``, and cut and joined with all that is in them."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lossprune
from lossprune.pruning import PruningError

N, CLASSES = 11, 3


class Masked(nn.Module):
    """As Hugging Face's: keyword arguments, a mask of what is padding, logits in an object."""

    def __init__(self, wrap=None):
        super().__init__()
        self.a = nn.Linear(4, 5)
        self.b = nn.Linear(5, CLASSES)
        self.wrap = wrap

    def forward(self, x, attention_mask, flag=True, labels=None):
        assert labels is None
        assert flag
        h = (torch.tanh(self.a(x)) * attention_mask[..., None]).sum(1)
        logits = self.b(h / attention_mask.sum(1, keepdim=True))
        return logits if self.wrap is None else self.wrap(logits)


Output = namedtuple("Output", ["loss", "logits"])


@dataclass
class Record:
    x: torch.Tensor
    attention_mask: torch.Tensor
    y: torch.Tensor


@pytest.fixture(scope="module")
def pool():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, 4, dtype=torch.float64, generator=generator)
    mask = (torch.arange(6) <= torch.arange(N)[:, None] % 6).double()
    return {"x": x, "attention_mask": mask, "labels": torch.arange(N) % CLASSES}


def network(wrap=None):
    torch.manual_seed(0)
    return Masked(wrap).double()


def cut(pool, *sizes):
    batches, start = [], 0
    for size in sizes:
        batches.append({key: value[start : start + size] for key, value in pool.items()})
        start += size
    return batches


def assert_same(ours, theirs):
    assert ours.examples == theirs.examples
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)
    for a, b in ((ours.gradient, theirs.gradient), (ours.ggn_diagonal, theirs.ggn_diagonal)):
        for name, tensor in b.items():
            torch.testing.assert_close(a[name], tensor, rtol=1e-10, atol=1e-14)


def matches_oracle(statistics, pool, matches, count):
    examples = [
        ((pool["x"][n : n + 1], pool["attention_mask"][n : n + 1]), {}, pool["labels"][n])
        for n in range(count)
    ]
    matches(statistics, network(), examples, nn.functional.cross_entropy, count)


@pytest.mark.parametrize(
    "wrap",
    [None, lambda z: {"logits": z}, lambda z: Output(None, z)],
    ids=["a tensor", "a dict", "an object"],
)
@pytest.mark.parametrize("sizes", [(11,), (1, 4, 6), (3, 0, 8)])
@pytest.mark.parametrize("memory", [1, None])
def test_dicts_are_cut_and_joined_whole(pool, wrap, sizes, memory, matches):
    statistics = lossprune.measure(network(wrap), cut(pool, *sizes), 9, memory=memory)
    assert statistics.examples == 9
    matches_oracle(statistics, pool, matches, 9)


def test_a_mapping_that_is_no_dict_and_flags_beside_tensors(pool):
    expected = lossprune.measure(network(), cut(pool, 11))
    given = [UserDict(batch, flag=True) for batch in cut(pool, 6, 5)]
    assert_same(lossprune.measure(network(), given), expected)


FORMS = {
    "triples": (
        lambda b: (b["x"], b["attention_mask"], b["labels"]),
        lambda model, b: (model(b[0], b[1]), b[2]),
    ),
    "nested": (
        lambda b: {"in": [b["x"], {"mask": b["attention_mask"]}], "out": (b["labels"], None)},
        lambda model, b: (model(b["in"][0], b["in"][1]["mask"]), b["out"][0]),
    ),
    "an object": (
        lambda b: Record(b["x"], b["attention_mask"], b["labels"]),
        lambda model, b: (model(b.x, b.attention_mask), b.y),
    ),
    "a list of strings beside": (
        lambda b: {**b, "text": ["a"] * len(b["x"])},
        lambda model, b: (model(b["x"], b["attention_mask"]), b["labels"]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("estimator", ["exact", "empirical-fisher"])
def test_any_form_with_forward(pool, form, estimator):
    make, forward = FORMS[form]
    expected = lossprune.measure(network(), cut(pool, 11), estimator=estimator)
    batches = [make(batch) for batch in cut(pool, 2, 5, 4)]
    found = lossprune.measure(network(), batches, forward=forward, estimator=estimator)
    assert_same(found, expected)


@pytest.mark.parametrize("form", ["triples", "nested"])
def test_pruning_cuts_what_forward_understands(pool, form):
    make, forward = FORMS[form]
    batches = [make(batch) for batch in cut(pool, 2, 5, 4)]
    settings = {"sparsity": 0.5, "examples": 9, "stages": 2}
    result = lossprune.prune(network(), "QM", data=batches, forward=forward, **settings)
    expected = lossprune.prune(network(), "QM", data=cut(pool, 9), **settings)
    assert result.mask == expected.mask
    for ours, theirs in zip(result.stages, expected.stages, strict=True):
        assert ours.loss_after == pytest.approx(theirs.loss_after, rel=1e-12)


def test_what_cannot_be_cut_is_not_counted(pool):
    make, forward = FORMS["an object"]
    batches = [make(batch) for batch in cut(pool, 6, 5)]
    with pytest.raises(PruningError, match=r"examples=7 cannot be counted.*Record"):
        lossprune.measure(network(), batches, 7, forward=forward)
    with pytest.raises(PruningError, match="tensors with one entry per example"):
        lossprune.measure(network(), batches, forward=forward, estimator="tolerance")


def test_a_forward_may_draw_its_targets_from_the_inputs(pool):
    """An autoencoder: no targets in the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4)).double()
    x = pool["x"][:, 0]
    found = lossprune.measure(model, [x], forward=lambda m, b: (m(b), b), loss="mse")
    assert_same(found, lossprune.measure(model, [(x, x)], loss="mse"))


@pytest.mark.parametrize(
    ("batch", "forward", "message"),
    [
        ({"x": torch.zeros(2, 3)}, None, "a dict must have 'labels'"),
        ({"x": torch.zeros(2, 3), "labels": torch.zeros(3)}, None, r"\(2, 3\), \(3,\)"),
        ((torch.zeros(2, 3),) * 3, None, "got tuple of 3.*forward="),
        ((torch.zeros(2, 3),) * 3, lambda m, b: m(b[0]), r"pair \(outputs, targets\), got Tensor"),
        (
            (torch.zeros(4, 3), torch.zeros(4).long()),
            lambda m, b: (m(b[0])[:2], b[1][:2]),
            "a row of outputs for each example, got 2 for 4 examples",
        ),
    ],
)
def test_what_does_not_fit(batch, forward, message):
    with pytest.raises(PruningError, match=message):
        lossprune.measure(nn.Linear(3, 2), [batch], forward=forward)


def test_a_first_batch_of_one_example_of_its_own_shape_proves_nothing():
    """Whether later examples interact was not seen, so they go through one at a time."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 4)
            self.b = nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.a(x)).mean(1)
            return self.b(h - h.mean(0))

    torch.manual_seed(0)
    model = Mean().double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    y = torch.arange(5) % 2
    ones = [(x[n : n + 1], y[n : n + 1]) for n in range(5)]
    batches = [(x[:1, :1], y[:1]), (x, y)]
    single = lossprune.measure(model, [batches[0], *[(a[:, :2], b) for a, b in ones]])
    assert_same(lossprune.measure(model, batches), single)
