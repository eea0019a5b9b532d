"""Compaction of networks of every make: what it folds, what it leaves dense."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lossprune import Mask, compact
from lossprune.deployment import count_live
from tests.channels.random_networks import masks, networks, randomised

FLOAT64 = 1e-12  # of the largest output


def checked(model: nn.Module, mask: dict, *inputs: torch.Tensor):
    """Compact in double precision, compare the outputs, and return the compaction."""
    model = model.double().eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    mask = Mask(dict(Mask.dense(model)) | mask)
    compaction = compact(model, mask)
    with torch.no_grad():
        expected = mask.apply_(copy.deepcopy(model))(*inputs)
        got = compaction.model(*inputs)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= FLOAT64 * expected.abs().max()
    return compaction


def without(weight: torch.Tensor, rows=(), columns=()) -> torch.Tensor:
    """A mask that removes all weights of these outputs and of these inputs."""
    kept = torch.ones(weight.shape, dtype=torch.bool)
    kept[list(rows)] = False
    kept[:, list(columns)] = False
    return kept


def widths(model: nn.Module) -> list[tuple[int, ...]]:
    layers = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    return [tuple(m.weight.shape[:2]) for m in model.modules() if isinstance(m, layers)]


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.SiLU(), nn.Softplus(),
    nn.LeakyReLU(0.1), nn.ELU(), nn.Hardtanh(), nn.Hardswish(), nn.Identity(), nn.Dropout(0.5),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_constant_of_a_unit_without_inputs_goes_through_activations(activation):
    model = nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 4), activation, nn.Linear(4, 2))
    model[0].bias.data = torch.tensor([-2.0, -0.5, 0.0, 0.7, 3.0])
    mask = {"0.weight": without(model[0].weight, rows=[0, 2, 4])}
    compaction = checked(model, mask, torch.randn(6, 3))
    assert widths(compaction.model) == [(2, 3), (4, 2), (2, 4)]


def test_a_constant_passes_several_layers():
    model = nn.Sequential(
        nn.Linear(3, 5),
        nn.Sigmoid(),
        nn.BatchNorm1d(5),
        nn.Linear(5, 4),
        nn.Tanh(),
        nn.Linear(4, 2),
    )
    model[2].running_mean.normal_()
    mask = {"0.weight": without(model[0].weight, rows=[0, 1])}
    second = without(model[3].weight, columns=[])
    second[2, 2:] = False  # reads the two constants alone
    compaction = checked(model, mask | {"3.weight": second}, torch.randn(6, 3))
    assert widths(compaction.model) == [(3, 3), (3, 3), (2, 3)]
    assert compaction.model[2].num_features == 3


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1, {}), (3, {}), (3, {"padding": 1}), (3, {"padding": 1, "stride": 2}),
        (3, {"padding": 2, "dilation": 2}), (5, {"padding": 1}), (4, {"padding": "same"}),
        (3, {"padding": "valid"}), ((3, 1), {"padding": (1, 0)}),
    ],
)  # fmt: skip
def test_constants_before_a_convolution_that_pads(mode, size, options):
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(6, 5, size, padding_mode=mode, **options),
        nn.ReLU(),
        nn.Conv2d(5, 3, 3, padding=1),
    )
    second = without(model[2].weight)
    second[1, 3:] = False  # reads constants alone
    mask = {"0.weight": without(model[0].weight, rows=[0, 1, 2]), "2.weight": second}
    compaction = checked(model, mask, torch.randn(2, 2, 9, 8))
    pads = options.get("padding") not in (None, "valid")
    at_border = mode == "zeros" and pads
    # One of three constants stays where the padding's zeros are none of it.
    assert widths(compaction.model)[0] == (4 if at_border else 3, 2)
    checked(compaction.model, dict(compaction.mask), torch.randn(1, 2, 7, 10))


def test_only_weights_at_the_border_need_a_constant_to_stay():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 5, 3, padding=1))
    second = torch.zeros(5, 6, 3, 3, dtype=torch.bool)
    second[:, :, 1, 1] = True
    mask = {"0.weight": without(model[0].weight, rows=[0, 1, 2]), "2.weight": second}
    compaction = checked(model, mask, torch.randn(2, 2, 9, 8))
    assert widths(compaction.model) == [(3, 2), (5, 3)]


def test_a_mean_over_windows_with_zeros_around_keeps_a_constant():
    for pool, stays in [
        (nn.AvgPool2d(3, padding=1), True),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), False),
        (nn.AvgPool2d(2, ceil_mode=True), False),
        (nn.MaxPool2d(3, padding=1), False),
    ]:
        model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Sigmoid(), pool, nn.Conv2d(6, 5, 1))
        mask = {"0.weight": without(model[0].weight, rows=[0, 1, 2])}
        compaction = checked(model, mask, torch.randn(2, 2, 9, 9))
        assert widths(compaction.model)[0] == (6 if stays else 3, 2)


class Residual(nn.Module):
    def __init__(self, width: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3)
        self.conv1 = nn.Conv2d(width, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, width, 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        y = self.conv2(F.relu(self.bn1(self.conv1(x))))
        y += x
        return self.head(F.adaptive_avg_pool2d(y, 1).view(x.size(0), -1))


def test_channels_of_a_sum_go_together():
    model = Residual()
    model.bn1.bias.data = torch.tensor([1.0, -1.0, 0.3, 0.2, 2.0])
    model.stem.bias.data[:2] = torch.tensor([0.5, -0.4])
    mask = {
        "stem.weight": without(model.stem.weight, rows=[0, 1]),
        "conv2.weight": without(model.conv2.weight, rows=[1, 2]),
        "conv1.weight": without(model.conv1.weight, rows=[3]),
        "head.weight": without(model.head.weight, columns=[5]),
    }
    compaction = checked(model, mask, torch.randn(2, 2, 9, 9))
    # Channel 1 is constant in both; at the border channel 0, constant in one, stands for both.
    assert widths(compaction.model) == [(5, 2), (4, 5), (5, 4), (3, 5)]
    mask["conv1.weight"][:, [0, 1, 5]] = False
    compaction = checked(model, mask, torch.randn(2, 2, 9, 9))
    assert widths(compaction.model) == [(4, 2), (4, 4), (4, 4), (3, 4)]


class Joined(nn.Module):
    """Concatenation, a gate, a depthwise convolution, a mean over positions."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b = nn.Conv2d(2, 3, 3, padding=1)
        self.each = nn.Conv2d(7, 7, 3, padding=1, groups=7)
        self.gate = nn.Conv2d(7, 7, 1)
        self.head = nn.Linear(7, 2)

    def forward(self, x):
        x = self.each(torch.cat([F.relu(self.a(x)), torch.sigmoid(self.b(x))], dim=1))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(1.5 * x.mean(dim=(-1, -2)) - 0.5)


