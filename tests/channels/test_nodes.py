"""One operation is read the same, in whichever way a network's code writes it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from lossprune.channels.nodes import paddings, read_call, read_module, scale_and_shift

RELUS = [
    nn.ReLU(),
    lambda x: F.relu(x),  # noqa: PLW0108, not its arguments
    lambda x: torch.relu(x),  # noqa: PLW0108, a builtin is not followed
    lambda x: x.relu(),
    lambda x: x.relu_(),
    lambda x: F.relu(x, inplace=True),
]
POOLINGS = [
    nn.AvgPool2d(3, 2, 1),
    lambda x: F.avg_pool2d(x, 3, 2, 1),
    lambda x: F.avg_pool2d(input=x, kernel_size=3, padding=1, stride=2),
]
ENLARGED = [
    nn.Upsample(scale_factor=2),
    nn.UpsamplingNearest2d(scale_factor=2),
    lambda x: F.interpolate(x, scale_factor=2),
    lambda x: F.interpolate(x, None, (2.0, 2)),
]
IDENTITIES = [nn.Identity(), nn.Dropout(), lambda x: F.dropout(x, 0.3, False)]
FLATTENINGS = [
    nn.Flatten(),
    lambda x: torch.flatten(x, 1),
    lambda x: x.flatten(start_dim=1),
]
SUMS = [lambda x: x + x, lambda x: torch.add(x, x), lambda x: x.add_(x), lambda x: x.add(x)]


def _read(written):
    if isinstance(written, nn.Module):
        return read_module(written)
    *_, call, _ = fx.symbolic_trace(written).graph.nodes
    return read_call(call)


@pytest.mark.parametrize("forms", [RELUS, IDENTITIES])
def test_functions_of_each_number(forms):
    numbers = torch.tensor([-1.0, 0.0, 2.0])
    found = [_read(form) for form in forms]
    assert len({operation.name for operation in found}) == 1
    for operation in found:
        expected = numbers.relu() if forms is RELUS else numbers
        assert torch.equal(operation.function(numbers.clone()), expected)


@pytest.mark.parametrize("forms", [POOLINGS, FLATTENINGS, SUMS, ENLARGED])
def test_operations_of_several_numbers(forms):
    first, *others = map(_read, forms)
    assert first is not None
    assert all(other == first for other in others)


def test_what_a_mean_divides_by():
    assert _read(POOLINGS[0]).rescales, "zeros of the border count"
    assert not _read(nn.AvgPool2d(3, 2, 1, count_include_pad=False)).rescales
    assert not _read(lambda x: F.avg_pool2d(x, 3)).rescales
    assert _read(lambda x: F.avg_pool2d(x, 3, divisor_override=2)).rescales
    assert not _read(nn.MaxPool2d(3, 2, 1)).rescales


@pytest.mark.parametrize(
    "form",
    [
        nn.MaxPool2d(2, return_indices=True),
        nn.Flatten(0),
        nn.Softmax(1),
        lambda x: F.dropout(x),  # noqa: PLW0108, not its arguments
        lambda x: torch.add(x, x, alpha=2),
        lambda x: x.mean(),
        lambda x: operator.matmul(x, x),
    ],
)
def test_what_is_not_known(form):
    assert _read(form) is None


def test_a_batch_norm_is_a_scale_and_a_shift():
    norm = nn.BatchNorm1d(3).double().eval()
    nn.init.normal_(norm.weight)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    scale, shift = scale_and_shift(norm)
    torch.testing.assert_close(x * scale + shift, norm(x))
    assert scale_and_shift(nn.BatchNorm1d(3, track_running_stats=False)) is None


def test_paddings_of_a_convolution():
    assert paddings(nn.Conv2d(1, 1, 3, padding=(1, 2))) == [(1, 1), (2, 2)]
    assert paddings(nn.Conv2d(1, 1, 3, padding="valid")) == [(0, 0), (0, 0)]
    assert paddings(nn.Conv2d(1, 1, (2, 3), padding="same", dilation=3)) == [(1, 2), (3, 3)]
