"""Deployed networks are called, read and answered as the masked ones: whatever their code does."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_flatten

import lossprune
from lossprune.kernels.compiler import compiler_available
from lossprune.pruning import PruningError

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

LARGE = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
SMALL = LARGE[:4, :8].clone()


def deployed(network, example, density=0.05, seed=0, **named):
    """The deployed network and the masked one, with a mask of its ordinary weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name for name, _ in network.named_parameters() if name.endswith("weight")}
    weights &= {f"{name}.weight" for name, it in network.named_modules() if type(it) is nn.Linear}
    shapes = {name: network.get_parameter(name).shape for name in weights or {"weight"}}
    mask = lossprune.Mask(
        {name: torch.rand(shapes[name], generator=generator) < density for name in sorted(shapes)}
    )
    masked = mask.apply_(copy.deepcopy(network)).eval()
    return lossprune.deploy(network, mask, example, seconds=0.05, **named), masked


def assert_same(deployed, masked, *inputs, **named):
    with torch.no_grad():
        found, structure = tree_flatten(deployed(*inputs, **named))
        expected, like = tree_flatten(masked(*inputs, **named))
    assert structure == like
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, torch.Tensor):
            scale = float(other.abs().max())
            assert torch.allclose(one, other, rtol=0, atol=1e-5 * scale)
        else:
            assert one == other


class Named(NamedTuple):
    scores: torch.Tensor
    kind: str


class Network(nn.Module):
    """Two layers, computed as ``code`` says."""

    def __init__(self, code, size=512):
        super().__init__()
        self.first, self.last = nn.Linear(size, size), nn.Linear(size, 256)
        self.code = code
        self.eval()

    def two(self, x):
        return self.last(torch.relu(self.first(x)))


class WithOptions(Network):
    def forward(self, x, labels=None, scale=1.0, *, train=False):
        scores = self.two(x) * scale
        if train:
            scores = scores + 1
        return scores if labels is None else (F.cross_entropy(scores, labels), scores)


class Structured(Network):
    def forward(self, inputs):
        a, b = inputs["parts"]
        h = torch.relu(self.first(a) + self.first(b[0]))
        return {"all": [Named(self.last(h), inputs["kind"])], "none": None}


class Pair(Network):
    def forward(self, inputs):
        return self.two(inputs[0] - inputs[1])


READS = {
    "dtype of a weight": lambda self, x: self.two(x.to(self.first.weight.dtype)),
    "device and shape": lambda self, x: self.two(
        x.to(self.first.weight.device) * self.first.weight.shape[0]
    ),
    "class": lambda self, x: self.two(x) if isinstance(self.first, nn.Linear) else None,
    "size": lambda self, x: self.two(x * self.first.in_features),
    "bias": lambda self, x: self.two(x) + self.last.bias,
    "weight": lambda self, x: self.two(F.linear(x, self.first.weight)),
    "first parameter": lambda self, x: self.two(x.to(next(self.parameters()).dtype)),
}


class Reading(Network):
    """Looks at values, so that layers are replaced one by one."""

    def forward(self, x):
        x = x / 10 if x.abs().max() > 1e6 else x
        return READS[self.code](self, x)


def test_an_argument_that_the_example_leaves_out_costs_no_speed():
    fast, masked = deployed(WithOptions(""), LARGE)
    assert fast.layers[0].kind == "sparse"
    assert_same(fast, masked, LARGE[:7])
    assert_same(fast, masked, x=LARGE)
    assert_same(pickle.loads(pickle.dumps(fast)), masked, LARGE, scale=2.5)
    with pytest.raises(PruningError, match=r"for labels = None, as in the example, but it got a T"):
        fast(LARGE, torch.zeros(64, dtype=torch.long))
    with pytest.raises(PruningError, match="for train = False, as in the example, but it got True"):
        fast(LARGE, train=True)


@pytest.mark.parametrize("by_name", [False, True])
def test_an_argument_that_the_example_gives(by_name):
    labels = torch.arange(64) % 16
    example = {"labels": labels, "train": True, "x": LARGE} if by_name else (LARGE, labels, 2)
    fast, masked = deployed(WithOptions(""), example)
    assert fast.layers[0].kind == "sparse"
    for scale in (2, 0.5):
        given = {"train": True} if by_name else {}
        assert_same(fast, masked, LARGE[:5], labels=labels[:5], scale=scale, **given)


def test_inputs_and_outputs_in_containers():
    example = {"parts": (LARGE, [LARGE + 1]), "kind": "a"}
    fast, masked = deployed(Structured(""), example)
    assert fast.layers[0].kind == "sparse"
    assert_same(fast, masked, example)
    assert fast(example)["all"][0].kind == "a"
    fast, masked = deployed(Pair(""), [LARGE, LARGE.flip(0)])
    assert fast.layers[0].kind == "sparse"
    assert_same(fast, masked, [LARGE[:3], LARGE[3:6]])


