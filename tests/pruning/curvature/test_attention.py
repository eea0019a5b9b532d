"""Attention, folded examples and weights stored the other way round; a language model whole."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lossprune
from lossprune.pruning import PruningError

N, TOKENS, WIDTH, CLASSES = 5, 3, 4, 3


class Conv1D(nn.Module):
    """y = x W + b with W (inputs, outputs), examples and tokens folded, as GPT-2 has it."""

    def __init__(self, inputs, outputs, product):
        super().__init__()
        self.layer = nn.Linear(outputs, inputs, bias=False)  # a prunable weight of that shape
        self.bias = nn.Parameter(torch.randn(outputs))
        self.product = product

    def forward(self, x):
        return self.product(self.bias, x, self.layer.weight)


PRODUCTS = {
    "addmm": lambda b, x, w: torch.addmm(b, x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], -1),
    "mm": lambda b, x, w: torch.mm(x.flatten(0, 1), w).view(*x.shape[:-1], -1) + b,
    "matmul": lambda b, x, w: torch.matmul(x, w) + b,
    "x @ w": lambda b, x, w: x @ w + b,
}


class Tokens(nn.Module):
    """A layer between two others, on tokens that are mixed before and after."""

    def __init__(self, layer, width=WIDTH):
        super().__init__()
        self.before = nn.Linear(2, WIDTH)
        self.layer = layer
        self.after = nn.Linear(width, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.before(x))
        h = torch.tanh(self.layer(h + h.cumsum(1)))
        return self.after(h.mean(1))


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, TOKENS, 2, dtype=torch.float64, generator=generator)
    return x, torch.arange(N) % CLASSES


def check(model, matches, **settings):
    x, y = data()
    statistics = lossprune.measure(model, [(x, y)], **settings)
    examples = [((a[None],), {}, t) for a, t in zip(x, y, strict=True)]
    matches(statistics, model, examples, F.cross_entropy, N)
    return statistics


@pytest.mark.parametrize("product", ["addmm", "mm", "matmul", "x @ w"])
@pytest.mark.parametrize("memory", [1, None])
@pytest.mark.parametrize("shape", [(WIDTH, 6), (WIDTH, 300)])
def test_weights_stored_the_other_way_round(product, memory, shape, matches):
    torch.manual_seed(0)
    model = Tokens(Conv1D(*shape, PRODUCTS[product]), shape[1]).double()
    statistics = check(model, matches, memory=memory)
    assert statistics.ggn_diagonal["layer.layer.weight"].shape == shape


def test_a_mask_on_a_weight_stored_the_other_way_round():
    """Weights that are kept get what they get without following the mask."""
    torch.manual_seed(0)
    model = Tokens(Conv1D(WIDTH, 6, PRODUCTS["addmm"]), 6).double()
    mask = lossprune.prune(model, "MP", sparsity=0.5).mask
    found = lossprune.measure(model, [data()], mask=mask)
    mask.apply_(model)
    expected = lossprune.measure(model, [data()])
    for name, kept in mask.items():
        torch.testing.assert_close(
            found.ggn_diagonal[name][kept], expected.ggn_diagonal[name][kept], rtol=1e-10, atol=0
        )


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("memory", [1, None])
def test_examples_folded_with_something_else(kind, memory, matches):
    """As video networks fold frames, and windowed attention windows, into the first dimension."""

    class Folded(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, h):
            n, tokens, width = h.shape
            rows = h.reshape(n * tokens, width)
            if kind == "conv1d":
                rows = self.layer(rows[:, None]).flatten(1)
            elif kind == "conv2d":
                rows = self.layer(rows.view(-1, 1, 2, 2)).flatten(1)
            else:
                rows = self.layer(rows)
            return rows.view(n, tokens, -1)

    layers = {
        "linear": (nn.Linear(WIDTH, 6), 6),
        "conv1d": (nn.Conv1d(1, 2, 2), 6),
        "conv2d": (nn.Conv2d(1, 4, 2, padding=1, groups=1), 36),
    }
    torch.manual_seed(0)
    layer, width = layers[kind]
    check(Tokens(Folded(layer), width).double(), matches, memory=memory)


def test_examples_folded_with_the_tokens_first(matches):
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, h):
            n, tokens, _ = h.shape
            return self.layer(h.transpose(0, 1).reshape(tokens * n, -1)).view(tokens, n, -1).mT.mT

    class Network(Tokens):
        def forward(self, x):
            return self.after(self.layer(self.before(x)).mean(0))

    check(Network(Folded()).double(), matches)


class Attention(nn.Module):
    def __init__(self, batch_first, causal, **settings):
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, **settings)
        self.batch_first, self.causal = batch_first, causal

    def forward(self, h):
        h = h if self.batch_first else h.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(TOKENS).to(h) if self.causal else None
        h, _ = self.layer(h, h, h, attn_mask=mask, need_weights=not self.causal)
        return h if self.batch_first else h.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention(batch_first, causal, bias, matches):
    torch.manual_seed(0)
    model = Tokens(Attention(batch_first, causal, bias=bias)).double()
    if bias:
        nn.init.normal_(model.layer.layer.out_proj.bias)
    statistics = check(model, matches)
    assert "layer.layer.out_proj.weight" in statistics.ggn_diagonal
    plain = F.cross_entropy(model.eval()(data()[0]), data()[1])
    assert statistics.loss == pytest.approx(float(plain.detach()), rel=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder(norm_first, batch_first, matches):
    """Also where torch would take a short cut through the layer in evaluation mode."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(
                WIDTH, 2, 5, norm_first=norm_first, batch_first=batch_first
            )
            self.layer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, h):
            h = h if batch_first else h.transpose(0, 1)
            h = self.layer(h)
            return h if batch_first else h.transpose(0, 1)

    torch.manual_seed(0)
    model = Tokens(Encoder()).double()
    statistics = check(model, matches)
    assert len(statistics.ggn_diagonal) == 10
    found = lossprune.prune(model, "QM", sparsity=0.5, data=[data()], stages=2)
    assert found.stages[0].loss_before == pytest.approx(statistics.loss, rel=1e-12)


def test_a_weight_used_in_a_list_is_seen():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.kept = [self.fc.weight]

        def forward(self, x):
            return F.linear(x, torch.cat([self.kept[0], self.kept[0]])[:2])

    with pytest.raises(PruningError, match=r"'fc\.weight'.*elsewhere"):
        lossprune.measure(Listed(), [(torch.zeros(4, 3), torch.arange(4) % 2)])
