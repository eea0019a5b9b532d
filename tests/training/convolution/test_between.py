"""What stands between sparse layers computes what torch's does, forwards and backwards."""

from collections.abc import Callable, Sequence
from typing import Any

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
    """Two convolutions, and a function of what the first gives and of modules."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        # Without a bias, whose gradient is rounding alone where a norm follows.
        self.before = nn.Conv2d(SHAPE[1], CHANNELS, 3, padding=1, bias=False)
        self.after = nn.Conv2d(CHANNELS, 4, 2, padding=1)
        self.function, self.layers = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x), *self.layers))


class Together(nn.Module):
    """Networks side by side: one is made in little more time than each of them."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([network(x).flatten(1) for network in self.networks], 1)


def given(network: nn.Module, numbers: Callable[..., Tensor] = drawn) -> nn.Module:
    """The network with parameters and statistics of its own."""
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        if tensor.is_floating_point():
            found = numbers(*tensor.shape, seed=number)
            tensor.copy_(found.abs() + 0.5 if name.endswith("running_var") else found)
    return network


def called(x: Tensor, *modules: nn.Module) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def check(
    *networks: nn.Module,
    numbers: Callable[..., Tensor] = drawn,
    modes: Sequence[bool] = (True,),
    by_torch: bool = False,
    images: int = SHAPE[0],
) -> None:
    """Compare networks with the masked dense ones.

    Args:
        networks: side by side.
        numbers: of parameters, inputs and gradients.
        modes: training or evaluation, one after the other.
        by_torch: whether torch computes the first layer of each.
        images: of the batch.
    """
    network = given(Together(*networks), numbers)
    x = numbers(images, *SHAPE[1:], seed=7)
    model = compared(network, random_mask(network, 0.5), x, modes=modes, numbers=numbers)
    found = [note for note in model.notes if not note.startswith(("flatten", "cat"))]
    said = [f"networks.{number}.layers.0 runs as torch runs it" for number in range(len(networks))]
    assert found == (said if by_torch else [])


BOTH = (True, False)  # training, and then evaluation
NORMS: tuple[dict[str, Any], ...] = (
    {"momentum": 0.3},
    {"momentum": None, "eps": 0.2},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
)


def test_batch_norm():
    check(
        *(Between(called, nn.BatchNorm2d(CHANNELS, **norm), nn.ReLU()) for norm in NORMS),
        Between(called, nn.ReLU(), nn.BatchNorm2d(CHANNELS)),
        modes=BOTH,
    )


def test_batch_norm_of_features():
    """Of so many images that gradients, where much cancels, are right to five digits in float32."""
    check(
        *(
            nn.Sequential(
                nn.Conv2d(3, 4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                nn.BatchNorm1d(4, **norm), nn.ReLU(), nn.Linear(4, 6, bias=False),
                nn.BatchNorm1d(6, **norm), nn.Tanh(), nn.Linear(6, 2),
            )
            for norm in NORMS
        ),
        modes=BOTH,
        images=37,
    )  # fmt: skip


def test_running_statistics_move_on_as_torchs():
    """Three batches of other numbers, with a momentum and without."""
    norms = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS, momentum=None)
    network = given(Between(called, *norms))
    mask = random_mask(network, 1.1)
    model = lossprune.sparse(network, mask, drawn(*SHAPE))
    for seed in range(3):
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


POOLS = (
    nn.MaxPool2d(2), nn.MaxPool2d(3, 1), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 3),
    nn.MaxPool2d((3, 2), (1, 2), (1, 0)), nn.AvgPool2d((7, 3)), nn.AvgPool2d(2),
    nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d((None, 1)),
    nn.AdaptiveAvgPool2d((7, 6)),
)  # fmt: skip
ACTIVATIONS = (
    nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(0.7), nn.SELU(), nn.CELU(0.8), nn.GELU(),
    nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(),
    nn.Softplus(2.0), nn.Softsign(), nn.Hardtanh(-0.5, 0.7), nn.Hardswish(), nn.Hardsigmoid(),
    nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True), nn.SiLU(inplace=True), nn.Identity(),
)  # fmt: skip
OF_TORCH = (
    nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(4, ceil_mode=True), nn.AvgPool2d(3, 1),
    nn.AvgPool2d(3, 2, 1), nn.AvgPool2d((7, 3), divisor_override=5), nn.AdaptiveMaxPool2d(2),
    nn.PReLU(CHANNELS), nn.Softshrink(), nn.GroupNorm(1, CHANNELS), nn.InstanceNorm2d(CHANNELS),
)  # fmt: skip


