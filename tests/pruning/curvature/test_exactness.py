"""Loss, gradient and GGN diagonal against automatic differentiation, layer by layer."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lossprune

CLASSES = 3
EXAMPLES = 5


def classifier(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Tanh(), nn.Linear(features, CLASSES))


def on_top_of(layer: nn.Module, shape: tuple[int, ...]) -> nn.Sequential:
    """A classifier on ``layer``, whose input comes from a tanh of another weight's output."""
    with torch.no_grad():
        features = layer(torch.zeros(1, *shape)).numel()
    return classifier(layer, features=features)


def data(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(EXAMPLES, *shape, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(0, CLASSES, (EXAMPLES,), generator=generator)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 5), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 5, bias=False), (4,)),
    "linear on tokens": (lambda: nn.Linear(4, 3), (6, 4)),
    "linear on a grid of tokens": (lambda: nn.Linear(4, 2), (2, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 7)),
    "conv1d strided": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 8)),
    "conv1d same, even kernel": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 6)),
    "conv2d 1x1": (lambda: nn.Conv2d(3, 2, 1), (3, 3, 3)),
    "conv2d of the whole input": (lambda: nn.Conv2d(2, 4, 4), (2, 4, 4)),
    "conv2d oblong": (
        lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        (2, 5, 7),
    ),
    "conv2d stride that leaves a rim": (lambda: nn.Conv2d(2, 2, 2, stride=3), (2, 7, 6)),
    "conv2d padding wider than kernel": (lambda: nn.Conv2d(1, 2, 2, padding=3), (1, 3, 3)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid", dilation=2), (2, 6, 6)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 4, 5)),
    "conv2d same, even and dilated": (
        lambda: nn.Conv2d(2, 2, (2, 4), padding="same", dilation=(3, 1)),
        (2, 4, 5),
    ),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 4)),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), (3, 4, 4)),
    "conv2d grouped, dilated, strided": (
        lambda: nn.Conv2d(4, 4, 3, groups=2, dilation=2, stride=2, padding=2),
        (4, 6, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2), (2, 3, 3, 3)),
    "conv3d grouped, strided, padded": (
        lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2),
        (2, 2, 3, 3),
    ),
}
for mode in ("reflect", "replicate", "circular"):
    LAYERS |= {
        f"conv1d {mode}": (
            lambda mode=mode: nn.Conv1d(2, 3, 3, padding=2, padding_mode=mode), (2, 5)
        ),
        f"conv2d {mode}": (
            lambda mode=mode: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode), (2, 4, 4)
        ),
        f"conv2d {mode}, same": (
            lambda mode=mode: nn.Conv2d(2, 2, (2, 3), padding="same", padding_mode=mode), (2, 4, 4)
        ),
        f"conv3d {mode}": (
            lambda mode=mode: nn.Conv3d(1, 2, 2, padding=1, padding_mode=mode), (1, 3, 3, 3)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, agrees):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    first = nn.Linear(shape[-1], shape[-1])  # so that the layer's input depends on a weight too
    model = nn.Sequential(first, nn.Tanh(), *on_top_of(build(), shape)).double()
    inputs, targets = data(shape)

    statistics = lossprune.measure(model, [(inputs, targets)])

    assert list(statistics.ggn_diagonal) == ["0.weight", "2.weight", "5.weight"]
    agrees(statistics, model, inputs, targets)


@st.composite
def convolutions(draw):
    dimensions = draw(st.sampled_from([1, 1, 2, 2, 3]))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    kernel, dilation = sizes(1, 3), sizes(1, 2)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    named = draw(st.booleans())
    stride = sizes(1, 1) if named else sizes(1, 3)
    padding = draw(st.sampled_from(["same", "valid"])) if named else sizes(0, 2)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    space = tuple(max(size, draw(st.integers(3, 5))) for size in reach)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 2))
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1](
        channels,
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    return layer, (channels, *space)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(drawn=convolutions(), seed=st.integers(0, 99))
def test_any_convolution(drawn, seed, agrees):
    layer, shape = drawn
    torch.manual_seed(seed)
    layer.reset_parameters()
    model = on_top_of(layer, shape).double()
    inputs, targets = data(shape, seed)

    statistics = lossprune.measure(model, [(inputs, targets)])

    agrees(statistics, model, inputs, targets)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    leading=st.lists(st.integers(1, 3), max_size=2),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_linear_network(widths, leading, bias, seed, agrees):
    torch.manual_seed(seed)
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=bias), nn.Softplus()]
    shape = (*leading, widths[0])
    model = on_top_of(nn.Sequential(*layers), shape).double()
    inputs, targets = data(shape, seed)

    statistics = lossprune.measure(model, [(inputs, targets)])

    agrees(statistics, model, inputs, targets)


