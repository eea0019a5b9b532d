"""Networks whose code asks what it is called with: the compacted one takes the same branches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossprune
from lossprune import Mask, compact
from lossprune.channels.narrowing import NotNarrowableError, narrow
from lossprune.deployment import count_live

SCALE = torch.tensor(3.0)


class Two(nn.Module):
    """Two layers; the units of the first that a mask cuts off hold constants."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        self.calls, self.last = 0, None
        self.register_buffer("seen", torch.zeros(()))

    def between(self, sigmoid, x):
        """By which way the constants go tells which branch was taken."""
        h = self.a(x)
        return self.b(torch.sigmoid(h) if sigmoid else F.relu(h))


_MISSING = object()


class Default(Two):
    def forward(self, x, scale=None):
        return self.between(scale is None, x)


class Required(Two):
    def forward(self, x, scale):
        return self.between(scale is None, x)


class Keyword(Two):
    def forward(self, x, *, scale=None):
        return self.between(scale is None, x)


class Flag(Two):
    def forward(self, x, scale=False):
        return self.between(not isinstance(scale, torch.Tensor) and not scale, x)


class Sentinel(Two):
    def forward(self, x, scale=_MISSING):
        return self.between(scale is _MISSING, x)


class Rest(Two):
    def forward(self, x, *rest):
        return self.between(not rest, x)


class Named(Two):
    def forward(self, x, **named):
        return self.between(named.get("scale") is None, x)


class Both(Two):
    def forward(self, x, scale=None, shift=None):
        return self.between(not (scale is not None and shift is not None), x)


class Many(Two):
    def forward(self, x, scale=None, b=None, c=None, d=None, e=None):
        return self.between(scale is None, x)


class Type(Two):
    def forward(self, x):
        return self.between(isinstance(self.a(x), torch.Tensor), x)


class ExactType(Two):
    def forward(self, x):
        return self.between(type(x) is torch.Tensor, x)


class IsTensor(Two):
    def forward(self, x):
        return self.between(torch.is_tensor(x), x)


class Has(Two):
    def forward(self, x):
        return self.between(not hasattr(x, "logits"), x)


class Gets(Two):
    def forward(self, x):
        return self.between(getattr(x, "mask", None) is None, x)


class Dtype(Two):
    def forward(self, x):
        return self.between(x.dtype is torch.float64, x)


class Graph(Two):
    def forward(self, x):
        return self.between(x.grad_fn is None, x)


class GradMode(Two):
    def forward(self, x):
        return self.between(torch.is_grad_enabled(), x)


class Inference(Two):
    def forward(self, x):
        return self.between(torch.is_inference_mode_enabled(), x)


class Counts(Two):
    def forward(self, x):
        self.calls += 1
        return self.between(self.calls <= 2, x)


class CountsInABuffer(Two):
    def forward(self, x):
        self.seen += 1
        return self.between(self.seen.item() <= 2, x)


class Remembers(Two):
    def forward(self, x):
        h = torch.sigmoid(self.a(x))
        if self.last is not None:
            h = F.relu(h - 0.5)
        self.last = h
        return self.b(h)


class Swallows(Two):
    def forward(self, x):
        try:
            known = bool((x == x).all())
        except Exception:
            known = False
        return self.between(known, x)


class SwallowsLength(Two):
    def forward(self, x):
        try:
            known = len(x) >= 0
        except Exception:
            known = False
        return self.between(known, x)


class ConstantOfItsSize(Two):
    def forward(self, x):
        return self.b(torch.sigmoid(self.a(x)) + self.a.weight.new_tensor(0) + self.size())

    def size(self):
        return torch.tensor([self.a.out_features * 1.0])


class Inner(nn.Module):
    """A part of a network whose code asks."""

    def __init__(self):
        super().__init__()
        self.part = Type()

    def forward(self, x):
        return torch.tanh(self.part(x))


def cut(model: nn.Module, prefix: str = "") -> Mask:
    """A mask that cuts off the input of half the units of the first layer."""
    kept = dict(Mask.dense(model))
    kept[f"{prefix}a.weight"][:8] = False
    return Mask(kept)


