"""Batches as dicts, of any shape by ``forward=``, and cut and joined with all that is in them."""

import re
from collections import UserDict, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

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


class Named(nn.Module):
    """Takes its input by name, and another that it does not need."""

    def __init__(self):
        super().__init__()
        self.net = plain()

    def forward(self, image, scale=None):
        assert scale is None
        return self.net(image)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def images(pool):
    return pool["x"][:, 0], pool["labels"]


UNDERSTOOD = {
    **{
        name: lambda x, y, name=name: {"image": x, name: y}
        for name in ("labels", "label", "targets", "target", "y")
    },
    "strings at the end": lambda x, y: (x, y, ["a.png"] * len(x)),
    "paths in the middle": lambda x, y: [x, [Path("a.png")] * len(x), y, None],
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "arrays in a dict": lambda x, y: {"image": x.numpy(), "y": y.numpy()},
    "arrays backwards": lambda x, y: (x.numpy()[::-1], y.numpy()[::-1]),
    "an array of names": lambda x, y: (x, np.array(["a"] * len(x)), y),
    "int32 classes": lambda x, y: (x, y.int()),
}


@pytest.mark.parametrize("form", UNDERSTOOD)
@pytest.mark.parametrize("named", [False, True])
def test_forms_that_can_mean_one_thing_only(pool, form, named):
    x, y = images(pool)
    model = Named() if named else plain()
    found = lossprune.measure(
        model, [UNDERSTOOD[form](x[:4], y[:4]), UNDERSTOOD[form](x[4:], y[4:])]
    )
    expected = lossprune.measure(model, [(x, y)])
    assert_same(found, expected)


def sentence(model, batch, **settings):
    """What a whole pruning says of a batch, the network left as it was."""
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    training = model.training
    with pytest.raises(PruningError) as raised:
        lossprune.prune(model, "QM", sparsity=0.5, data=batch, **settings)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert model.training == training
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    return str(raised.value).removeprefix("stage 1 of 14: "), raised.value


AMBIGUOUS = {
    "an index": (
        lambda x, y: (x, y, torch.arange(N)),
        "got tuple of 3 with 3 parts that hold numbers: say which are inputs and which targets "
        "with forward=lambda model, batch: (model(batch[0]), batch[1])",
    ),
    "a weight": (lambda x, y: [x, y, torch.rand(N), None], "got list of 4 with 3 parts that hold"),
    "two targets": (
        lambda x, y: {"x": x, "y": y, "target": y},
        "for its targets, got 'target' and 'y' among 'x', 'y', 'target'",
    ),
    "no targets": (lambda x, y: {"x": x, "class": y}, "got none of these among 'x', 'class'"),
    "strings in a dict": (
        lambda x, y: {"x": x, "y": y, "path": ["a"] * N},
        "(11, 4), (11,), str, str, str, str, str, str; anything else needs forward=",
    ),
    "inputs of two tensors": (
        lambda x, y: ([x, x], y),
        "got list: stack examples, or for several inputs give "
        "forward=lambda model, batch: (model(*batch[0]), batch[1])",
    ),
    "a dict of inputs": (lambda x, y: ({"x": x}, y), "got dict: give forward=lambda model, batch"),
    "one example": (
        lambda x, y: (x[0], int(y[0])),
        "a DataLoader makes batches of single examples",
    ),
    "names as targets": (lambda x, y: (x, np.array(["a"] * N)), "of type <U1 is none of numbers"),
    "objects": (lambda x, y: (x, np.array([None] * N)), "of type object is none of numbers"),
}


@pytest.mark.parametrize("form", AMBIGUOUS)
def test_forms_that_could_mean_another_thing_are_told_what_to_write(pool, form):
    make, expected = AMBIGUOUS[form]
    assert expected in sentence(plain(), [make(*images(pool))])[0]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, CLASSES).double()

    def forward(self, x, mask):
        return self.a(x * mask)