class LayerUsedTwice(nn.Module):
    """One convolution before and after a non-linearity, on inputs of two sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.out = nn.Linear(2, CLASSES)

    def forward(self, x):
        x = torch.tanh(self.conv(x))
        return self.out(self.conv(x[:, :, ::2]).mean((2, 3)))


class LayerOfThreeNames(nn.Module):
    """A cell that runs twice, and norms and layers under several names."""

    def __init__(self):
        super().__init__()
        cell, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        norm.running_var.mul_(2)
        self.net = nn.Sequential(cell, norm, nn.Tanh(), cell, norm, nn.Linear(4, CLASSES))
        self.cells = nn.ModuleList([cell] * 2)
        self.head = self.net[-1]

    def forward(self, x):
        return self.head(self.net[:-1](torch.tanh(self.cells[1](x))))


class SharedWeights(nn.Module):
    """Two layers with one weight and biases of their own."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class SharedByLinearAndConvolution(nn.Module):
    """One weight as it is and, functionally, as the kernel of a convolution over tokens."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):  # (n, tokens, 4)
        x = torch.tanh(F.conv1d(x.transpose(1, 2), self.conv.weight, self.conv.bias))
        return self.out(self.conv(x).mean(2))


class Functional(nn.Module):
    """Weights used through functions, by position and by keyword, without the layer's forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.hidden = nn.Linear(4, 5)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x):
        x = F.conv2d(input=x, weight=self.conv.weight, stride=2, padding=(1,), dilation=[1, 1])
        x = torch.tanh(x).mean((2, 3))
        x = torch.tanh(F.linear(x, self.hidden.weight))
        return F.linear(bias=self.out.bias, weight=self.out.weight, input=x)


class Residual(nn.Module):
    """A pre-activation block with a convolution on its shortcut, and a plain one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.conv1 = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(2, 3, 1, stride=2, bias=False)
        self.out = nn.Linear(3, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        h = F.relu(self.norm(x))
        x = self.conv2(F.relu(self.conv1(h))) + self.shortcut(h)
        x += self.conv2(F.relu(x))
        return self.out(x.mean((2, 3)))


class InPlace(nn.Module):
    """In-place non-linearities right after layers, and an in-place sum."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1)
        self.a = nn.Linear(15, 6)
        self.b = nn.Linear(6, 6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = F.relu(self.conv(x), inplace=True)
        x = x.flatten(1)
        x = F.leaky_relu(self.a(x), 0.1, inplace=True)
        y = self.b(x)
        y.mul_(2.0).add_(x)
        return self.out(y).add_(1.0)


class TokensInPlace(nn.Module):
    """In-place non-linearities on token outputs, which torch computes as views of a matrix."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 5)
        self.b = nn.Linear(5, 5, bias=False)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x):
        x = F.relu(self.a(x), inplace=True)
        return self.out(self.b(x).tanh_().mean(1))


class Attention(nn.Module):
    """Self-attention over tokens with its projections in linear layers."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.norm = nn.LayerNorm(4)
        self.project = nn.Linear(4, 4)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v))
        return self.out(x[:, 0])


class Recurrent(nn.Module):
    """A recurrent cell of linear layers, one step after another."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(4, 3)
        self.cycle = nn.Linear(3, 3, bias=False)
        self.out = nn.Linear(3, CLASSES)

    def forward(self, x):
        state = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            state = torch.tanh(self.enter(step) + self.cycle(state))
        return self.out(state)


class PartlyUnused(nn.Module):
    """A layer that never runs, and one whose result is thrown away."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(4, 4)
        self.ignored = nn.Linear(4, 4)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        self.ignored(x)
        return self.out(x)


