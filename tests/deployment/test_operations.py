"""Every operation on maps that the kernels know, against torch in double precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossprune
from lossprune.deployment.sparse.network import SparseNetwork, Tuning
from lossprune.deployment.sparse.parts import in_parts
from lossprune.deployment.sparse.plan import OperationKind
from lossprune.deployment.sparse.steps import SparseConvolution
from lossprune.deployment.whole import all_sparse
from lossprune.kernels.compiler import compiler_available
from lossprune.pruning import PruningError

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

RELATIVE = 1e-5


class Around(nn.Module):
    """A convolution, and an operation on what it gives; another one is there to be called."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.other = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.gamma, self.one = nn.Parameter(torch.randn(6, 1, 1)), nn.Parameter(torch.randn(1))
        self.module = operation if isinstance(operation, nn.Module) else None
        self.operation = operation

    def forward(self, x):
        x = self.first(x)
        return self.operation(self, x) if self.module is None else self.module(x)


def mean(x):
    return F.adaptive_avg_pool2d(x, 1)


def bottleneck(net, x):
    y = torch.cat([x, net.other(x)], 1)
    z = torch.cat([x, net.other(x), torch.tanh(y)], 1)
    return torch.cat([z, y], 1)


ACTIVATIONS = {
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": lambda _, x: F.hardsigmoid(x),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.5, 0.25),
    "clamp": lambda _, x: torch.clamp(x, -0.1, 0.2),
    "clamp below": lambda _, x: x.clamp(min=-0.1),
    "leaky relu": nn.LeakyReLU(0.2),
    "leaky relu as a function": lambda _, x: F.leaky_relu(x),
    "elu": nn.ELU(0.7),
    "gelu": nn.GELU(),
    "a number": lambda _, x: x / 6 * 2 + 3 - 1,
    "minus": lambda _, x: 1 - (-x),
    "a parameter": lambda net, x: net.gamma * x,
    "a parameter less": lambda net, x: net.gamma - x,
    "less a parameter": lambda net, x: x - net.gamma,
    "one number": lambda net, x: x * net.one,
    "dropout": nn.Dropout(),
    "sigmoid and maximum": nn.Sequential(nn.Sigmoid(), nn.MaxPool2d(2)),
    "a sum in place": lambda net, x: net.other(x).add_(x),
}  # all of these are part of the convolution's end
OPERATIONS = {
    "leaky relu and maximum": nn.Sequential(nn.LeakyReLU(-0.3), nn.MaxPool2d(2)),
    "mean": nn.AvgPool2d(3, 2, 1),
    "mean of what is inside": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "mean of the rest, too": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "mean of few of the rest": nn.AvgPool2d(2, 3, ceil_mode=True),
    "mean by a number": nn.AvgPool2d((2, 3), (1, 2), divisor_override=5),
    "maximum": nn.MaxPool2d(3, 2, 1),
    "maximum of the rest, too": nn.MaxPool2d(3, 2, ceil_mode=True),
    "a wide maximum": nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
    "parts": nn.AdaptiveAvgPool2d((3, 4)),
    "parts of columns": nn.AdaptiveAvgPool2d((None, 2)),
    "mean of all": lambda _, x: x.mean([2, 3]),
    "mean kept": lambda _, x: x.mean((-1, -2), keepdim=True),
    "twice as large": nn.Upsample(scale_factor=2),
    "larger": lambda _, x: F.interpolate(x, scale_factor=(2, 3)),
    "joined": lambda net, x: torch.cat([x, net.other(x)], 1),
    "joined twice": lambda net, x: torch.cat([net.other(x), x, torch.relu(x), x], dim=-3),
    "joined again": bottleneck,
    "joined rows": lambda net, x: torch.cat([mean(x).flatten(1), x.mean((2, 3))], -1),
    "scaled": lambda net, x: x * torch.sigmoid(net.other(x.mean((2, 3), keepdim=True))),
    "scaled by the first": lambda net, x: torch.sigmoid(net.other(mean(x))) * x,
    "shifted": lambda net, x: F.relu(x + net.other(mean(x))),
    "difference": lambda net, x: x - net.other(x),
    "less the mean": lambda _, x: F.silu(x - mean(x)),
    "square": lambda _, x: torch.tanh(x * x),
    "twice": lambda _, x: x + x,
    "hardswish by hand": lambda _, x: x * F.relu6(x + 3) / 6,
    "silu by hand": lambda _, x: x * torch.sigmoid(x),
}


def lowered(model, example):
    graph = torch.fx.GraphModule(model, torch.fx.Tracer().trace(model))
    torch.fx.passes.shape_prop.ShapeProp(graph).propagate(example)
    return in_parts(graph)


def pruned(operation):
    torch.manual_seed(0)
    model = Around(operation).eval()
    with torch.no_grad():
        for layer in (model.first, model.other):
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.6)
    return model


def check(network, model, shape):
    for batch in (1, 3, 16, 19):
        inputs = torch.randn(batch, *shape)
        expected = copy.deepcopy(model).double()(inputs.double())
        for few in (0, 5):  # blocks of images alone; images one by one where they fill none
            made = network.retune_(Tuning(few=few))(inputs)
            assert made.shape == expected.shape
            assert (made - expected).abs().max() <= RELATIVE * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_a_convolution_ends_in(name):
    model = pruned(ACTIVATIONS[name])
    network = lowered(model, torch.randn(2, 3, 11, 13))
    assert isinstance(network, SparseNetwork)
    assert {type(step.operation) for step in network.steps} == {SparseConvolution}
    check(network, model, (3, 11, 13))


