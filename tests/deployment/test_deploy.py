import copy
import itertools
import operator
import pickle
import threading

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from torch import nn

import lossprune
from lossprune.deployment.fastest import deploy
from lossprune.deployment.sparse.network import SparseNetwork, Tuning
from lossprune.deployment.sparse.parts import in_parts, sparse_networks
from lossprune.kernels.compiler import compiler_available
from lossprune.pruning import PruningError

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

# Of a float32 sum of a few hundred products, against the same in float64.
RELATIVE = 1e-5


def random_mask(model, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lossprune.Mask(
        {
            name: torch.rand(weight.shape, generator=generator) < density
            for name, weight in lossprune.Mask.dense(model).items()
        }
    )


def sparse(model, example):
    """All layers as sparse steps, whatever is fastest."""
    graph = torch.fx.GraphModule(model, torch.fx.Tracer().trace(model))
    torch.fx.passes.shape_prop.ShapeProp(graph).propagate(example)
    return in_parts(graph)


def assert_equal_to_rounding(outputs, model, inputs):
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(inputs.double())
        largest = expected.abs().max().item() if expected.numel() else 0.0
    assert outputs.shape == expected.shape
    assert torch.allclose(outputs.double(), expected, rtol=0, atol=RELATIVE * max(largest, 1e-6))


@settings(max_examples=120, deadline=None)
@given(
    channels=st.sampled_from([1, 2, 3, 6, 72]),  # of so many, chunks are summed one by one
    outputs=st.sampled_from([1, 2, 6, 9]),
    groups=st.sampled_from([1, 1, 2, 3]),
    height=st.integers(1, 19),
    width=st.integers(1, 37),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    pool=st.sampled_from([None, 2, 2, (3, 2), (2, 1), (1, 3)]),
    larger=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    dilation=st.integers(1, 2),
    batch=st.sampled_from([1, 2, 4, 5, 16, 17, 33]),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    bias=st.booleans(),
    few=st.sampled_from([0, 100]),
    data=st.data(),
)
def test_a_convolution_of_any_shape(
    channels, outputs, groups, height, width, kernel, stride, padding, pool, larger, dilation,
    batch, density, bias, few, data,
):  # fmt: skip
    if channels % groups or outputs % groups:
        groups = 1
    if any(
        extent + 2 * pad < dilation * (taps - 1) + 1
        for extent, pad, taps in zip((height, width), padding, kernel, strict=True)
    ):
        return
    torch.manual_seed(0)
    layer = nn.Conv2d(
        channels, outputs, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias
    )
    inputs = torch.randn(batch, channels, height, width)
    made = layer(inputs).shape[2:]
    activation = data.draw(st.sampled_from([nn.Identity(), nn.ReLU(), nn.Tanh()]))
    model = nn.Sequential(layer, activation)
    if pool is not None:
        model.append(nn.MaxPool2d(pool))
        assume(all(map(operator.ge, made, (pool, pool) if isinstance(pool, int) else pool)))
    random_mask(model, density).apply_(model)
    deployed = sparse(model.eval(), inputs)
    assert isinstance(deployed, SparseNetwork)
    deployed.retune_(Tuning(few=few))
    assert_equal_to_rounding(deployed(inputs), model, inputs)
    others = torch.randn(2, channels, height + larger[0], width + larger[1])
    assert_equal_to_rounding(deployed(others), model, others)


@pytest.mark.parametrize("few", [0, 100], ids=["in blocks", "one by one"])
@pytest.mark.parametrize("stride", [1, 2])
def test_many_channels_are_summed_chunk_by_chunk(stride, few):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(100, 9, 3, stride, padding=1), nn.ReLU())
    mask = random_mask(model, 0.3)
    mask["0.weight"][3] = False
    mask["0.weight"][:, 40:80] = False
    mask.apply_(model)
    inputs = torch.randn(17, 100, 16 * stride, 16 * stride)
    deployed = sparse(model.eval(), inputs).retune_(Tuning(few=few))
    assert max(made.chunks for made in deployed.plan((inputs,)).operations) > 1
    assert_equal_to_rounding(deployed(inputs), model, inputs)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    batch=st.sampled_from([1, 3, 16, 50]),
    density=st.sampled_from([0.0, 0.05, 1.0]),
    few=st.sampled_from([0, 100]),
)
def test_linear_layers_of_any_size(sizes, batch, density, few):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).eval()
    random_mask(model, density).apply_(model)
    x = torch.randn(batch, sizes[0])
    deployed = sparse(model, x)
    deployed.retune_(Tuning(few=few))
    assert_equal_to_rounding(deployed(x), model, x)


@pytest.mark.parametrize("rows", [9, 300])
def test_many_features_are_summed_chunk_by_chunk(rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(900, 20), nn.GELU(), nn.Linear(20, 7)).eval()
    mask = random_mask(model, 0.3)
    mask["0.weight"][3] = False
    mask["0.weight"][5:, 80:200] = False
    mask.apply_(model)
    x = torch.randn(rows, 900)
    deployed = sparse(model, x).retune_(Tuning(few=0))
    assert max(made.chunks for made in deployed.plan((x,)).operations) > 2
    assert_equal_to_rounding(deployed(x), model, x)


