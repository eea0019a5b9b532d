"""Weights in any use: those of no layer, and layers whose rows are not the examples."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lossprune


def batch(*shape: int, examples: int = 8, classes: int = 2):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, *shape, dtype=torch.float64, generator=generator)
    return inputs, torch.arange(examples) % classes


class MatrixProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.tanh(x @ self.fc.weight.T))


class PartlyMatrixProduct(MatrixProduct):
    def forward(self, x):
        return self.out(torch.tanh(self.fc(x)) + x @ self.fc.weight.T)


class ScaledWeight(MatrixProduct):
    def forward(self, x):
        return self.out(torch.tanh(F.linear(x, 2 * self.fc.weight)))


class WeightNormPenalty(MatrixProduct):
    def forward(self, x):
        return self.out(torch.tanh(self.fc(x))) * self.fc.weight.norm()


class TransposedConvolution(nn.Module):
    """The decoder's kernel is the encoder's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        x = torch.tanh(self.conv(x[:, None, :, None].expand(-1, 1, 3, 3)))
        return F.conv_transpose2d(x, self.conv.weight).flatten(1)[:, :2]


@pytest.mark.parametrize("network", [MatrixProduct, WeightNormPenalty])
@pytest.mark.parametrize("criterion", ["MP", "LM"])
def test_criteria_without_curvature_take_any_use(network, criterion):
    mask = lossprune.prune(network().double(), criterion, sparsity=0.5, data=[batch(3)]).mask
    assert mask.removed == 10


class Autoencoder(nn.Module):
    """The decoder's weight is the encoder's, the other way round."""

    def __init__(self):
        super().__init__()
        self.code = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.code(x)) @ self.code.weight


class ScaledProduct(MatrixProduct):
    def forward(self, x):
        return self.out(torch.addmm(self.fc.bias, x, self.fc.weight.T, alpha=2))


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x).mean(1))


class SequenceFirst(nn.Module):
    """Tokens before examples inside; the answer is read at the first token, or the mean."""

    def __init__(self, pool):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.pool = pool

    def forward(self, x):
        return self.pool(self.a(x.transpose(0, 1)))


@pytest.mark.parametrize("memory", [1, None])
@pytest.mark.parametrize("estimator", ["exact", "tolerance:0"])
@pytest.mark.parametrize(
    "network",
    [MatrixProduct, PartlyMatrixProduct, ScaledWeight, WeightNormPenalty, TransposedConvolution,
     Autoencoder, ScaledProduct],
)  # fmt: skip
def test_curvature_is_the_oracles(network, estimator, memory, agrees):
    torch.manual_seed(0)
    model, (x, y) = network().double(), batch(3)
    found = lossprune.measure(model, [(x, y)], memory=memory, estimator=estimator)
    agrees(found, model, x, y)


def test_a_weight_tied_to_an_embedding(agrees):
    torch.manual_seed(0)
    model = TiedEmbedding().double()
    x, y = torch.arange(12).reshape(4, 3) % 5, torch.arange(4)
    agrees(lossprune.measure(model, [(x, y)]), model, x, y)


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "pool", [lambda h: h.mean(0), lambda h: h[0], lambda h: h[-1]], ids=["mean", "first", "last"]
)
def test_tokens_before_examples(tokens, pool, agrees):
    torch.manual_seed(0)
    model, (x, y) = SequenceFirst(pool).double(), batch(tokens, 3)
    agrees(lossprune.measure(model, [(x, y)]), model, x, y)


def test_under_a_mask(agrees):
    torch.manual_seed(0)
    model, (x, y) = ScaledWeight().double(), batch(3)
    mask = lossprune.prune(model, "MP", sparsity=0.5).mask
    agrees(lossprune.measure(model, [(x, y)], mask=mask), model, x, y, mask=mask)


def test_a_batch_that_cannot_be_cut():
    """Each example's part is sent backwards through the graph of all."""
    torch.manual_seed(0)
    model, (x, y) = MatrixProduct().double(), batch(3)
    forward = lambda model, names: (model(x[names]), y[names])  # noqa: E731
    whole = lossprune.measure(model, [list(range(8))], forward=forward)
    cut = lossprune.measure(model, [(x, y)])
    for name, h in cut.ggn_diagonal.items():
        torch.testing.assert_close(whole.ggn_diagonal[name], h, rtol=1e-12, atol=1e-15)


def test_labels_are_drawn_once_for_the_layers_and_the_others():
    """By the same columns, a product written out has the curvature of the layer that it is."""
    torch.manual_seed(0)
    model, (x, y) = MatrixProduct().double(), batch(3)
    draw = lambda model: lossprune.measure(  # noqa: E731
        model, [(x, y)], estimator="monte-carlo:3", generator=torch.Generator().manual_seed(1)
    )
    of_product = draw(model)
    model.fc.bias.data.zero_()
    model.forward = lambda x: model.out(torch.tanh(model.fc(x)))
    for name, h in draw(model).ggn_diagonal.items():
        torch.testing.assert_close(of_product.ggn_diagonal[name], h, rtol=1e-10, atol=1e-15)


def test_an_example_that_cannot_be_alone_is_told():
    class Fixed(MatrixProduct):
        def forward(self, x):
            return super().forward(x.view(4, 3))

    with pytest.raises(lossprune.PruningError, match=r"'fc\.weight'.*alone could not be run"):
        lossprune.measure(Fixed().double(), [batch(3, examples=4)])


class Tokens(nn.Module):
    """Rows of a table in several uses, the head among them where it is tied."""

    def __init__(self, tied, padding):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))
        self.mix = nn.Linear(4, 4)
        if not tied:
            self.out = nn.Linear(4, 5, bias=False)
        self.tied, self.padding = tied, padding

    def forward(self, x):
        h = F.embedding(x, self.table, self.padding)
        h = torch.tanh(self.mix(h) + h.mean(1, keepdim=True)) * F.embedding(x.flip(1), self.table)
        return F.linear(h, self.table) if self.tied else self.out(h)


@pytest.mark.parametrize(
    ("estimator", "memory"), [("exact", 1), ("exact", None), ("tolerance:0", None)]
)
@pytest.mark.parametrize(("tied", "padding"), [(True, None), (True, 1), (False, -1)])
def test_rows_that_are_looked_up(tied, padding, estimator, memory, matches):
    """Several times by an example, in several uses, beside those of a head."""
    torch.manual_seed(0)
    model = Tokens(tied, padding).double()
    x = torch.randint(5, (6, 3), generator=torch.Generator().manual_seed(0))
    statistics = lossprune.measure(
        model, [(x, x.roll(1, 1))], loss="token_cross_entropy", estimator=estimator,
        parameters=["table", "mix"], memory=memory,
    )  # fmt: skip
    each = [((x[n : n + 1],), {}, x.roll(1, 1)[n]) for n in range(6)]
    matches(statistics, model, each, lambda z, t: F.cross_entropy(z, t, reduction="sum"), 18)