def outcomes(model: nn.Module, inputs: tuple, named: dict) -> list:
    """The outputs of four calls, by how torch follows gradients; None where it does not take it."""
    found = []
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        network = copy.deepcopy(model)
        with mode():
            try:
                found.append(torch.stack([network(*inputs, **named) for _ in range(4)]))
            except TypeError:  # Python's own, of arguments that it does not take
                found.append(None)
    return found


ASKING = (
    Default, Required, Keyword, Flag, Sentinel, Rest, Named, Both, Many, Type, ExactType, IsTensor,
    Has, Gets, Dtype, Graph, GradMode, Inference, Counts, CountsInABuffer, Remembers, Swallows,
    SwallowsLength, ConstantOfItsSize,
)  # fmt: skip


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("kind", ASKING)
def test_whatever_is_asked_the_compacted_network_answers_as_the_masked_one(kind, with_example):
    torch.manual_seed(0)
    model = kind().double()
    x, mask = torch.randn(4, 8).double(), cut(model)
    example = None if not with_example else (x, None) if kind is Required else x
    compaction = compact(model, mask, example)
    masked = mask.apply_(copy.deepcopy(model)).eval()
    taken = 0
    for inputs, named in (
        ((x,), {}), ((x, None), {}), ((x, SCALE), {}), ((x, SCALE, SCALE), {}), ((x, True), {}),
        ((x,), {"scale": SCALE}),
    ):  # fmt: skip
        for got, expected in zip(
            outcomes(compaction.model, inputs, named), outcomes(masked, inputs, named), strict=True
        ):
            assert (got is None) == (expected is None)
            if expected is not None:
                taken += 1
                assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert taken
    assert compaction.left_dense  # and why
    assert all("\n" not in reason for reason in compaction.left_dense.values())
    assert (model.calls, model.last, float(model.seen)) == (0, None, 0)


class Labelled(Two):
    def forward(self, x, labels=None, flag=False):
        z = self.between(True, x)
        return z if labels is None else (F.cross_entropy(z, labels), z)


def test_an_argument_that_changes_nothing_before_the_last_layer_is_no_hindrance():
    model = Labelled().double()
    x, labels = torch.randn(4, 8).double(), torch.arange(4) % 3
    mask = cut(model)
    masked = mask.apply_(copy.deepcopy(model)).eval()
    for example in (None, x, (x, labels), {"x": x, "labels": labels}):
        small = compact(model, mask, example).model
        assert small.a.weight.shape == (8, 8)
        assert torch.allclose(small(x), masked(x), rtol=0, atol=1e-12)
        for got, expected in zip(small(x, labels), masked(x, labels), strict=True):
            assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_a_part_that_asks_is_left_dense_alone():
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8), Inner()).double()
    mask = dict(Mask.dense(model))
    mask["0.weight"][:2] = False
    mask["3.part.a.weight"][:8] = False
    x = torch.randn(4, 8).double()
    compaction = compact(model, Mask(mask), x)
    assert compaction.model[0].weight.shape == (4, 8)
    assert compaction.model[3].part.a.weight.shape == (16, 8)
    masked = Mask(mask).apply_(copy.deepcopy(model))
    assert torch.allclose(compaction.model(x), masked(x), rtol=0, atol=1e-12)


def test_a_layer_that_a_module_that_is_not_traced_uses_too_keeps_its_size():
    class Reuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()
            self.c = nn.Linear(16, 2)

        def forward(self, x):
            return self.c(torch.sigmoid(self.inner.part.a(x))).sum() * self.inner(x)

    model = Reuses().double()
    mask = cut(model, "inner.part.")
    x = torch.randn(4, 8).double()
    compaction = compact(model, mask)
    masked = mask.apply_(copy.deepcopy(model))
    assert torch.allclose(compaction.model(x), masked(x), rtol=0, atol=1e-12)
    assert "inner.part.a" in compaction.left_dense


def test_a_forward_method_that_was_replaced_is_not_taken_for_the_classs():
    whole, layer = Two(), Two()
    whole.forward = lambda x: whole.between(True, x)
    relu = layer.a.forward
    layer.a.forward = lambda x: relu(x) + 1
    layer.__class__ = type("Plain", (Two,), {"forward": lambda self, x: self.between(True, x)})
    for model in (whole, layer):
        compaction = compact(model, cut(model))
        assert compaction.model.a.weight.shape == (16, 8)
        assert "its forward method was replaced" in compaction.left_dense["a"]


