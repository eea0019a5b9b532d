"""Weights that are pruned by default beside linear layers and convolutions: exact, and quick."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lossprune

N, TOKENS, WIDTH, CLASSES = 5, 3, 4, 3


def data(*shape: int):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, *shape, dtype=torch.float64, generator=generator), torch.arange(N) % 3


class Counted(nn.Module):
    """Around a layer; counts how often it is called."""

    def __init__(self, layer, use, width):
        super().__init__()
        self.layer, self.use, self.calls = layer, use, 0
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        self.calls += 1
        return self.head(torch.tanh(self.use(self.layer, x)))


def check(agrees, layer, use, width, shape=(TOKENS, WIDTH), *, quick=True, **settings):
    torch.manual_seed(0)
    model = Counted(layer(), use, width).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    x, y = data(*shape)
    agrees(lossprune.measure(model, [(x, y)], **settings), model, x, y)
    # A few examples, then all: one by one would be N of them.
    assert (model.calls <= 2) == (quick and not settings)
    mask = lossprune.prune(model, "MP", sparsity=0.5).mask
    agrees(lossprune.measure(model, [(x, y)], mask=mask), model, x, y, mask=mask)


@pytest.mark.parametrize("memory", [{}, {"memory": 1}], ids=["memory", "little"])
@pytest.mark.parametrize(
    ("kind", "settings", "width"),
    [
        (nn.LSTM, {}, 3),
        (nn.LSTM, {"bidirectional": True, "num_layers": 2, "dropout": 0.5}, 6),
        (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bias": False}, 2),
        (nn.GRU, {"batch_first": False, "bidirectional": True}, 6),
        (nn.GRU, {"bias": False}, 3),
        (nn.RNN, {"num_layers": 2}, 3),
        (nn.RNN, {"nonlinearity": "relu"}, 3),
    ],
)
def test_recurrent_layers(kind, settings, width, memory, agrees):
    settings = {"batch_first": True} | settings
    first = settings["batch_first"]

    def use(layer, x):
        out, last = layer(x if first else x.transpose(0, 1))
        last = last if isinstance(last, torch.Tensor) else last[0] + last[1].sum(-1, keepdim=True)
        return out[:, -1] if first else out[0] + out[-1] + torch.cat([*last], -1)

    check(agrees, lambda: kind(WIDTH, 3, **settings), use, width, **memory)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind, agrees):
    def use(cell, x):
        state = None
        for token in range(TOKENS):
            state = cell(x[:, token], state)
        return torch.cat(state, -1) if isinstance(state, tuple) else state

    check(agrees, lambda: kind(WIDTH, 3), use, 6 if kind is nn.LSTMCell else 3)


def test_a_packed_sequence(agrees):
    def use(layer, x):
        ends = (x[:, 0, 0] > 0).long() + 2
        packed = nn.utils.rnn.pack_padded_sequence(x, ends, True, enforce_sorted=False)
        return layer(packed)[1][-1]

    torch.manual_seed(0)
    model = Counted(nn.GRU(WIDTH, 3, batch_first=True), use, 3).double()
    x, y = data(TOKENS, WIDTH)
    found = lossprune.measure(model, [(x, y)])
    other = Counted(model.layer, use, 3).double()
    other.head = model.head
    expected = [lossprune.measure(other, [(x[n : n + 1], y[n : n + 1])]) for n in range(N)]
    for name, h in found.ggn_diagonal.items():
        mean = sum(one.ggn_diagonal[name] for one in expected) / N
        torch.testing.assert_close(h, mean, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("which", "settings"),
    [
        ("xxx", {}),
        ("xyy", {}),
        ("xyz", {"bias": False}),
        ("xyz", {"add_bias_kv": True, "add_zero_attn": True}),
        ("xww", {"kdim": 2, "vdim": 2}),
        ("xww", {"kdim": 2, "vdim": 2, "bias": False}),
    ],
)
def test_attention(which, settings, batch_first, agrees):
    def use(layer, x):
        given = {"x": x, "y": x.sin(), "z": x.cos(), "w": x[..., :2].exp()}
        given = {key: part if batch_first else part.transpose(0, 1) for key, part in given.items()}
        out, scores = layer(*(given[key] for key in which))
        out = out if batch_first else out.transpose(0, 1)
        return out.mean(1) + scores.mean((1, 2))[:, None]

    layer = lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, **settings)  # noqa: E731
    check(agrees, layer, use, WIDTH)


@pytest.mark.parametrize("chosen", ["layer.in_proj_weight", "layer.out_proj.weight"])
def test_attention_of_which_a_part_is_chosen(chosen, agrees):
    torch.manual_seed(0)
    use = lambda layer, x: layer(x, x, x)[0].mean(1)  # noqa: E731
    model = Counted(nn.MultiheadAttention(WIDTH, 2, batch_first=True), use, WIDTH).double()
    x, y = data(TOKENS, WIDTH)
    agrees(lossprune.measure(model, [(x, y)], parameters=chosen), model, x, y)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.ConvTranspose1d(4, 2, 3), (4, 3)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
         (4, 2, 3)),
        (lambda: nn.ConvTranspose2d(4, 2, (2, 3), dilation=(1, 2), padding=(1, 0)), (4, 2, 3)),
        (lambda: nn.ConvTranspose2d(4, 2, 2), (4, 1, 1)),
        (lambda: nn.ConvTranspose3d(2, 1, 2, stride=2), (2, 1, 2, 2)),
    ],
)  # fmt: skip
def test_transposed_convolutions(layer, shape, agrees):
    width = layer()(data(*shape)[0].float()).flatten(1).shape[1]
    check(agrees, layer, lambda layer, x: layer(x).flatten(1), width, shape)


def test_a_transposed_convolution_that_pads_its_outputs_by_a_stride(agrees):
    layer = lambda: nn.ConvTranspose1d(2, 2, 2, dilation=2, output_padding=1)  # noqa: E731
    check(agrees, layer, lambda layer, x: layer(x).flatten(1), 12, (2, 3), quick=False)


def test_bilinear(agrees):
    use = lambda layer, x: layer(x[:, 0], x[:, 1])  # noqa: E731
    check(agrees, lambda: nn.Bilinear(WIDTH, WIDTH, 3), use, 3, quick=False)


class Experts(nn.Module):
    """Two of three experts for every token, each a matrix of one parameter."""

    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.gate = nn.Linear(WIDTH, 3)
        self.up = nn.Parameter(torch.empty(3, 5, WIDTH))
        self.down = nn.Parameter(torch.empty(3, WIDTH, 5))

    def forward(self, x):
        rows = x.flatten(0, 1)
        weights, chosen = self.gate(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for number in range(self.num_experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            hidden = F.silu(F.linear(rows[row], self.up[number]))
            part = F.linear(hidden, self.down[number]) * weights[row, place, None]
            out = out.index_add(0, row, part)
        return out.view_as(x)


def test_experts(agrees):
    def each(layer, x):
        return layer(x).mean(1)

    torch.manual_seed(0)
    model = Counted(Experts(), each, WIDTH).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x, y = data(TOKENS, WIDTH)
    found = lossprune.measure(model, [(x, y)])
    assert set(found.ggn_diagonal) == {"layer.up", "layer.down", "layer.gate.weight", "head.weight"}
    squares = {name: torch.zeros_like(h) for name, h in found.ggn_diagonal.items()}
    named = dict(model.named_parameters())
    for n in range(N):
        z = model(x[n : n + 1])[0]
        p = z.softmax(0).detach()
        rows = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(
                part, [named[name] for name in squares], retain_graph=True)])
            for part in z
        ])  # fmt: skip
        h = torch.einsum("ci,cd,di->i", rows, p.diag() - p.outer(p), rows)
        sizes = [total.numel() for total in squares.values()]
        for total, part in zip(squares.values(), h.split(sizes), strict=True):
            total += part.view_as(total) / N
    for name, h in found.ggn_diagonal.items():
        torch.testing.assert_close(h, squares[name], rtol=1e-9, atol=1e-12 * float(h.max()))