def test_concatenations_gates_and_depthwise_convolutions():
    model = Joined()
    each = without(model.each.weight, rows=[2, 6])
    mask = {
        "a.weight": without(model.a.weight, rows=[0]),
        "each.weight": each,
        "head.weight": without(model.head.weight, columns=[1, 2, 6]),
        "gate.weight": without(model.gate.weight, columns=[1, 2, 6]),
    }
    compaction = checked(model, mask, torch.randn(2, 2, 6, 6))
    assert compaction.left_dense == {}
    assert widths(compaction.model)[2][0] < 7
    assert compaction.model.each.groups == widths(compaction.model)[2][0]


def test_flatten_turns_a_channel_into_several_features():
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.Sigmoid(), nn.Flatten(), nn.BatchNorm1d(80), nn.ReLU(),
        nn.Linear(80, 4), nn.ReLU(), nn.Linear(4, 2),
    )  # fmt: skip
    model[3].running_mean.normal_()
    model[3].weight.data.normal_()
    mask = {
        "0.weight": without(model[0].weight, rows=[1]),
        "5.weight": without(model[5].weight, columns=range(32, 48)),
    }
    compaction = checked(model, mask, torch.randn(3, 1, 6, 6))
    assert widths(compaction.model) == [(3, 1), (4, 48), (2, 4)]


def test_features_of_tokens():
    model = nn.Sequential(
        nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4), nn.Flatten(), nn.Linear(8, 2)
    )
    mask = {
        "0.weight": without(model[0].weight, rows=[1, 4]),
        "4.weight": without(model[4].weight, columns=[3, 7]),
    }
    compaction = checked(model, mask, torch.randn(6, 2, 3))
    assert widths(compaction.model) == [(3, 3), (3, 3), (2, 6)]