@torch.no_grad()
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_at_odd_sizes(name):
    model = pruned(OPERATIONS[name])
    network = lowered(model, torch.randn(2, 3, 11, 13))
    assert isinstance(network, SparseNetwork)
    for shape in ((3, 11, 13), (3, 4, 5)):
        check(network, model, shape)


@torch.no_grad()
@pytest.mark.parametrize(
    "function", [torch.sigmoid, F.silu, torch.tanh, F.elu, F.relu6, F.hardsigmoid, F.hardswish]
)
def test_an_activation_is_right_for_every_kind_of_number(function):
    """Signs, exponents and mantissas are drawn, so that there are denormals and infinities, too."""
    torch.manual_seed(0)
    numbers = torch.randint(-(2**31), 2**31, (1, 1, 256, 256)).int().view(torch.float32)
    numbers = torch.cat([numbers, torch.randn_like(numbers) * 30], 3)
    numbers[0, 0, 0, :2] = torch.tensor([float("inf"), float("nan")])
    model = Around(lambda _, x: function(x))
    model.first = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(model.first.weight)
    network = lowered(model.eval(), numbers)
    assert isinstance(network, SparseNetwork)
    made, expected = network(numbers), function(numbers.double())
    expected[numbers == -torch.inf] = function(torch.tensor(-torch.inf)).double()
    assert torch.allclose(made.double(), expected, rtol=2.2e-7, atol=2e-45, equal_nan=True)


class Dense(nn.Module):
    """Layers that each read all that those before have made."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * k, 4, 3, padding=1) for k in range(4))

    def forward(self, x):
        made = [x]
        for layer in self.layers:
            made.append(torch.relu(layer(torch.cat(made, 1))))
        return torch.cat(made, 1)


@pytest.mark.parametrize("few", [0, 100])
def test_what_is_joined_is_written_where_it_belongs(few):
    network = lowered(Dense().eval(), images := torch.randn(16, 3, 7, 9)).retune_(Tuning(few=few))
    operations = network.plan((images,)).operations
    joints = [one for one in operations if one.kind == OperationKind.JOIN]
    assert len(joints) == 4
    ends = [one.target.offset + one.source.channels * one.target.plane for one in joints]
    assert [one.other.offset for one in joints] == ends
    assert sum(one.source.offset != one.target.offset for one in joints) == 1, "the input alone"


def test_what_meets_must_still_fit_at_another_size():
    def scaled(net, x):
        return x * net.other(F.avg_pool2d(x, 5))

    network = lowered(Around(scaled).eval(), torch.randn(1, 3, 5, 5))
    with pytest.raises(PruningError, match=r"meet here, the second with one position in the ex"):
        network(torch.randn(1, 3, 10, 10))


class Gated(nn.Module):
    """Squeeze and excitation by linear layers, with reshapes by sizes."""

    def __init__(self):
        super().__init__()
        self.stem, self.less, self.more = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(4, 8)
        self.head = nn.Linear(8 * 5 * 7, 5)

    def forward(self, x):
        x = F.hardswish(self.stem(x))
        n, channels, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(n, channels)
        y = torch.sigmoid(self.more(F.relu(self.less(y)))).view(n, channels, 1, 1)
        x = x * y.expand_as(x) + y
        x = x.reshape(x.shape[0], -1).unsqueeze(-1).unsqueeze(-1)
        return self.head(x.squeeze(3).squeeze(2))


@torch.no_grad()
def test_reshapes_by_sizes_are_no_operations_of_their_own():
    torch.manual_seed(0)
    model = Gated().eval()
    mask = lossprune.Mask.dense(model)
    network, _ = all_sparse(model, mask, torch.randn(2, 3, 7, 9))
    assert isinstance(network.network, SparseNetwork)
    check(network.network, model, (3, 7, 9))


class InPlace(nn.Module):
    """Changes values in place: one that is read again, one that is not, and a parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
        self.seen = nn.Parameter(torch.zeros(6, 1, 1))

    def forward(self, x):
        x = self.first(x)
        y = self.other(x)
        y += x
        z = x.relu_()
        return self.other(y * z) + self.seen.add_(1.0)


@torch.no_grad()
def test_what_is_changed_in_place_is_so_for_all_who_read_it():
    torch.manual_seed(0)
    model, images = InPlace().eval(), torch.randn(4, 3, 5, 6)
    network, expected = lowered(copy.deepcopy(model), images), copy.deepcopy(model)
    expected(images)  # as it was once, for the shapes
    for _ in range(3):
        assert torch.allclose(network(images), expected(images), rtol=0, atol=1e-5)


class Moved(nn.Module):
    """Channels at the end, where something else happens as well."""

    def __init__(self, how):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 6, 3), nn.LayerNorm(6), nn.Linear(6, 4)
        self.how = how

    def forward(self, x):
        x = self.last(self.norm(self.first(x).permute(0, 2, 3, 1)))
        if self.how == "stays":
            return x
        if self.how == "is read elsewhere":
            return x.permute(0, 3, 1, 2) + x.flip(1).permute(0, 3, 1, 2)
        return torch.roll(torch.relu(x), 1, 1).permute(0, 3, 1, 2)


@torch.no_grad()
@pytest.mark.parametrize("how", ["stays", "is read elsewhere", "is rolled"])
@pytest.mark.parametrize("dense", [(), ("first",), ("last",)])
def test_channels_that_do_not_come_back_are_torch_s_to_move(how, dense):
    torch.manual_seed(0)
    model, images = Moved(how).eval(), torch.randn(3, 3, 9, 8)
    graph = torch.fx.GraphModule(model, torch.fx.Tracer().trace(model))
    torch.fx.passes.shape_prop.ShapeProp(graph).propagate(images)
    made, expected = in_parts(graph, dense)(images), model(images)
    assert torch.allclose(made, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
