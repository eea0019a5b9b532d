"""What stands between sparse layers computes what torch's does, forwards and backwards."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossprune
from lossprune.kernels.compiler import compiler_available
from tests.training.convolution.oracle import compared, drawn, random_mask, whole

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

CHANNELS = 5
SHAPE = (19, 3, 7, 6)  # no whole number of blocks


class Between(nn.Module):
    """Two convolutions, and something between them that is given the network's modules."""

    def __init__(self, function: Callable, modules: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.before = nn.Conv2d(SHAPE[1], CHANNELS, 3, padding=1, bias=False)
        self.after = nn.Conv2d(CHANNELS, 4, 2, padding=1)
        self.function, self.modules_ = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x), *self.modules_))


def made(function: Callable, *modules: nn.Module, numbers=drawn) -> Between:
    """A network with parameters and statistics of its own."""
    network = Between(function, modules)
    for number, tensor in enumerate((*network.parameters(), *network.buffers())):
        if tensor.is_floating_point():
            tensor.data = numbers(*tensor.shape, seed=number)
    for name, tensor in network.named_buffers():
        if name.endswith("running_var"):
            tensor.data = tensor.abs() + 0.5
    return network


def called(x: Tensor, *modules: nn.Module) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def check(function: Callable, *modules: nn.Module, numbers=drawn, training=True, notes=()) -> None:
    """Compare a network with the masked dense one, and what is said of it."""
    network = made(function, *modules, numbers=numbers)
    x = numbers(*SHAPE, seed=7)
    model = compared(network, random_mask(network, 0.5), x, training=training, numbers=numbers)
    assert model.notes == [f"{name} runs as torch runs it" for name in notes]