class Everything(nn.Module):
    """Every operation that the kernels know, in an order that joins some of them and not others."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.short = nn.Conv2d(8, 12, 1, stride=2)
        self.pool = nn.MaxPool2d(3, 2)
        self.last = nn.Conv2d(12, 10, 2)
        self.fc = nn.Linear(10, 7)
        self.bn3 = nn.BatchNorm1d(7)

    def forward(self, x):
        x = self.stem(x)
        active = F.relu(self.bn1(x))
        x = x + self.conv2(torch.tanh(self.bn2(self.conv1(active))))
        x = torch.tanh(x)
        x = self.down(x) + self.short(x)
        x = F.max_pool2d(F.relu(x), 2)
        x = self.last(self.pool(x))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return F.relu(self.bn3(self.fc(x)))


def everything():
    torch.manual_seed(1)
    model = Everything()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize("batch", [1, 3, 16, 40])
@pytest.mark.parametrize("few", [0, 100])
def test_every_operation(batch, few):
    model = everything()
    random_mask(model, 0.3).apply_(model)
    x = torch.randn(batch, 3, 26, 30)
    deployed = sparse(model, x)
    assert isinstance(deployed, SparseNetwork), "all of it runs by one call"
    deployed.retune_(Tuning(few=few))
    assert_equal_to_rounding(deployed(x), model, x)


@pytest.mark.parametrize("dense", [{"conv1"}, {"down", "fc"}, {"stem", "conv2", "last"}])
def test_layers_left_to_torch(dense):
    model = everything()
    random_mask(model, 0.3).apply_(model)
    x = torch.randn(5, 3, 26, 30)
    graph = torch.fx.GraphModule(model, torch.fx.Tracer().trace(model))
    torch.fx.passes.shape_prop.ShapeProp(graph).propagate(x)
    deployed = in_parts(graph, dense)
    names = {s.name for part in sparse_networks(deployed) for s in part.steps}
    assert not names & dense
    assert {name for name, m in deployed.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert_equal_to_rounding(deployed(x), model, x)


@pytest.mark.parametrize(
    ("network", "shape"),
    [("MLP", (1, 8, 8)), ("VGG11", (3, 32, 32)), ("VGG11BN", (3, 32, 32))],
)
def test_published_networks(network, shape):
    torch.manual_seed(0)
    model = lossprune.networks.NETWORKS[network](shape=shape).eval()
    mask = random_mask(model, 0.02 if network != "MLP" else 0.2)
    x = torch.randn(4, *shape)
    before = copy.deepcopy(model.state_dict())
    deployed = deploy(model, mask, x, seconds=0.02)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    masked = mask.apply_(copy.deepcopy(model))
    for batch in (1, 4, 19):
        x = torch.randn(batch, *shape)
        assert_equal_to_rounding(deployed(x), masked, x)
    assert deployed(torch.randn(0, *shape)).shape == (0, 10)
    assert {layer.name for layer in deployed.layers} == {
        name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }


@pytest.mark.parametrize("few", [0, 100])
def test_a_residual_network_runs_by_one_call(few):
    torch.manual_seed(0)
    model = lossprune.networks.NETWORKS["PreActResNet18"]().eval()
    random_mask(model, 0.05).apply_(model)
    x = torch.randn(2, 3, 32, 32)
    deployed = sparse(model, x)
    assert isinstance(deployed, SparseNetwork)
    deployed.retune_(Tuning(few=few))
    assert_equal_to_rounding(deployed(x), model, x)


def test_threads_may_share_it():
    model = everything()
    random_mask(model, 0.3).apply_(model)
    inputs = [torch.randn(batch, 3, 26, 30) for batch in (1, 40, 3, 17)]
    deployed = sparse(model, inputs[1])
    deployed.retune_(Tuning(few=4))
    alone = [deployed(x) for x in inputs]
    fresh = pickle.loads(pickle.dumps(deployed))
    different = []

    def call(x, expected):
        for _ in range(20):
            if not torch.equal(fresh(x), expected):
                different.append(tuple(x.shape))

    threads = [threading.Thread(target=call, args=pair) for pair in zip(inputs, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not different


def test_one_thread_or_several_give_the_same_bits():
    model = everything()
    random_mask(model, 0.5).apply_(model)
    inputs = [torch.randn(batch, 3, 60, 60) for batch in (1, 40, 3, 16)]
    deployed = sparse(model, inputs[1])
    deployed.retune_(Tuning(few=4))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([deployed(x) for x in inputs])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_copied_and_saved(tmp_path):
    model = everything()
    random_mask(model, 0.3).apply_(model)
    x = torch.randn(3, 3, 26, 30)
    deployed = sparse(model, x)
    expected = deployed(x)
    assert torch.equal(copy.deepcopy(deployed)(x), expected)
    torch.save(deployed.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(deployed)
    for buffer in other.buffers():
        if buffer.dtype == torch.float32:
            buffer.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(x), expected)


def test_parts_are_copied_and_pickled_too():
    model = everything()
    random_mask(model, 0.3).apply_(model)
    x = torch.randn(5, 3, 26, 30)
    graph = torch.fx.GraphModule(model, torch.fx.Tracer().trace(model))
    torch.fx.passes.shape_prop.ShapeProp(graph).propagate(x)
    deployed = in_parts(graph, {"conv2", "fc"})
    expected = deployed(x)
    assert torch.equal(copy.deepcopy(deployed)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(deployed))(x), expected)


def test_a_network_in_double_precision_stays_torchs():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    mask = random_mask(model, 0.3)
    x = torch.randn(3, 8, dtype=torch.float64)
    deployed = deploy(model, mask, x, seconds=0.01)
    assert not sparse_networks(deployed)
    assert torch.allclose(deployed(x), mask.apply_(model)(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.randn(1, 4, dtype=torch.float64), "takes float32 tensors"),
        (lambda: torch.randn(1, 4, requires_grad=True), "computes no gradients"),
        (lambda: torch.randn(4), "got shape"),
        (lambda: torch.randn(1, 5), "takes 4 inputs"),
    ],
)
def test_what_it_cannot_take_is_refused(make, message):
    deployed = sparse(nn.Sequential(nn.Linear(4, 2)).eval(), torch.randn(1, 4))
    with pytest.raises(PruningError, match=message):
        deployed(make())


@pytest.mark.parametrize("few", [0, 100])
def test_an_image_too_small_for_the_maximum_is_refused(few):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Tanh(), nn.MaxPool2d(3, 1)).eval()
    deployed = sparse(model, torch.randn(1, 2, 9, 9))
    assert isinstance(deployed, SparseNetwork)
    deployed.retune_(Tuning(few=few))
    for size in (3, 6):
        with pytest.raises(PruningError, match="no window of its maximum fits"):
            deployed(torch.randn(2, 2, size, size))


class Positions(nn.Module):
    """Adds one map for all images to each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.positions = nn.Parameter(torch.randn(1, 8, 9, 9))
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x):
        positions = self.positions  # so that torch is done before the first convolution
        return self.last(torch.relu(self.first(x) + positions))


