"""Linear layers on tokens: every dimension before the last is rows."""

import copy
import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp

import lossprune
from lossprune.channels.tracing import UntraceableError, trace
from lossprune.deployment.sparse.network import SparseNetwork, Tuning
from lossprune.deployment.sparse.parts import in_parts, sparse_networks
from lossprune.kernels.compiler import compiler_available
from lossprune.pruning import PruningError

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

# Of a float32 sum of a few hundred products, against the same in float64.
RELATIVE = 1e-5


def masked(model, density):
    with torch.no_grad():
        for weight in lossprune.Mask.dense(model):
            parameter = model.get_parameter(weight)
            parameter.mul_(torch.rand_like(parameter) < density)
    return model.eval()


def sparse(model, *example):
    """All layers as sparse steps, whatever is fastest."""
    graph = trace(model, {}).module(model)
    ShapeProp(graph).propagate(*example)
    return in_parts(graph)


def assert_equal_to_rounding(deployed, model, *inputs):
    with torch.no_grad():
        found = deployed(*inputs)
        expected = copy.deepcopy(model).double()(*[tensor.double() for tensor in inputs])
    largest = expected.abs().max().item() if expected.numel() else 0.0
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, rtol=0, atol=RELATIVE * max(largest, 1e-6))


class Residual(nn.Module):
    """Layers in a row, with what their first one gives added at the end."""

    def __init__(self, sizes, activation):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.last, self.activation = nn.Linear(sizes[-1], sizes[1], bias=False), activation

    def forward(self, x):
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(self.activation(x))
        return first + self.last(self.activation(x))


shapes = st.lists(st.sampled_from([1, 2, 3, 5, 9]), min_size=0, max_size=4)


@settings(max_examples=50, deadline=None)
@given(
    leading=shapes,
    other=shapes,
    sizes=st.lists(st.integers(1, 45), min_size=2, max_size=4),
    activation=st.sampled_from([nn.Identity(), nn.ReLU(), nn.Tanh(), nn.GELU(), nn.GELU("tanh")]),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    few=st.sampled_from([0, 10_000]),
)
def test_inputs_of_any_rank(leading, other, sizes, activation, density, few):
    torch.manual_seed(0)
    model = masked(Residual(sizes, activation), density)
    example = torch.randn(*leading, sizes[0])
    deployed = sparse(model, example)
    for part in sparse_networks(deployed):
        part.retune_(Tuning(few=few))
    assert_equal_to_rounding(deployed, model, example)
    # Images have one dimension of examples and stay what they are.
    again = other if len(leading) != 1 else [math.prod(other)]
    assert_equal_to_rounding(deployed, model, torch.randn(*again, sizes[0]))


@pytest.mark.parametrize("rows", [0, 1, 7, 63, 64, 65, 127, 128, 129, 300])
def test_any_number_of_rows(rows):
    torch.manual_seed(0)
    model = masked(nn.Sequential(nn.Linear(37, 53), nn.ReLU(), nn.Linear(53, 19)), 0.2)
    deployed = sparse(model, torch.randn(1, 9, 37))
    assert isinstance(deployed, SparseNetwork), "all of it runs by one call"
    for few in (0, 10_000):
        deployed.retune_(Tuning(few=few))
        assert_equal_to_rounding(deployed, model, torch.randn(1, rows, 37))
        # Neither whole nor in order in memory.
        assert_equal_to_rounding(
            deployed, model, torch.randn(37, 2 * rows, 1).permute(2, 1, 0)[:, ::2]
        )