UNSUITED = {
    "float64 into float32": (
        lambda x: plain().float(),
        lambda x: x,
        "(4, 4) float64, (4,) int64: RuntimeError: mat1 and mat2 must have the same dtype, but got "
        "Double and Float (the network is of torch.float32: give inputs.to(torch.float32), or ",
    ),
    "float32 into float64": (
        lambda x: plain(),
        lambda x: x.float(),
        "inputs.to(torch.float64), or",
    ),
    "bytes": (
        lambda x: nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), plain().float()),
        lambda x: (x[:, None] * 50).to(torch.uint8),
        "(normalise the inputs as in training, such as inputs.to(torch.float32) / 255)",
    ),
    "whole numbers": (lambda x: plain(), lambda x: x.long(), "inputs.to(torch.float64)"),
    "complex numbers": (lambda x: plain(), lambda x: x + 0j, "inputs.to(torch.float64)"),
    "another width": (
        lambda x: plain(),
        lambda x: x[:, :3],
        "shapes cannot be multiplied (4x3 and 4x5) (called as forward=lambda model, batch: "
        "(model(batch[0]), batch[1]), which says how else)",
    ),
    "two inputs": (lambda x: TwoInputs(), lambda x: x, "missing 1 required positional argument"),
    "an index out of range": (
        lambda x: nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), plain().float()),
        lambda x: torch.full((N, 1), 7),
        "a batch of (4, 1) int64, (4,) int64: IndexError: index out of range in self",
    ),
}


@pytest.mark.parametrize("kind", UNSUITED)
def test_inputs_that_the_network_cannot_take(pool, kind):
    build, make, expected = UNSUITED[kind]
    x, y = images(pool)
    told, error = sentence(build(x), [(make(x), y)])
    assert told.startswith("the network could not be run on a batch of ")
    assert expected in told
    assert isinstance(error.__cause__.__cause__, (RuntimeError, TypeError, IndexError))


def test_names_that_the_network_does_not_know(pool):
    x, y = images(pool)
    told, _ = sentence(plain(), [{"image": x, "index": torch.arange(N), "label": y}])
    assert "image (4, 4) float64, index (4,) int64, labels (4,) int64: TypeError" in told
    assert "called with all but the labels by name" in told


def test_what_a_forward_or_a_loss_raises(pool):
    x, y = images(pool)
    told, _ = sentence(plain(), [(x, y)], forward=lambda model, batch: (model(batch["x"]), batch))
    assert told.startswith(
        "forward could not be run on a batch of (4, 4) float64, (4,) int64: Type"
    )
    with pytest.raises(
        PruningError, match=r"the loss cosine .* \(11, 3\) float64, \(11,\) int64: "
    ):
        lossprune.measure(plain(), [(x, y)], ggn_diagonal=False, loss=cosine)


def cosine(outputs, targets):
    return nn.functional.cosine_similarity(outputs, targets).mean()


def test_outputs_that_are_no_real_numbers(pool):
    told, _ = sentence(plain(), [images(pool)], forward=lambda m, b: (m(b[0]).argmax(1), b[1]))
    assert told == "the network must return real numbers, got torch.int64"


NO_BATCHES = {
    "a data set": (
        lambda x, y: TensorDataset(x, y),  # noqa: PLW0108, as the others
        "data is a TensorDataset, whose items are single examples, where batches are needed: give "
        "torch.utils.data.DataLoader(data, batch_size=100)",
    ),
    "one batch": (
        lambda x, y: (x, y),
        "data is one batch, it seems (tuple of tensors of shape (11, 4) and (11,)), where an "
        "iterable of batches is needed: give [batch], such as data=[(inputs, targets)], or a "
        "DataLoader",
    ),
    "one batch of arrays": (lambda x, y: [x.numpy(), y.numpy()], "data is one batch, it seems"),
    "one dict": (
        lambda x, y: {"image": x, "labels": y},
        "data is one batch, it seems (dict with 'image', 'labels')",
    ),
    "inputs alone": (
        lambda x, y: x,
        "data is a Tensor of shape (11, 4), where batches are needed: give "
        "data=[(inputs, targets)] or a DataLoader",
    ),
    "a path": (lambda x, y: "data/train", "data must be an iterable of batches, got str"),
    "a number": (lambda x, y: 3, "data must be an iterable of batches, got int"),
}


@pytest.mark.parametrize("form", NO_BATCHES)
def test_data_that_is_no_iterable_of_batches(pool, form):
    make, expected = NO_BATCHES[form]
    data = make(*images(pool))
    for call in (
        lambda: lossprune.measure(plain(), data),
        lambda: lossprune.prune(plain(), "QM", sparsity=0.5, data=data),
        lambda: lossprune.prune(plain(), "MP", sparsity=0.5, data=data),
    ):
        with pytest.raises(PruningError, match=f"^{re.escape(expected)}"):
            call()


def test_what_a_forward_takes_may_be_a_list_of_tensors(pool):
    """As of a network that is to give back its inputs."""
    x, _ = images(pool)
    model = nn.Linear(4, 4).double()
    found = lossprune.measure(
        model, [x[:4], x[4:]], loss="mse", forward=lambda model, batch: (model(batch), batch)
    )
    assert_same(found, lossprune.measure(model, [(x, x)], loss="mse"))