@pytest.mark.parametrize("few", [0, 100])
def test_what_all_images_share_is_no_batch_of_one(few):
    torch.manual_seed(0)
    model = Positions().eval()
    deployed = sparse(model, torch.randn(1, 3, 9, 9))
    (part,) = sparse_networks(deployed)
    part.retune_(Tuning(few=few))
    for batch in (4, 1, 0):
        x = torch.randn(batch, 3, 9, 9)
        assert_equal_to_rounding(deployed(x), model, x)
    with pytest.raises(PruningError, match="of one shape in the example"):
        deployed(torch.randn(1, 3, 12, 12))


def test_activations_keep_nan_and_are_accurate():
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh()).eval()
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.logspace(-30, 1, 5000)])[:, None]
    deployed = sparse(model, x)
    error = (deployed(x).double() - x.double().tanh()).abs() / x.double().tanh().abs().clamp(1e-30)
    assert error.max() < 4e-7
    special = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [0.0]])
    for few in (0, 100):
        deployed.retune_(Tuning(few=few))
        out = deployed(special).flatten()
        assert out[0].isnan()
        assert out[1:].tolist() == [1.0, -1.0, 0.0]


class Branching(nn.Module):
    """Its forward looks at values, so it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x if x.sum() > 0 else -x)


def test_what_cannot_be_traced_is_deployed_layer_by_layer():
    torch.manual_seed(0)
    model = Branching()
    mask = random_mask(model, 0.02)
    x = torch.randn(64, 64)
    deployed = deploy(model, mask, x, seconds=0.02)
    assert any("could not be followed" in note for note in deployed.notes)
    assert_equal_to_rounding(deployed(x), mask.apply_(model), x)


def test_in_place_activations_and_unknown_operations():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)
            self.gate = nn.Conv2d(6, 6, 1)
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            x = self.conv(x)
            y = self.relu(x)  # x is changed too
            x = torch.sigmoid(self.gate(y)) * x
            return {"scores": self.fc(x.mean((2, 3))), "map": y}

    torch.manual_seed(0)
    model = Model().eval()
    mask = random_mask(model, 0.4)
    x = torch.randn(3, 3, 9, 9)
    masked = mask.apply_(copy.deepcopy(model))
    with torch.no_grad():
        expected = masked(x)
    for found in (sparse(masked, x), deploy(model, mask, x, seconds=0.02)):
        with torch.no_grad():
            out = found(x)
        assert out.keys() == expected.keys()
        for key in out:
            assert torch.allclose(out[key], expected[key], rtol=1e-5, atol=1e-6)