NORMS = {
    "usual": {},
    "momentum": {"momentum": 0.3},
    "cumulative": {"momentum": None},
    "without affine": {"affine": False},
    "without statistics": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "epsilon": {"eps": 0.2},
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("given", NORMS.values(), ids=NORMS.keys())
def test_batch_norm(given, training):
    check(called, nn.BatchNorm2d(CHANNELS, **given), nn.ReLU(), training=training)
    check(called, nn.ReLU(), nn.BatchNorm2d(CHANNELS, **given), nn.Tanh(), training=training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("given", NORMS.values(), ids=NORMS.keys())
def test_batch_norm_of_features(given, training):
    layers = [
        nn.Conv2d(3, 4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.BatchNorm1d(4, **given), nn.ReLU(), nn.Linear(4, 6, bias=False),
        nn.BatchNorm1d(6, **given), nn.Tanh(), nn.Linear(6, 2),
    ]  # fmt: skip
    network = nn.Sequential(*layers)
    for number, parameter in enumerate(network.parameters()):
        parameter.data = drawn(*parameter.shape, seed=number)
    model = compared(network, random_mask(network, 0.5), drawn(*SHAPE), training=training)
    assert model.notes == []


def test_running_statistics_move_on_as_torchs():
    """Five batches of other numbers, with a momentum and without."""
    network = made(
        called, nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.BatchNorm2d(CHANNELS, momentum=None)
    )
    mask = random_mask(network, 1.1)
    model = lossprune.sparse(network, mask, drawn(*SHAPE))
    for seed in range(5):
        network(drawn(*SHAPE, seed=seed))
        model(drawn(*SHAPE, seed=seed))
    expected = dict(network.named_buffers())
    found = {name: tensor for name, tensor, _ in model.mirrored() if name in expected}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_batch_norm_of_one_value_is_refused_as_by_torch():
    network = nn.Sequential(nn.Conv2d(3, 4, 7), nn.BatchNorm2d(4), nn.ReLU())
    model = lossprune.sparse(network, random_mask(network, 0.5), torch.randn(2, 3, 7, 7))
    for one in (network, model):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            one(torch.randn(1, 3, 7, 7))
    assert model.eval()(torch.randn(1, 3, 7, 7)).shape == (1, 4, 1, 1)


POOLS = {
    "max": nn.MaxPool2d(2),
    "overlapping": nn.MaxPool2d(3, 1),
    "padded": nn.MaxPool2d(3, 2, 1),
    "apart": nn.MaxPool2d(2, 3),
    "not square": nn.MaxPool2d((3, 2), (1, 2), (1, 0)),
    "average": nn.AvgPool2d((7, 3)),
    "mean of all": nn.AdaptiveAvgPool2d(1),
    "average of a part": nn.AvgPool2d(2),
    "some means": nn.AdaptiveAvgPool2d(3),
    "means of rows": nn.AdaptiveAvgPool2d((None, 1)),
    "as it is": nn.AdaptiveAvgPool2d((7, 6)),
}
POOLS_OF_TORCH = {
    "dilated": nn.MaxPool2d(2, dilation=2),
    "ceiling": nn.MaxPool2d(4, ceil_mode=True),
    "average that overlaps": nn.AvgPool2d(3, 1),
    "average with padding": nn.AvgPool2d(3, 2, 1),
    "by another number": nn.AvgPool2d((7, 3), divisor_override=5),
    "adaptive maximum": nn.AdaptiveMaxPool2d(2),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
def test_pools(pool):
    """Of whole numbers, so that there are several equal maxima."""
    check(called, pool, numbers=whole)
    check(called, nn.ReLU(), pool, nn.ReLU(), numbers=whole)


@pytest.mark.parametrize("pool", POOLS_OF_TORCH.values(), ids=POOLS_OF_TORCH.keys())
def test_pools_that_torch_runs(pool):
    check(called, pool, nn.ReLU(), numbers=whole, notes=["modules_.0"])


ACTIVATIONS = (
    nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(0.7), nn.SELU(), nn.CELU(0.8), nn.GELU(),
    nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(),
    nn.Softplus(2.0), nn.Softsign(), nn.Hardtanh(-0.5, 0.7), nn.Hardswish(), nn.Hardsigmoid(),
    nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True), nn.SiLU(inplace=True), nn.Identity(),
)  # fmt: skip
OTHERS = (
    nn.PReLU(CHANNELS),
    nn.Softshrink(),
    nn.GroupNorm(1, CHANNELS),
    nn.InstanceNorm2d(CHANNELS),
)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations(activation):
    check(called, activation)


@pytest.mark.parametrize("module", OTHERS, ids=repr)
def test_what_torch_runs(module):
    check(called, module, notes=["modules_.0"])


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu by name": lambda x: F.relu(input=x, inplace=False),
    "relu in place": lambda x: F.relu(x, True),
    "relu_": lambda x: x.relu_(),
    "torch.relu": torch.relu,
    "leaky": lambda x: F.leaky_relu(x, 0.3, True),
    "elu": lambda x: F.elu(x, alpha=0.5),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, max_val=0.4),
    "softplus": lambda x: F.softplus(x, 2, threshold=10),
    "tanh": lambda x: x.tanh().sigmoid(),
    "contiguous": lambda x: x.contiguous(memory_format=torch.channels_last).relu(),
    "maxima": lambda x: F.max_pool2d(x, kernel_size=3, stride=2, padding=1),
    "means": lambda x: F.avg_pool2d(x, (7, 2)),
    "mean": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    "kept mean": lambda x: x.mean((2, 3), keepdim=True),
    "mean from behind": lambda x: torch.mean(x, dim=(-1, -2), keepdim=True),
    "no dropout": lambda x: F.dropout(x, training=False),
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_functions(function):
    check(function)


def added(x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
    return F.relu(norm(layer(F.relu(x))) + x)


def subtracted(x: Tensor, layer: nn.Module) -> Tensor:
    return x - layer(x)


def added_in_place(x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
    y = norm(layer(F.relu(x)))
    y += x
    return F.relu(y, inplace=True)


def read_twice(x: Tensor, layer: nn.Module) -> Tensor:
    return F.relu(x) + layer(x)


def read_twice_through_an_identity(x: Tensor, nothing: nn.Module) -> Tensor:
    return F.relu(nothing(x)) + x


def read_twice_where_contiguous(x: Tensor) -> Tensor:
    return x - F.relu(x.contiguous())


def twice_itself(x: Tensor) -> Tensor:
    return torch.tanh(x + x)


def changed_where_it_is(x: Tensor, layer: nn.Module) -> Tensor:
    y = layer(x)
    y.sigmoid_()
    return y * 0.5 + y


def changed_through_an_identity(x: Tensor, nothing: nn.Module) -> Tensor:
    torch.tanh_(nothing(x))
    return x


def changed_through_a_view(x: Tensor) -> Tensor:
    torch.flatten(x, 1).tanh_()
    return x


def changed_where_plain(x: Tensor) -> Tensor:
    x.mul_(0.5)
    return F.relu(x)


def conv() -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(CHANNELS)


WAYS = {
    added: (conv(), norm()),
    subtracted: (conv(),),
    added_in_place: (conv(), norm()),
    read_twice: (conv(),),
    read_twice_through_an_identity: (nn.Identity(),),
    read_twice_where_contiguous: (),
    twice_itself: (),
    changed_where_it_is: (conv(),),
    changed_through_an_identity: (nn.Identity(),),
    changed_through_a_view: (),
    changed_where_plain: (),
}


@pytest.mark.parametrize("function", WAYS, ids=lambda function: function.__name__)
def test_values_read_twice_or_changed(function):
    network = made(function, *WAYS[function])
    compared(network, random_mask(network, 0.5), drawn(*SHAPE))


@pytest.mark.parametrize("images", [3, 19], ids=["one block", "more"])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
def test_dropout_draws_what_torchs_draws(kind, images):
    network = made(called, kind(0.4), nn.ReLU())
    mask = random_mask(network, 0.5)
    compared(network, mask, drawn(images, *SHAPE[1:]))
    compared(network, mask, drawn(images, *SHAPE[1:]), training=False)


@pytest.mark.parametrize("layers", [["relu"], ["pool"]], ids="-".join)
def test_what_is_no_number_stays_none(layers):
    kinds = {"relu": nn.ReLU(), "norm": nn.BatchNorm2d(CHANNELS), "pool": nn.MaxPool2d(2)}
    network = made(called, *(kinds[layer] for layer in layers))
    model = lossprune.sparse(network, random_mask(network, 1.1), drawn(*SHAPE))
    x = drawn(*SHAPE)
    x[1, 0, 2, 2] = torch.nan
    x[2, 1, 3, 3] = torch.inf
    for one in (model, network):
        one.train()
    assert torch.equal(model(x).isnan(), network(x).isnan())