def test_pools():
    """Of whole numbers, so that there are several equal maxima."""
    check(*(Between(called, nn.ReLU(), pool, nn.ReLU()) for pool in POOLS), numbers=whole)


def test_activations():
    check(*(Between(called, activation) for activation in ACTIVATIONS))


def test_what_torch_runs():
    check(*(Between(called, layer, nn.ReLU()) for layer in OF_TORCH), by_torch=True)


FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    lambda x: F.relu(input=x, inplace=False),
    lambda x: F.relu(x, True),
    lambda x: x.relu_(),
    torch.relu,
    lambda x: F.leaky_relu(x, 0.3, True),
    lambda x: F.elu(x, alpha=0.5),
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.hardtanh(x, -0.3, max_val=0.4),
    lambda x: F.softplus(x, 2, threshold=10),
    lambda x: x.tanh().sigmoid(),
    lambda x: x.contiguous(memory_format=torch.channels_last).relu(),
    lambda x: F.max_pool2d(x, kernel_size=3, stride=2, padding=1),
    lambda x: F.avg_pool2d(x, (7, 2)),
    lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    lambda x: x.mean((2, 3), keepdim=True),
    lambda x: torch.mean(x, dim=(-1, -2), keepdim=True),
    lambda x: F.dropout(x, training=False),
)  # fmt: skip


def test_functions():
    check(*(Between(function) for function in FUNCTIONS))


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


def rectified_in_place_beside_a_shortcut(x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
    return torch.relu_(F.relu(norm(layer(x)), inplace=True) + x)


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


IN_BLOCKS = {
    added: (conv(), norm()),
    subtracted: (conv(),),
    added_in_place: (conv(), norm()),
    rectified_in_place_beside_a_shortcut: (conv(), norm()),
    read_twice: (conv(),),
    read_twice_through_an_identity: (nn.Identity(),),
    read_twice_where_contiguous: (),
}
IN_ANY_WAY = {
    twice_itself: (),
    changed_where_it_is: (conv(),),
    changed_through_an_identity: (nn.Identity(),),
    changed_through_a_view: (),
    changed_where_plain: (),
}


def test_values_read_twice_or_changed():
    check(*(Between(function, *layers) for function, layers in IN_BLOCKS.items()))


@pytest.mark.parametrize("function", IN_ANY_WAY, ids=lambda function: function.__name__)
def test_values_that_blocks_do_not_follow(function):
    network = given(Between(function, *IN_ANY_WAY[function]))
    compared(network, random_mask(network, 0.5), drawn(*SHAPE))


@pytest.mark.parametrize("images", [3, 19], ids=["one block", "more"])
def test_dropout_draws_what_torchs_draws(images):
    kinds = nn.Dropout(0.4), nn.Dropout2d(0.4), nn.AlphaDropout(0.3)
    networks = [Between(called, kind, nn.ReLU()) for kind in kinds]
    check(*networks, modes=BOTH, by_torch=True, images=images)


@pytest.mark.parametrize("layers", [["relu"], ["norm", "relu"], ["pool"]], ids="-".join)
def test_what_is_no_number_stays_none(layers):
    kinds = {"relu": nn.ReLU(), "norm": nn.BatchNorm2d(CHANNELS), "pool": nn.MaxPool2d(2)}
    network = given(Between(called, *(kinds[layer] for layer in layers)))
    model = lossprune.sparse(network, random_mask(network, 1.1), drawn(*SHAPE))
    x = drawn(*SHAPE)
    x[1, 0, 2, 2] = torch.nan
    x[2, 1, 3, 3] = torch.inf
    for one in (model, network):
        one.train()
    assert torch.equal(model(x).isnan(), network(x).isnan())