@pytest.mark.parametrize(
    ("conv", "norm", "pool", "shape"),
    [
        (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, (2, 2, 11)),
        (nn.Conv3d, nn.BatchNorm3d, nn.AvgPool3d, (1, 2, 5, 6, 7)),
    ],
)
def test_one_and_three_dimensions(conv, norm, pool, shape):
    model = nn.Sequential(
        conv(2, 5, 3, padding=1), norm(5), nn.ELU(), pool(2), conv(5, 3, 3, padding=1)
    )
    mask = {"0.weight": without(model[0].weight, rows=[1, 2])}
    assert widths(checked(model, mask, torch.randn(shape)).model)[0] == (4, 2)


# What cannot be followed is left as it was, and said.


class Odd(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 2)
        if how == "tied":
            self.second.weight = self.first.weight
        if how == "hook":
            self.first.register_forward_hook(lambda *call: call[-1] * 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        if self.how == "values" and x.sum() > 0:
            x = x * 2
        if self.how == "norm":
            x = self.norm(x)
        elif self.how == "softmax":
            x = x.softmax(-1)
        elif self.how == "twice":
            x = torch.tanh(self.first(x))
        elif self.how == "functional":
            x = F.linear(x, self.first.weight)
        elif self.how == "size":
            x = x / self.second.in_features**0.5
        elif self.how == "literal":
            x = x.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4)
        elif self.how == "dropout":
            x = F.dropout(x, 0.0)
        elif self.how == "overwritten":
            x = self.first(x)
            y = torch.relu_(x)
            return self.last(x) + self.last.bias * y.sum()
        return self.last(torch.sigmoid(self.second(x)))


KEEPS = "what it reads keeps all channels (channels are not followed through "
NEEDS = "what reads it needs all channels (channels are not followed through "


@pytest.mark.parametrize(
    ("how", "layer", "reason"),
    [
        ("norm", "first", f"{NEEDS}LayerNorm)"),
        ("norm", "second", f"{KEEPS}LayerNorm)"),
        ("softmax", "first", f"{NEEDS}the method 'softmax')"),
        ("twice", "first", "the network uses it 2 times"),
        ("functional", "first", "the network also uses its parameters outside of it"),
        ("tied", "first", "it shares a parameter with another layer"),
        ("hook", "first", "it has hooks"),
        ("size", "last", "the network's code computes with the sizes of its layers"),
        ("literal", "second", f"{KEEPS}the method 'reshape')"),
        ("dropout", "first", f"{NEEDS}the function 'dropout')"),
        ("values", "second", "the code of Odd could not be followed (its code branches on the"),
    ],
)
def test_what_cannot_be_followed_is_left_dense_and_said(how, layer, reason):
    model = Odd(how)
    mask = {
        "first.weight": without(model.first.weight, rows=[0], columns=[3]),
        "last.weight": without(model.last.weight, columns=[2]),
    }
    if how != "tied":
        mask["second.weight"] = without(model.second.weight, rows=[1], columns=[2])
    compaction = checked(model, mask, torch.randn(6, 4))
    assert compaction.left_dense[layer].startswith(reason)
    assert compaction.effective_sparsity >= compaction.nominal_sparsity


def test_a_tensor_that_is_changed_in_place_and_used_again():
    model = Odd("overwritten")
    model.first.bias.data -= 1
    mask = {"first.weight": without(model.first.weight, rows=[0, 1])}
    checked(model, mask, torch.randn(6, 4))

    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            y = x.view(x.size(0), -1).mul_(2)
            return self.b(x) + self.b(y)

    model = Reused()
    checked(model, {"a.weight": without(model.a.weight, rows=[0, 1])}, torch.randn(6, 3))


def test_groups_are_left_dense():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    mask = {"0.weight": without(model[0].weight, rows=[0])}
    compaction = checked(model, mask, torch.randn(2, 2, 5, 5))
    assert compaction.left_dense == {
        "0": "what reads it needs all channels (its channels are in groups)",
        "1": "its channels are in groups",
        "2": "what it reads keeps all channels (its channels are in groups)",
    }


def test_a_part_that_cannot_be_traced_leaves_the_rest_to_be_compacted():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else x

    model = nn.Sequential(
        nn.Linear(3, 6),
        nn.ReLU(),
        nn.Linear(6, 4),
        Block(),
        nn.Linear(4, 5),
        nn.ReLU(),
        nn.Linear(5, 2),
    )
    mask = {
        "0.weight": without(model[0].weight, rows=[0, 1]),
        "4.weight": without(model[4].weight, rows=[2]),
    }
    compaction = checked(model, mask, torch.randn(7, 3))
    assert widths(compaction.model) == [(4, 3), (4, 4), (4, 4), (4, 4), (2, 4)]
    assert list(compaction.left_dense) == ["2", "3.inner", "4"]
    assert compaction.notes == [
        f"all channels are kept, with the same outputs, in {where}" for where in (
            f"2: {NEEDS}Block)", "3.inner: channels are not followed through Block",
            f"4: {KEEPS}Block)",
        )
    ]  # fmt: skip