class CrossAttention(nn.Module):
    """Written by hand, in torch's operations; both inputs may be of any number of tokens."""

    def __init__(self, size=24, heads=3):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(size)
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))
        self.up, self.down = nn.Linear(size, 50), nn.Linear(50, size)

    def forward(self, x, memory):
        queries = self.query(x)
        keys, values = self.key(memory), self.value(memory)
        split = [
            t.view(*t.shape[:2], self.heads, 24 // self.heads).transpose(1, 2)
            for t in (queries, keys, values)
        ]
        mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_attention_with_two_inputs_of_other_sizes_than_the_examples():
    torch.manual_seed(0)
    model = masked(CrossAttention(), 0.2)
    example = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    deployed = sparse(model, *example)
    names = {step.name for part in sparse_networks(deployed) for step in part.steps}
    assert {"query", "key", "value", "out", "up", "down"} <= names
    for one, other in (((2, 5), (2, 5)), ((2, 3), (2, 11)), ((1, 1), (1, 200)), ((0, 4), (0, 2))):
        assert_equal_to_rounding(deployed, model, torch.randn(*one, 24), torch.randn(*other, 24))


@pytest.mark.parametrize(
    "read", [lambda x: len(x.shape[:2]), lambda x: [*x.shape[:-1]], lambda x: [*x.shape]]
)
def test_how_many_dimensions_there_are_is_never_taken_for_granted(read):
    class Asking(nn.Linear):
        def forward(self, x):
            return super().forward(x) * bool(read(x))

    with pytest.raises(UntraceableError, match=r"the length of a tensor|one by one"):
        trace(Asking(2, 2), {})


class ChannelsLast(nn.Module):
    """Maps, rows of four dimensions and flattened maps, as in networks of several kinds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix, self.back = nn.Linear(8, 20), nn.Linear(20, 8)
        self.position = nn.Parameter(torch.randn(1, 1, 1, 8))
        self.along, self.conv, self.last = (
            nn.Linear(6, 6), nn.Conv2d(8, 4, 3), nn.Linear(4 * 4 * 4, 3)
        )  # fmt: skip

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.mix(x.permute(0, 2, 3, 1) + self.position)
        x = x + self.back(torch.tanh(y)).permute(0, 3, 1, 2)
        return self.last(self.conv(self.along(x)).flatten(1))


def test_maps_beside_rows_of_four_dimensions():
    torch.manual_seed(0)
    model = masked(ChannelsLast(), 0.4)
    deployed = sparse(model, torch.randn(2, 3, 6, 6))
    names = [step.name for part in sparse_networks(deployed) for step in part.steps]
    assert {"stem", "mix", "back", "along", "conv", "last"} <= set(names)
    for batch in (2, 1, 20, 0):
        assert_equal_to_rounding(deployed, model, torch.randn(batch, 3, 6, 6))


class Positions(nn.Module):
    """Adds one vector for each token, which one example shows as a whole batch of them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x, positions):
        return self.last(F.relu(self.first(x) + positions))


def test_what_all_examples_share_is_no_batch_of_one():
    torch.manual_seed(0)
    model = masked(Positions(), 0.5)
    positions = torch.randn(1, 7, 10)
    deployed = sparse(model, torch.randn(1, 7, 6), positions)
    for batch in (4, 1, 0):
        assert_equal_to_rounding(deployed, model, torch.randn(batch, 7, 6), positions)
    with pytest.raises(PruningError, match=r"\(4, 8, 6\), \(1, 7, 10\) do not go together"):
        deployed(torch.randn(4, 8, 6), positions)
    with pytest.raises(PruningError, match="takes 6 inputs"):
        deployed(torch.randn(4, 7, 5), positions)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_in_the_end_of_a_layer(approximate):
    layer = nn.Linear(1, 1)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    model = nn.Sequential(layer, nn.GELU(approximate)).eval()
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.logspace(-30, 3, 5000)])
    x = torch.cat([x, -x])[:, None]
    deployed = sparse(model, x)
    assert isinstance(deployed, SparseNetwork)
    assert len(deployed.steps) == 1
    expected = F.gelu(x.double(), approximate=approximate)
    error = (deployed(x).double() - expected).abs() / x.double().abs()
    assert error.max() < 4e-7
    special = torch.tensor([[float("nan")], [float("inf")], [0.0]])
    for few in (0, 100):
        deployed.retune_(Tuning(few=few))
        out = deployed(special).flatten()
        assert out[0].isnan()
        assert out[1:].tolist() == [float("inf"), 0.0]


def test_a_pruned_encoder_is_tried_with_sparse_layers():
    torch.manual_seed(0)
    model = CrossAttention().eval()
    mask = lossprune.prune(model, "MP", sparsity=0.9).mask
    example = torch.randn(2, 5, 24), torch.randn(2, 9, 24)
    deployed = lossprune.deploy(model, mask, example, seconds=0.01)
    assert "sparse" in deployed.seconds
    assert not any("left out" in note for note in deployed.notes)
    expected = mask.apply_(copy.deepcopy(model))(*example)
    assert torch.allclose(deployed(*example), expected, rtol=0, atol=1e-5)