@pytest.mark.parametrize("code", READS)
def test_what_a_network_reads_of_a_replaced_layer_is_there(code):
    fast, masked = deployed(Reading(code), LARGE)
    assert "layer by layer" in fast.seconds, "it gives what the masked network gives"
    if code != "weight":  # that multiplies with the dense weight as well
        assert fast.layers[0].kind == "sparse"
        assert fast.layers[0].sparse_seconds > 0
    assert_same(fast, masked, LARGE)
    again = pickle.loads(pickle.dumps(fast))
    assert_same(again, masked, LARGE[:1])


def test_a_replaced_layer_computes_what_the_kernels_do_not_take_as_before():
    fast, masked = deployed(Reading("size"), LARGE)
    assert fast.layers[0].kind == "sparse"
    assert_same(fast, masked, LARGE.reshape(4, 16, 512))
    x = LARGE.clone().requires_grad_()
    fast(x).sum().backward()
    assert x.grad is not None


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(8, 8)
        self.alias = self.cell
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.cell.weight
        self.last = nn.Linear(8, 3)

    def forward(self, x, *more, mode="plain", **others):
        x = self.cell(input=x.relu_()) + self.alias(torch.tanh(self.cell(x)))
        return self.last(self.tied(x)), mode, *more


def hooked():
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    network[0].register_forward_hook(lambda module, args, out: out * 2)
    network[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return network


def with_(wrap):
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), wrap(nn.Linear(8, 3)))


NETWORKS = {
    "cell, alias and tie": Calls,
    "hooks": hooked,
    "weight norm": lambda: with_(parametrizations.weight_norm),
    "spectral norm": lambda: with_(parametrizations.spectral_norm),
    "spectral norm by a hook": lambda: with_(nn.utils.spectral_norm),
    "one layer": lambda: nn.Linear(8, 3),
    "in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3)).train(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_whose_layers_are_not_each_used_once(name):
    torch.manual_seed(0)
    network, example = NETWORKS[name](), SMALL.clone()
    before = copy.deepcopy(network.state_dict())
    fast, masked = deployed(network, example, density=0.5)
    assert torch.equal(example, SMALL), "the example is as it was"
    assert all(torch.equal(before[key], it) for key, it in network.state_dict().items())
    assert not any("left out" in note for note in fast.notes)
    assert_same(fast, masked, SMALL[:3].clone())
    assert fast.layers[0].kept > 0


def test_hooks_of_the_network_itself_run_whatever_is_fastest():
    """They are none of its graph, and may do nothing on the example."""
    network = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 3))
    network.register_forward_pre_hook(lambda module, args: (args[0] + (len(args[0]) == 3),))
    fast, masked = deployed(network, LARGE)
    assert "the network itself has hooks, which its graph would be without" in fast.notes
    assert_same(fast, masked, LARGE[:3])


def test_a_network_of_one_layer_is_sparse():
    fast, masked = deployed(nn.Linear(512, 512), LARGE)
    assert [(layer.name, layer.kind) for layer in fast.layers] == [("", "sparse")]
    assert_same(fast, masked, LARGE)


def test_a_network_without_weights():
    network = nn.Sequential(nn.ReLU())
    fast = lossprune.deploy(network, lossprune.Mask({}), SMALL, seconds=0.01)
    assert fast.layers == ()
    assert torch.equal(fast(SMALL), network(SMALL))


class Inspecting(nn.Module):
    """Takes no other layer than its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(512, 512)

    def forward(self, x):
        x = x / 10 if x.abs().max() > 1e6 else x
        if type(self.layer) is not nn.Linear:
            raise TypeError("a layer of\nanother class")
        return self.layer(x)


def test_a_candidate_that_raises_is_left_out_with_a_note():
    fast, masked = deployed(Inspecting(), LARGE)
    assert_same(fast, masked, LARGE)
    assert "layer by layer was left out: TypeError: a layer of another class" in fast.notes
    assert list(fast.seconds) == ["masked", "compacted"]


@pytest.mark.parametrize("example", [SMALL[:, :5], (SMALL, 1), {"y": SMALL}, None])
def test_an_example_that_the_network_does_not_take_is_one_sentence(example):
    network = nn.Sequential(nn.Linear(8, 3))
    with pytest.raises(PruningError, match=r"^Sequential does not run on example: ") as raised:
        lossprune.deploy(network, lossprune.Mask({}), example)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


class Attention(nn.Module):
    """As in vision transformers: a mask that may be given, heads split by reshape."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x, attn_mask=None):
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = q @ k.transpose(-1, -2)
        if attn_mask is not None:
            scores = scores + attn_mask
        x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, width)
        return self.head(self.out(x).mean(1))


class ConvNext(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.depth = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("build", "shape"), [(Attention, (2, 5, 32)), (ConvNext, (2, 3, 32, 32))], ids=str
)
def test_blocks_of_vision_networks(build, shape):
    torch.manual_seed(0)
    x = torch.randn(*shape)
    fast, masked = deployed(build().eval(), x, density=0.1)
    assert not any("left out" in note or "followed" in note for note in fast.notes)
    assert_same(fast, masked, x)
