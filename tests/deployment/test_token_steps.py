"""Norms, attention and what is around them as steps of the kernels, beside linear layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossprune
from lossprune.deployment.candidates import Candidates
from lossprune.deployment.sparse.network import SparseNetwork
from lossprune.deployment.sparse.parts import sparse_networks
from lossprune.deployment.ways import add_sparse_ways
from lossprune.deployment.whole import all_sparse
from lossprune.kernels.compiler import compiler_available
from lossprune.pruning import PruningError

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

RELATIVE = 2e-6  # of the largest number: single precision through two layers


def pruned(model, density=0.3):
    torch.manual_seed(1)
    weights = lossprune.Mask.dense(model.eval())
    kept = {name: torch.rand(weight.shape) < density for name, weight in weights.items()}
    return model, lossprune.Mask(kept)


def deployed(model, *example, density=0.3):
    """All that the kernels know left to them, and the masked network in double precision."""
    model, mask = pruned(model, density)
    network, _ = all_sparse(model, mask, example)
    return network, mask.apply_(copy.deepcopy(model)).double()


def assert_same(found, expected, *inputs):
    with torch.no_grad():
        one = found(*inputs)
        two = expected(*[tensor.double() for tensor in inputs])
    assert one.shape == two.shape
    assert torch.allclose(
        one.double(), two, rtol=0, atol=RELATIVE * two.abs().max().item() if two.numel() else 0,
        equal_nan=True,
    )  # fmt: skip


def operations(network):
    parts = sparse_networks(network)
    return [type(step.operation).__name__ for part in parts for step in part.steps]


class Projections(nn.Module):
    """Queries, keys and values of layers of their own, in heads."""

    def __init__(self, size, heads, key_heads=None):
        super().__init__()
        self.heads, self.fewer = heads, key_heads or heads
        shared = size // heads * self.fewer
        self.q, self.out = nn.Linear(size, size), nn.Linear(size, size)
        self.k, self.v = nn.Linear(size, shared), nn.Linear(size, shared)

    def split(self, x):
        pairs = ((self.q, self.heads), (self.k, self.fewer), (self.v, self.fewer))
        return [layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer, heads in pairs]

    def forward(self, x):
        return self.out(self.mixed(*self.split(x)).transpose(1, 2).flatten(2))

    def mixed(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Written(Projections):
    """By hand, and with a look at its input as torchvision's networks have it."""

    def forward(self, x):
        torch._assert(x.dim() == 3, f"expected (n, tokens, size), got {x.shape}")
        return super().forward(x)

    def mixed(self, q, k, v):
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


class Causal(Projections):
    def mixed(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)