def test_layers_of_one_reason_are_one_note():
    class Asks(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if len(x) else x

    model = Asks(*(nn.Linear(3, 3) for _ in range(11)))
    (note,) = compact(model, Mask.dense(model)).notes
    reason = "the code of Asks could not be followed (its code asks for the length of a tensor)"
    where = f"in 11 layers (0, 1 and 9 more): {reason}"
    assert note == f"all channels are kept, with the same outputs, {where}"
    (note,) = count_live(model, Mask.dense(model)).notes
    assert note == f"unreachable units could not all be found {where}"


def test_a_decorated_forward_method_of_any_arguments_is_said_to_be_one():
    def decorated(forward):
        @functools.wraps(forward)
        def called(self, *given, **named):
            return forward(self, *given, **named)

        return called

    class Decorated(nn.Linear):
        @decorated
        def forward(self, x, **options):
            return super().forward(x)

    model = Decorated(3, 2)
    (reason,) = compact(model, Mask.dense(model)).left_dense.values()
    assert reason.endswith("(its forward method has a decorator and takes any number of arguments)")


def test_a_layer_that_is_never_used_is_on_no_path():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[1].spare = nn.Linear(2, 2)
    compaction = checked(model, {}, torch.randn(5, 3))
    assert [(c.name, c.live, c.dead_units) for c in compaction.layers] == [
        ("0.weight", 12, 0),
        ("1.spare.weight", 0, 2),
        ("2.weight", 8, 0),
    ]
    assert compaction.left_dense == {"1.spare": "the network never uses it"}
    assert compaction.effective_sparsity == 4 / 24


def test_parameters_of_other_kinds_are_masked_and_left():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            x = torch.tanh(self.inner(x))
            return self.last(self.attention(x, x, x, need_weights=False)[0])

    model = Attending()
    projection = model.attention.in_proj_weight
    mask = {"attention.in_proj_weight": without(projection, rows=[0, 5])}
    compaction = checked(model, mask, torch.randn(2, 3, 4))
    counts = {c.name: (c.kept, c.live, c.dead_units) for c in compaction.layers}
    assert counts["attention.in_proj_weight"] == (40, 40, 2)
    assert compaction.left_dense["attention"] == (
        "channels are not followed through MultiheadAttention with several arguments"
    )
    assert compaction.mask["attention.in_proj_weight"].equal(mask["attention.in_proj_weight"])


def test_a_mask_named_as_in_a_compiled_network():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    kept = without(model[0].weight, rows=[0])
    compaction = compact(model, Mask({"_orig_mod.0.weight": kept}))
    assert widths(compaction.model) == [(3, 3), (2, 3)]
    assert list(compaction.mask) == ["0.weight"]


def test_several_inputs_and_outputs():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(2, 5)
            self.c = nn.Linear(5, 4)

        def forward(self, x, y, *, scale=2.0):
            hidden = torch.relu(self.a(x) + self.b(y))
            return {"hidden": self.c(hidden), "sum": (hidden * 2).sum()}

    model = Several().double()
    kept = Mask(
        dict(Mask.dense(model))
        | {
            "c.weight": without(model.c.weight, columns=[0]),
            "a.weight": without(model.a.weight, [1]),
        }
    )
    compaction = compact(model, kept)
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    expected = kept.apply_(copy.deepcopy(model))(x, y)
    got = compaction.model(x, y)
    assert all(torch.allclose(got[name], expected[name], rtol=FLOAT64) for name in expected)
    assert compaction.left_dense["a"] == f"{NEEDS}the method 'sum')"


@settings(max_examples=30, deadline=None)
@given(networks(), st.integers(0, 2**32), st.data())
def test_random_networks_with_random_masks(model, seed, data):
    generator = torch.Generator().manual_seed(seed)
    mask = data.draw(masks(randomised(model, generator), generator))
    inputs = torch.randn(2, 2, 6, 6, generator=generator)
    compaction = checked(model, mask, inputs)
    assert compaction.left_dense == {}
    assert compaction.effective_sparsity >= compaction.nominal_sparsity
    # The small network again: nothing new is cut off.
    again = checked(compaction.model, dict(compaction.mask), inputs)
    assert again.mask.total <= compaction.mask.total