class EmbeddedTokens(nn.Module):
    """Whole-number inputs: an embedding, which is not pruned, then layers, which are."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(self.embed(x))).mean(1))


NETWORKS = {
    LayerUsedTwice: ((2, 4, 4), ["conv.weight", "out.weight"]),
    LayerOfThreeNames: ((4,), ["net.0.weight", "net.5.weight"]),
    SharedWeights: ((4,), ["a.weight", "out.weight"]),
    SharedByLinearAndConvolution: ((3, 4), ["conv.weight", "out.weight"]),
    Functional: ((2, 5, 5), ["conv.weight", "hidden.weight", "out.weight"]),
    Residual: (
        (2, 5, 5),
        ["stem.weight", "conv1.weight", "conv2.weight", "shortcut.weight", "out.weight"],
    ),
    InPlace: ((2, 5), ["conv.weight", "a.weight", "b.weight", "out.weight"]),
    TokensInPlace: ((3, 4), ["a.weight", "b.weight", "out.weight"]),
    Attention: ((3, 4), ["qkv.weight", "project.weight", "out.weight"]),
    Recurrent: ((3, 4), ["enter.weight", "cycle.weight", "out.weight"]),
    PartlyUnused: ((4,), ["never.weight", "ignored.weight", "out.weight"]),
}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_network(network, agrees):
    shape, names = NETWORKS[network]
    torch.manual_seed(1)
    model = network().double()
    inputs, targets = data(shape)

    statistics = lossprune.measure(model, [(inputs, targets)])

    assert list(statistics.ggn_diagonal) == names
    agrees(statistics, model, inputs, targets)


def test_whole_number_inputs(agrees):
    torch.manual_seed(0)
    model = EmbeddedTokens().double()
    inputs = torch.randint(0, 7, (EXAMPLES, 4))
    targets = torch.arange(EXAMPLES) % CLASSES

    statistics = lossprune.measure(model, [(inputs, targets)])

    assert list(statistics.ggn_diagonal) == ["hidden.weight", "out.weight"]
    agrees(statistics, model, inputs, targets)


@pytest.mark.parametrize("network", [Residual, LayerOfThreeNames, SharedWeights, Attention])
def test_under_a_mask(network, agrees):
    shape, _ = NETWORKS[network]
    torch.manual_seed(2)
    model = network().double()
    inputs, targets = data(shape)
    mask = lossprune.prune(model, "MP", sparsity=0.6).mask

    statistics = lossprune.measure(model, [(inputs, targets)], mask=mask)

    agrees(statistics, model, inputs, targets, mask=mask)


def test_unused_layers_have_no_gradient_and_no_curvature():
    model = PartlyUnused()
    statistics = lossprune.measure(model, [(torch.randn(4, 4), torch.arange(4) % CLASSES)])
    for name in ("never.weight", "ignored.weight"):
        assert torch.equal(statistics.gradient[name], torch.zeros(4, 4))
        assert torch.equal(statistics.ggn_diagonal[name], torch.zeros(4, 4))


def test_frozen_parameters_are_measured_like_others(agrees):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    model.requires_grad_(False)
    inputs, targets = data((4,))

    statistics = lossprune.measure(model, [(inputs, targets)])

    agrees(statistics, model, inputs, targets)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_without_gradients_switched_on(agrees):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    inputs, targets = data((4,))

    with torch.no_grad():
        statistics = lossprune.measure(model, [(inputs, targets)])
        assert not torch.is_grad_enabled()

    agrees(statistics, model, inputs, targets)


def test_confident_network_keeps_its_digits(agrees):
    """Logits of ±30: probabilities within 1e-13 of 0 and 1."""
    model = nn.Linear(4, CLASSES, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[30.0, 0, 0, 0], [0, 30.0, 0, 0], [-30.0, 0, 0, 1.0]]))
    inputs = torch.eye(4, dtype=torch.float64)
    targets = torch.tensor([0, 1, 0, 2])

    statistics = lossprune.measure(model, [(inputs, targets)])

    # Rows of one-hot inputs read one column of the weight each: h = p (1 − p) / 4, where the
    # smallest p (1 − p) is about 1e-26.
    z = model.weight.detach().T
    p = z.softmax(1)
    others = torch.stack([p[:, [1, 2]].sum(1), p[:, [0, 2]].sum(1), p[:, [0, 1]].sum(1)], dim=1)
    torch.testing.assert_close(
        statistics.ggn_diagonal["weight"], (p * others / 4).T, rtol=1e-9, atol=0.0
    )


def test_single_precision_is_close_to_double(agrees):
    torch.manual_seed(0)
    model = Residual()
    inputs, targets = data((2, 5, 5))

    statistics = lossprune.measure(model, [(inputs.float(), targets)])

    assert statistics.ggn_diagonal["conv1.weight"].dtype == torch.float32
    agrees(statistics, model, inputs.float(), targets, tolerance=1e-5)


def test_half_precision_is_summed_in_single():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES)).to(torch.bfloat16)
    batch = (torch.randn(16, 4, dtype=torch.bfloat16), torch.arange(16) % CLASSES)

    statistics = lossprune.measure(model, [batch])

    assert {h.dtype for h in statistics.ggn_diagonal.values()} == {torch.float32}
    assert all((h >= 0).all() for h in statistics.ggn_diagonal.values())


def test_channels_last(agrees):
    torch.manual_seed(0)
    model = Residual().double().to(memory_format=torch.channels_last)
    inputs, targets = data((2, 5, 5))

    statistics = lossprune.measure(model, [(inputs.to(memory_format=torch.channels_last), targets)])

    agrees(statistics, model, inputs, targets)


@pytest.mark.parametrize(("gradient", "ggn_diagonal"), [(True, False), (False, True)])
def test_only_what_is_asked_for(gradient, ggn_diagonal, by_autograd):
    model = nn.Linear(4, CLASSES).double()
    inputs, targets = data((4,))

    statistics = lossprune.measure(
        model, [(inputs, targets)], gradient=gradient, ggn_diagonal=ggn_diagonal
    )

    loss, g, h = by_autograd(model, inputs, targets)
    assert statistics.loss == pytest.approx(loss, rel=1e-12)
    for wanted, ours, theirs in (
        (gradient, statistics.gradient, g),
        (ggn_diagonal, statistics.ggn_diagonal, h),
    ):
        assert list(ours) == (["weight"] if wanted else [])
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-10, atol=1e-15)


def test_network_of_one_class():
    """Its loss is 0 whatever the weights are."""
    statistics = lossprune.measure(nn.Linear(3, 1), [(torch.randn(4, 3), torch.zeros(4).long())])
    assert statistics.loss == 0.0
    assert torch.equal(statistics.ggn_diagonal["weight"], torch.zeros(1, 3))