class Shared(Projections):
    def __init__(self, size, heads):
        super().__init__(size, heads, heads // 2)

    def mixed(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Fused(nn.Module):
    """One layer for queries, keys and values, as vision transformers have it."""

    def __init__(self, size, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        n, tokens, size = x.shape
        whole = self.qkv(x).reshape(n, tokens, 3, self.heads, size // self.heads)
        q, k, v = whole.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        return self.out(mixed.transpose(1, 2).reshape(n, tokens, size))


class Chunked(Fused):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (one.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for one in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.permute(0, 2, 1, 3).contiguous().view(x.shape))


class OfTorch(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Block(nn.Module):
    def __init__(self, attention, size=24, heads=4, norm=nn.LayerNorm):
        super().__init__()
        self.before, self.between = norm(size, eps=1e-6), norm(size, eps=1e-5)
        self.attention = attention(size, heads)
        self.up, self.down = nn.Linear(size, 50), nn.Linear(50, size)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x):
        x = x + self.gain * self.attention(self.before(x))
        return x + self.down(F.gelu(self.up(self.between(x))))


ATTENTIONS = (Projections, Written, Causal, Shared, Fused, Chunked, OfTorch)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_blocks_are_one_call_of_the_kernels(attention):
    torch.manual_seed(0)
    norm = nn.RMSNorm if attention is Causal else nn.LayerNorm
    model = nn.Sequential(Block(attention, norm=norm), Block(attention, norm=norm))
    network, expected = deployed(model, torch.randn(2, 5, 24))
    assert isinstance(network.network, SparseNetwork)
    assert operations(network).count("TokenAttention") == 2
    for n, tokens in ((2, 5), (1, 1), (3, 7), (40, 3), (1, 197)):
        assert_same(network, expected, torch.randn(n, tokens, 24))


@pytest.mark.parametrize("tokens", [1, 7, 16, 50, 64, 127, 128, 129, 200, 300, 512])
@pytest.mark.parametrize("causal", [False, True])
def test_any_number_of_tokens_and_examples(tokens, causal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(10), (Causal if causal else Projections)(10, 2))
    network, expected = deployed(model, torch.randn(2, 5, 10))
    for n in (1, 2, 19):
        x = torch.randn(2 * tokens, 10, n)[::2].permute(2, 0, 1)  # neither whole nor in order
        assert_same(network, expected, x)


def test_no_examples_or_tokens():
    torch.manual_seed(0)
    network, expected = deployed(Projections(10, 2), torch.randn(2, 5, 10))
    for shape in ((0, 5, 10), (3, 0, 10)):
        assert_same(network, expected, torch.randn(shape))


def test_threads_share_one_long_example_and_take_many_short_ones():
    torch.manual_seed(0)
    network, expected = deployed(nn.Sequential(Block(Fused), Block(Fused)), torch.randn(2, 5, 24))
    (part,) = sparse_networks(network)
    part.retune_(type(part.tuning)(shared=0))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for n, tokens in ((1, 300), (1, 4), (7, 60), (2, 130)):
            assert_same(network, expected, torch.randn(n, tokens, 24))
    finally:
        torch.set_num_threads(before)


def test_scores_are_far_apart_and_alike():
    """Weights of attention beyond the range of exp, and all the same."""
    torch.manual_seed(0)
    network, expected = deployed(Projections(8, 2), torch.randn(2, 5, 8), density=1.0)
    for scale in (0.0, 30.0, 1000.0):
        assert_same(network, expected, scale * torch.randn(2, 40, 8))
    x = torch.randn(1, 40, 8)
    x[0, 3, 2] = torch.nan
    assert network(x).isnan().all()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("features", [1, 5, 64, 1000])
def test_norms_of_rows(norm, features):
    torch.manual_seed(0)
    model = nn.Sequential(norm(features, eps=1e-5), nn.Linear(features, 9), norm(9, eps=1e-6))
    network, expected = deployed(model, torch.randn(3, features), density=1.0)
    assert isinstance(network.network, SparseNetwork)
    for rows in (1, 4, 5, 20, 130):
        for mean in (0.0, 100.0):
            x = mean + torch.randn(rows, features)
            with torch.no_grad():
                found, exact = network(x).double(), expected(x.double())
                loss = (copy.deepcopy(expected).float()(x).double() - exact).abs().max()
            assert (found - exact).abs().max() <= 2 * loss + RELATIVE * exact.abs().max()


class Vision(nn.Module):
    """As in timm: patches, a token for the class, places, and that token's answer."""

    def __init__(self, pick):
        super().__init__()
        self.patches, self.pick = nn.Conv2d(3, 24, 4, 4), pick
        self.token = nn.Parameter(torch.randn(1, 1, 24))
        self.places = nn.Parameter(torch.randn(1, 10, 24))
        self.blocks = nn.Sequential(Block(Fused), Block(Fused))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.pick(self.norm(self.blocks(x))))


PICKS = {
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1, :],
    "selected": lambda x: x.select(1, 2),
    "mean": lambda x: x.mean(1),
}


@pytest.mark.parametrize("pick", PICKS)
def test_vision_transformers(pick):
    torch.manual_seed(0)
    network, expected = deployed(Vision(PICKS[pick]), torch.randn(2, 3, 12, 12))
    assert isinstance(network.network, SparseNetwork)
    assert {"TokenPatches", "TokenShift", "TokenMean" if pick == "mean" else "TokenPick"} < {
        *operations(network)
    }
    for n in (2, 1, 33, 0):
        assert_same(network, expected, torch.randn(n, 3, 12, 12))
    assert_same(network, expected, torch.randn(3, 2, 12, 24).transpose(0, 1)[..., ::2])
    with pytest.raises(
        PruningError, match=r"images of shape \(3, 12, 12\) here, got \(2, 3, 8, 12"
    ):
        network(torch.randn(2, 3, 8, 12))


class Cut(nn.Module):
    """Patches that are not square, of images that they do not fill, whose number is asked for."""

    def __init__(self, kernel=(2, 3), **options):
        super().__init__()
        self.patches = nn.Conv2d(3, 10, kernel, **{"stride": kernel, "bias": False, **options})
        self.mix = Projections(10, 2)

    def forward(self, x):
        x = self.patches(x)
        x = x.reshape(x.size(0), x.size(1), -1).permute(0, 2, 1)
        return self.mix(x).reshape(x.size(0), -1, 10)


@pytest.mark.parametrize(
    ("options", "cut"), [({}, True), ({"stride": (2, 2)}, False), ({"padding": 1}, False)]
)
def test_convolutions_of_patches(options, cut):
    torch.manual_seed(0)
    network, expected = deployed(Cut(**options), torch.randn(2, 3, 7, 8))
    assert ("TokenPatches" in operations(network)) == cut
    for n in (2, 1, 40):
        assert_same(network, expected, torch.randn(n, 3, 7, 8))


class Summed(nn.Module):
    """Two inputs whose tokens are added, and one that has tokens of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.memory = (nn.Linear(10, 10) for _ in range(3))
        self.own, self.other = Projections(10, 2), Projections(10, 2)

    def forward(self, x, y, memory):
        x = self.own(self.first(x) + self.second(y))
        q, _, _ = self.other.split(x)
        _, k, v = self.other.split(self.memory(memory))
        return self.other.mixed(q, k, v).transpose(1, 2).flatten(2)


def test_tokens_of_several_inputs_are_those_that_are_added():
    torch.manual_seed(0)
    network, expected = deployed(Summed(), *[torch.randn(2, 5, 10) for _ in range(3)])
    assert operations(network).count("TokenAttention") == 1, "the other is of two inputs' tokens"
    for tokens, own in ((5, 5), (4, 9), (200, 3)):
        one, two, memory = (torch.randn(3, count, 10) for count in (tokens, tokens, own))
        assert_same(network, expected, one, two, memory)
    assert_same(network, expected, one, two[:, :1], memory)


LEFT = {
    "a mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[..., :1] * 0),
    "read as heads": lambda q, k, v: F.scaled_dot_product_attention(q, k, v).cos(),
    "tokens as heads": lambda q, k, v: F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2),
    "by the tokens": lambda q, k, v: (q @ k.transpose(2, 3) / q.shape[2]).softmax(-1) @ v,
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_other_attention_is_left_to_torch(name):
    torch.manual_seed(0)
    model = Projections(10, 5)
    model.mixed = LEFT[name]
    network, expected = deployed(model, torch.randn(2, 5, 10))
    assert "TokenAttention" not in operations(network)
    assert operations(network).count("SparseConvolution") == 4
    assert_same(network, expected, torch.randn(2, 5, 10))


class Padded(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            12, 2, 20, batch_first=batch_first, norm_first=not batch_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(12), enable_nested_tensor=False)

    def forward(self, x, padding=None, mask=None):
        return self.encoder(x, mask, padding)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder_is_one_call_with_padding_or_without(batch_first):
    torch.manual_seed(0)
    network, expected = deployed(Padded(batch_first), torch.randn(2, 5, 12))
    assert isinstance(network.network, SparseNetwork)
    for shape in ((2, 5, 12), (3, 70, 12), (70, 3, 12), (0, 4, 12)):
        assert_same(network, expected, torch.randn(shape))
    padding = torch.arange(5) >= torch.tensor([[5], [3], [1]])
    x = torch.randn(*(3, 5) if batch_first else (5, 3), 12)
    # With its batch first, torch's own fast path takes what is added for what is left out.
    for kind in (padding,) if batch_first else (padding, -4.0 * padding):
        network, expected = deployed(Padded(batch_first), x, kind)
        assert operations(network).count("TokenAttention") == 2
        with torch.no_grad():
            assert torch.allclose(network(x, kind), expected.float()(x, kind), atol=1e-5)


def test_examples_that_are_padded_throughout_are_as_torchs():
    torch.manual_seed(0)

    class Bare(Projections):
        def forward(self, x, kept):
            q, k, v = self.split(x)
            mixed = F.scaled_dot_product_attention(q, k, v, kept[:, None, None])
            return self.out(mixed.transpose(1, 2).flatten(2))

    x, kept = torch.randn(3, 20, 10), torch.tensor([[True], [False], [True]]).expand(3, 20)
    network, expected = deployed(Bare(10, 2), x, kept)
    assert operations(network).count("TokenAttention") == 1
    with torch.no_grad():
        assert torch.allclose(network(x, kept), expected.float()(x, kept), atol=1e-6)


def test_attention_that_is_torchs_is_told():
    torch.manual_seed(0)
    model, mask = pruned(Padded(), 0.1)
    example = torch.randn(2, 5, 12), None, torch.zeros(5, 5)
    notes = lossprune.deploy(model, mask, example, seconds=0.02).notes
    assert any(
        note == "attention is torch's in 2 places, as its masks are no numbers of examples and keys"
        for note in notes
    )


def test_deployed_with_plans_and_layers():
    torch.manual_seed(0)
    model, mask = pruned(Vision(PICKS["mean"]), 0.1)
    example = torch.randn(4, 3, 12, 12)
    found = lossprune.deploy(model, mask, example, seconds=0.05)
    assert "sparse" in found.seconds
    assert not any("left out" in note for note in found.notes)
    assert next(layer for layer in found.layers if layer.name == "patches").dense_seconds > 0
    expected = mask.apply_(copy.deepcopy(model)).double()
    assert_same(found, expected, example)
    assert_same(lossprune.deploy(model, mask, example, seconds=0.05), expected, example)
    with torch.no_grad():
        ways, _ = add_sparse_ways(Candidates(mask.apply_(model), example, 0.05), model)
    assert isinstance(ways["sparse"].network.network, SparseNetwork)


def test_calls_that_do_not_fit_are_refused():
    torch.manual_seed(0)
    network, _ = deployed(nn.Sequential(Block(Fused)), torch.randn(2, 5, 24))
    with pytest.raises(PruningError, match=r"takes \(n, tokens, features\), got shape \(5, 24\)"):
        network(torch.randn(5, 24))
    with pytest.raises(PruningError, match="takes 24 features, its input has 23"):
        network(torch.randn(2, 5, 23))

    class Placed(Projections):
        def __init__(self):
            super().__init__(10, 2)
            self.places = nn.Parameter(torch.randn(6, 10))

        def forward(self, x):
            return super().forward(self.q(x) + self.places)[:, 5]

    network, _ = deployed(Placed(), torch.randn(2, 6, 10))
    with pytest.raises(PruningError, match="adds numbers for 6 tokens, the input has 4"):
        network(torch.randn(2, 4, 10))

    class Third(Projections):
        def forward(self, x):
            return super().forward(x)[:, 2]

    network, _ = deployed(Third(10, 2), torch.randn(2, 6, 10))
    with pytest.raises(PruningError, match="takes a token by its place, which 2 tokens do not"):
        network(torch.randn(2, 2, 10))