def test_what_the_example_shows_to_be_another_network_is_left_dense():
    class Traced(Two):
        def forward(self, x):
            return self.between(not isinstance(x, torch.fx.Proxy), x)

    class Literal(Two):
        """Keeps a layer where no one looks for it."""

        def forward(self, x):
            h = torch.relu(self.a(x))
            return self.b(h) if isinstance(x, torch.fx.Proxy) else h.reshape(-1, 16)[:, :3]

    for kind, reason in ((Traced, "outputs on the example are others"), (Literal, "it fails on")):
        model = kind()
        x, mask = torch.randn(5, 8), cut(model)
        compaction = compact(model, mask, x)
        assert reason in compaction.left_dense["a"]
        assert torch.equal(compaction.model(x), mask.apply_(copy.deepcopy(model))(x))


def test_an_example_that_is_run_to_compare_leaves_nothing_behind():
    class Keeps(Two):
        def forward(self, x):
            x.mul_(2)
            self.last = self.between(True, x)
            return self.last

    model, x = Keeps(), torch.randn(4, 8)
    before, state = x.clone(), torch.get_rng_state()
    small = compact(model, cut(model), x).model
    assert torch.equal(torch.get_rng_state(), state)
    assert model.last is None
    assert small.last is None
    assert torch.equal(x, before)


def test_an_example_that_the_network_does_not_take_is_one_sentence():
    with pytest.raises(lossprune.PruningError, match=r"does not fit what Required takes: missing"):
        compact(Required(), cut(Required()), torch.randn(4, 8))


@pytest.mark.parametrize("kind", [Type, Swallows, GradMode, Counts, Has])
def test_a_network_that_asks_is_not_narrowed_for_training(kind):
    model = kind()
    kept = dict(Mask.dense(model))
    kept["b.weight"][:, :8] = False
    with pytest.raises(NotNarrowableError, match="could not be followed"):
        narrow(model, Mask(kept))


def test_training_calls_a_network_by_its_defaults():
    model = Default().double()
    kept = dict(Mask.dense(model))
    kept["b.weight"][:, :8] = False
    x = torch.randn(4, 8).double()
    small = narrow(model, Mask(kept)).model
    assert small.a.weight.shape == (8, 8)
    assert torch.allclose(small(x), Mask(kept).apply_(model)(x), rtol=0, atol=1e-12)


# Numbers that are not real ones.


class Complex(nn.Module):
    """Real layers around complex ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.a = nn.Linear(8, 16, dtype=torch.complex64)
        self.b = nn.Linear(16, 4, dtype=torch.complex64)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        z = torch.tanh(self.first(x)).to(torch.complex64)
        return self.last(self.b(self.a(z)).abs())


def test_complex_layers_are_left_dense():
    torch.manual_seed(0)
    model, x = Complex(), torch.randn(5, 6)
    kept = dict(Mask.dense(model))
    kept["a.weight"][:8] = False
    kept["first.weight"][:3] = False
    kept["b.weight"][1:3] = False
    mask = Mask(kept)
    masked = mask.apply_(copy.deepcopy(model))
    compaction = compact(model, mask, x)
    assert compaction.left_dense["a"] == compaction.left_dense["b"] == "its numbers are complex64"
    assert torch.allclose(compaction.model(x), masked(x), atol=1e-6)
    assert [c.live for c in count_live(model, mask).layers][1] == 64  # all that are kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_constants_are_folded_in_the_networks_own_precision(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 3)).to(dtype)
    kept = dict(Mask.dense(model))
    kept["0.weight"][:8] = False
    x = torch.randn(4, 8).to(dtype)
    compaction = compact(model, Mask(kept), x)
    assert compaction.left_dense == {}
    small, masked = compaction.model, Mask(kept).apply_(copy.deepcopy(model))
    assert {it.dtype for it in small.parameters()} == {dtype}
    exact = masked.double()(x.double())
    # No further from the exact result than the masked network itself could be.
    assert (small(x).double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
