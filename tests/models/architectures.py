"""Small networks of the kinds that people have: each a few lines, eight features, three classes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

CLASSES = 3
FEATURES = 8
TOKENS = 5
IMAGE = (3, 8, 8)

Inputs = Callable[[int, torch.Generator], tuple[Any, ...]]


def vectors(n: int, generator: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(n, FEATURES, generator=generator),)


def images(n: int, generator: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(n, *IMAGE, generator=generator),)


def sequences(n: int, generator: torch.Generator) -> tuple[Any, ...]:
    return (torch.randn(n, TOKENS, FEATURES, generator=generator),)


def tokens(n: int, generator: torch.Generator) -> tuple[Any, ...]:
    return (torch.randint(0, 7, (n, TOKENS), generator=generator),)


def of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Inputs:
    return lambda n, generator: (torch.randn(n, *shape, dtype=dtype, generator=generator),)


def padded(n: int, generator: torch.Generator) -> tuple[Any, ...]:
    """Sequences, and which of their tokens are padding."""
    ends = torch.arange(n) % (TOKENS - 1) + 1
    return (*sequences(n, generator), torch.arange(TOKENS) > ends[:, None])


def pair(n: int, generator: torch.Generator) -> tuple[Any, ...]:
    return (*vectors(n, generator), *vectors(n, generator))


def by_name(n: int, generator: torch.Generator) -> tuple[Any, ...]:
    first, second = pair(n, generator)
    return ({"x": first, "y": second},)


def levels(n: int, generator: torch.Generator) -> tuple[Any, ...]:
    fine, coarse = (
        torch.randn(n, 4, size, size, generator=generator) for size in (IMAGE[1], IMAGE[1] // 2)
    )
    return ({"fine": fine, "coarse": coarse},)


def one_of_three(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, CLASSES, (n,), generator=generator)


def one_of_three_each(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, generator: torch.randint(0, CLASSES, (n, *shape), generator=generator)


@dataclass(frozen=True)
class Architecture:
    """A network, what it takes and how it is used.

    Attributes:
        build: returns a fresh network.
        inputs: (n, generator) → the network's arguments, for n examples.
        targets: (n, generator) → what the loss compares with.
        loss: the name of the loss.
        logits: the outputs that the loss takes, of what the network returns, where the library
            cannot know: neither a tensor nor called ``logits``.
        chosen: ``parameters`` and ``exclude`` of the calls.
        onnx: whether every run of the tests tries its export and sparse training, which take long.
        heavy: whether it is tried only where everything is.
    """

    build: Callable[[], nn.Module]
    inputs: Inputs = vectors
    targets: Callable[[int, torch.Generator], Tensor] = one_of_three
    loss: str = "cross_entropy"
    logits: Callable[[Any], Tensor] | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    onnx: bool = False
    heavy: bool = False


# One module or weight used several times.


def one_cell_three_times() -> nn.Module:
    cell = nn.Linear(FEATURES, FEATURES)
    return nn.Sequential(
        cell, nn.ReLU(), cell, nn.ReLU(), cell, nn.ReLU(), nn.Linear(FEATURES, CLASSES)
    )


class CellInList(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList([nn.Linear(FEATURES, FEATURES)] * 3)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        for cell in self.cells:
            x = torch.tanh(cell(x))
        return self.head(x)


class Alias(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, CLASSES)
        )
        self.head = self.net[-1]

    def forward(self, x):
        return self.net(x)


class TiedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, FEATURES)
        self.two = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class TiedEmbedding(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, FEATURES)
        self.mixer = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mixer(self.embedding(ids))))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.arm = nn.Sequential(nn.Linear(FEATURES, 9), nn.ReLU(), nn.Linear(9, FEATURES))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x, y):
        return self.head((self.arm(x) - self.arm(y)).abs())


# Convolutional networks.


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None):
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.body(x)


def classifier(*layers: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
    )


def conv_norm(inputs: int, outputs: int, size: int, activation: nn.Module | None = None, **more):
    layers = [
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **more),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation] if activation else []))


def mobilenet() -> nn.Module:
    inverted = nn.Sequential(
        conv_norm(4, 8, 1, nn.ReLU6()),
        conv_norm(8, 8, 3, nn.ReLU6(), groups=8),
        conv_norm(8, 4, 1),
    )
    return classifier(conv_norm(3, 4, 3, nn.ReLU6(), stride=2), Residual(inverted), channels=4)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int = 4):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 2 * channels)
        self.down = nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return classifier(nn.Conv2d(3, 4, 2, stride=2), ConvNeXtBlock(), channels=4)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int = 6):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, 2, 1)
        self.excite = nn.Conv2d(2, channels, 1)

    def forward(self, x):
        gate = F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * self.excite(gate).sigmoid()


def squeeze_excite() -> nn.Module:
    return classifier(nn.Conv2d(3, 6, 3), nn.SiLU(), SqueezeExcite(), channels=6)


class UNet(nn.Module):
    """A class for every pixel."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, padding=1)
        self.bottom = nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        fine = F.relu(self.down(x))
        coarse = F.relu(self.bottom(F.max_pool2d(fine, 2)))
        return self.head(torch.cat([fine, self.up(coarse)], 1))


class Pyramid(nn.Module):
    """Takes and returns a dict of levels, as feature pyramids do."""

    def __init__(self):
        super().__init__()
        self.lateral = nn.ModuleDict({name: nn.Conv2d(4, 4, 1) for name in ("fine", "coarse")})
        self.smooth = nn.Conv2d(4, CLASSES, 3, padding=1)

    def forward(self, features):
        coarse = self.lateral["coarse"](features["coarse"])
        fine = self.lateral["fine"](features["fine"])
        fine = fine + F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        return {
            "fine": self.smooth(fine).mean((2, 3)),
            "coarse": self.smooth(coarse).mean((2, 3)),
        }


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.two = nn.Conv2d(7, 4, 3, padding=1)
        self.head = nn.Linear(11, CLASSES)

    def forward(self, x):
        x = torch.cat([x, F.relu(self.one(x))], 1)
        x = torch.cat([x, self.two(F.relu(self.norm(x)))], 1)
        return self.head(x.mean((2, 3)))


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.one = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.two = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(4, 6, 1, stride=2, bias=False)

    def forward(self, x):
        x = F.relu(self.norm(x))
        return self.two(F.relu(self.one(x))) + self.shortcut(x)


def preactivation() -> nn.Module:
    return classifier(nn.Conv2d(3, 4, 3, padding=1), PreActivation(), channels=6)


def group_norm() -> nn.Module:
    return classifier(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ELU(),
        channels=4,
    )  # fmt: skip


def stride_three() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def dilated() -> nn.Module:
    return classifier(
        nn.Conv2d(3, 4, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(4, 6, (3, 1), groups=2),
        nn.Hardswish(), channels=6,
    )  # fmt: skip


def padded_by_reflection() -> nn.Module:
    return classifier(
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.LeakyReLU(), channels=4
    )


def one_dimension() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(TOKENS, 6, 3, padding=1), nn.BatchNorm1d(6), nn.PReLU(),
        nn.Conv1d(6, 6, 3, groups=3), nn.AdaptiveMaxPool1d(1), nn.Flatten(),
        nn.Linear(6, CLASSES),
    )  # fmt: skip


def three_dimensions() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(4, CLASSES),
    )  # fmt: skip


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.Unflatten(1, (2, 2, 2)), nn.ReLU(),
        nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Tanh(), nn.Conv2d(3, 1, 1), nn.Flatten(),
    )  # fmt: skip


def channels_last() -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, CLASSES),
    )  # fmt: skip
    return network.to(memory_format=torch.channels_last)


def images_channels_last(n: int, generator: torch.Generator) -> tuple[Any, ...]:
    return (images(n, generator)[0].to(memory_format=torch.channels_last),)


# Recurrence and attention.


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], **settings):
        super().__init__()
        self.rnn: nn.Module = kind(FEATURES, 4, batch_first=True, **settings)
        self.head = nn.Linear(8 if settings.get("bidirectional") else 4, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        state = x.new_zeros(x.shape[0], 4)
        for token in x.unbind(1):
            state = self.cell(token, state)
        return self.head(state)


class TokensFirst(nn.Module):
    """An encoder that gets the tokens before the examples, as it does unless it is told."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(FEATURES, 2, 12)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.head(self.encoder(x.transpose(0, 1))[0])


class SelfAttention(nn.Module):
    def __init__(self, causal: bool = False):
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.causal = causal

    def forward(self, x, padding=None):
        mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() if self.causal else None
        out, _ = self.attention(
            x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False
        )
        return self.head(x + out).mean(1)


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, FEATURES))
        self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True, kdim=6, vdim=6)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        queries = self.queries.expand(len(x), -1, -1)
        return self.head(self.attention(queries, x, x)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(FEATURES, 2, 12, batch_first=True)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x)[:, 0])


class GPTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(FEATURES) for _ in range(2))
        self.qkv = nn.Linear(FEATURES, 3 * FEATURES)
        self.out = nn.Linear(FEATURES, FEATURES)
        self.mlp = nn.Sequential(nn.Linear(FEATURES, 12), nn.GELU(), nn.Linear(12, FEATURES))

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = (
            part.view(n, t, 2, d // 2).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).split(d, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, FEATURES)
        self.places = nn.Embedding(TOKENS, FEATURES)
        self.block = GPTBlock()
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, ids):
        x = self.embedding(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.block(x))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, FEATURES, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, FEATURES))
        self.places = nn.Parameter(torch.randn(1, 5, FEATURES))
        self.block = GPTBlock()
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.block(x)[:, 0])


# Weights that are computed, or used in ways of one's own.


def weight_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(FEATURES, 9)), nn.Tanh(), nn.Linear(9, CLASSES)
    )


def weight_normed_as_it_was() -> nn.Module:
    return nn.Sequential(
        nn.utils.weight_norm(nn.Linear(FEATURES, 9)), nn.Tanh(), nn.Linear(9, CLASSES)
    )


def spectral_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(FEATURES, 9)), nn.Tanh(), nn.Linear(9, CLASSES)
    )


class Magnitude(nn.Module):
    def forward(self, x):
        return x.abs()


def complex_linear() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 6, dtype=torch.complex64),
        nn.Linear(6, CLASSES, dtype=torch.complex64),
        Magnitude(),
    )


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, 6)
        self.two = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.two(torch.tanh(torch.einsum("ni,oi->no", x, self.one.weight) + self.one.bias))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, 6)
        self.two = nn.Linear(6, CLASSES)

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.one.weight, self.one.bias)), self.two.weight)


class LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


def lora() -> nn.Module:
    return nn.Sequential(
        LoRALinear(nn.Linear(FEATURES, 9)), nn.Tanh(), LoRALinear(nn.Linear(9, CLASSES))
    )


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, 9)
        self.two = nn.Linear(9, CLASSES)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


def perceptron() -> nn.Module:
    return Perceptron()


def peft_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False)
    return get_peft_model(Perceptron(), config)  # pyright: ignore[reportArgumentType]


def compiled() -> nn.Module:
    return torch.compile(Perceptron())  # pyright: ignore[reportReturnType]


def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(Perceptron())


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(FEATURES, FEATURES, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x, y):
        return self.head(torch.tanh(self.both(x, y)))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, FEATURES)
        self.head = nn.Sequential(nn.Linear(FEATURES, 6), nn.ReLU(), nn.Linear(6, CLASSES))

    def forward(self, ids):
        return self.head(self.bag(ids))


# Forward passes with a will of their own.


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh())
        self.two = nn.Linear(9, CLASSES)

    def forward(self, x):
        return self.two(checkpoint(self.one, x, use_reentrant=False))


class OptionalLabels(nn.Module):
    """Logits, or with labels the loss as well."""

    def __init__(self):
        super().__init__()
        self.net = Perceptron()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return logits if labels is None else (F.cross_entropy(logits, labels), logits)


class OptionalScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, 9)
        self.two = nn.Linear(9, CLASSES)

    def forward(self, x, scale=None):
        x = torch.sigmoid(self.one(x)) if scale is None else F.relu(self.one(x))
        x = self.two(x)
        return x if scale is None else x * scale


class ReadsAttributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, 9)
        self.two = nn.Linear(9, CLASSES)

    def forward(self, x):
        x = x.to(self.one.weight.dtype).reshape(-1, self.one.in_features)
        return self.two(F.relu(self.one(x)))


class Auxiliary(nn.Module):
    """Another head beside the one that evaluation uses."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, 9)
        self.two = nn.Linear(9, CLASSES)
        self.auxiliary = nn.Linear(9, CLASSES)

    def forward(self, x):
        x = torch.relu(self.one(x))
        return (self.two(x), self.auxiliary(x)) if self.training else self.two(x)


class OwnAverage(nn.Module):
    """Carries an average of its own weights."""

    def __init__(self):
        super().__init__()
        self.online = Perceptron()
        self.average = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x):
        return self.online(x)


class DropoutAndNorms(nn.Module):
    """In training mode, one batch norm frozen."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, 9)
        self.norm = nn.BatchNorm1d(9)
        self.frozen = nn.BatchNorm1d(9).eval().requires_grad_(False)
        self.two = nn.Linear(9, CLASSES)

    def forward(self, x):
        x = F.relu(self.frozen(self.norm(self.one(x))))
        return self.two(F.dropout(x, 0.5, self.training))


def frozen_start() -> nn.Module:
    network = Perceptron()
    network.one.requires_grad_(False)
    return network


def hooked() -> nn.Module:
    network = Perceptron()
    network.one.register_forward_hook(lambda module, inputs, output: 2 * output)
    network.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return network


class Experts(nn.Module):
    """Every example goes to the expert that its gate prefers."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(FEATURES, 2)
        self.experts = nn.ModuleList(nn.Linear(FEATURES, 6) for _ in range(2))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        weight, choice = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 6)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero().squeeze(1)
            out = out.index_add(0, rows, torch.tanh(expert(x[rows])) * weight[rows, None])
        return self.head(out)


class StackedExperts(nn.Module):
    """Every token goes to two experts, whose matrices are in one parameter each."""

    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.gate = nn.Linear(FEATURES, 3)
        self.up = nn.Parameter(torch.randn(3, 6, FEATURES) / 3)
        self.down = nn.Parameter(torch.randn(3, FEATURES, 6) / 3)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        rows = x.flatten(0, 1)
        weights, chosen = self.gate(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for number in range(self.num_experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            part = F.linear(F.silu(F.linear(rows[row], self.up[number])), self.down[number])
            out = out.index_add(0, row, part * weights[row, place, None])
        return self.head(out.view_as(x).mean(1))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForSequenceClassification

    config = MixtralConfig(
        vocab_size=7, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
        max_position_embeddings=8, num_labels=CLASSES, pad_token_id=0,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return MixtralForSequenceClassification(config)


class AllExperts(Experts):
    """Every expert sees all examples: the gate weighs them."""

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        outs = torch.stack([torch.tanh(expert(x)) for expert in self.experts], 1)
        return self.head(torch.einsum("ne,nef->nf", weights, outs))


class DependsOnData(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Perceptron()
        self.other = nn.Linear(FEATURES, FEATURES)

    def forward(self, x):
        if x.abs().max() > 1e6:
            x = self.other(x)
        return self.net(x)


class ReturnsTuple(Perceptron):
    def forward(self, x):
        hidden = torch.relu(self.one(x))
        return self.two(hidden), hidden


class ReturnsDict(Perceptron):
    def forward(self, x):
        hidden = torch.relu(self.one(x))
        return {"logits": self.two(hidden), "hidden": hidden}


@dataclass
class Output:
    """As the networks of transformers return."""

    logits: Tensor
    hidden: Tensor | None = None


class ReturnsOutput(Perceptron):
    def forward(self, x):
        return Output(self.two(torch.relu(self.one(x))))


class TakesTwoByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(FEATURES, 6)
        self.two = nn.Linear(FEATURES, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, inputs):
        return self.head(torch.relu(self.one(inputs["x"]) + self.two(inputs["y"])))


def on_meta() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 9, device="meta"), nn.ReLU(), nn.Linear(9, CLASSES, device="meta")
    )


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(9), nn.ReLU(), nn.LazyLinear(CLASSES))


ARCHITECTURES: dict[str, Architecture] = {
    "one cell three times": Architecture(one_cell_three_times),
    "ModuleList([cell] * 3)": Architecture(CellInList),
    "alias of a layer": Architecture(Alias),
    "tied linear layers": Architecture(TiedLinear),
    "embedding tied to the head": Architecture(
        TiedEmbedding,
        tokens,
        lambda n, generator: tokens(n, generator)[0],
        "token_cross_entropy",
    ),
    "Siamese, two inputs": Architecture(Siamese, pair),
    "MobileNet block": Architecture(mobilenet, images),
    "ConvNeXt block": Architecture(convnext, images),
    "squeeze and excitation": Architecture(squeeze_excite, images),
    "U-Net": Architecture(UNet, of((3, 4, 4)), one_of_three_each(4, 4)),
    "feature pyramid of dicts": Architecture(Pyramid, levels, logits=lambda out: out["fine"]),
    "DenseNet block": Architecture(Dense, images),
    "pre-activation residual": Architecture(preactivation, images),
    "GroupNorm and InstanceNorm": Architecture(group_norm, images),
    "stride 3 before 2×2 maximum": Architecture(stride_three, images),
    "dilated and grouped": Architecture(dilated, images),
    "reflection padding": Architecture(padded_by_reflection, images),
    "Conv1d": Architecture(one_dimension, of((TOKENS, FEATURES))),
    "Conv3d": Architecture(three_dimensions, of((2, 3, 4, 4))),
    "ConvTranspose2d decoder": Architecture(
        decoder, targets=lambda n, generator: torch.randn(n, 16, generator=generator), loss="mse"
    ),
    "channels_last": Architecture(channels_last, images_channels_last),
    "LSTM": Architecture(partial(Recurrent, nn.LSTM), sequences),
    "LSTM, its weights alone": Architecture(
        partial(Recurrent, nn.LSTM), sequences, chosen={"parameters": nn.LSTM}
    ),
    "GRU": Architecture(partial(Recurrent, nn.GRU), sequences),
    "bidirectional LSTM": Architecture(
        partial(Recurrent, nn.LSTM, bidirectional=True, num_layers=2), sequences
    ),
    "GRU cell": Architecture(Cell, sequences),
    "self-attention": Architecture(SelfAttention, sequences),
    "attention with padding": Architecture(SelfAttention, padded),
    "causal attention mask": Architecture(partial(SelfAttention, causal=True), sequences),
    "cross-attention": Architecture(CrossAttention, of((TOKENS, 6))),
    "TransformerEncoderLayer": Architecture(Encoder, sequences),
    "encoder with tokens first": Architecture(TokensFirst, sequences),
    "GPT block": Architecture(GPT, tokens, one_of_three_each(TOKENS), "token_cross_entropy"),
    "vision transformer": Architecture(VisionTransformer, images),
    "weight norm": Architecture(weight_normed),
    "weight norm, excluded": Architecture(weight_normed, chosen={"exclude": "0"}),
    "old weight norm": Architecture(weight_normed_as_it_was),
    "old weight norm, excluded": Architecture(weight_normed_as_it_was, chosen={"exclude": "0"}),
    "spectral norm": Architecture(spectral_normed),
    "spectral norm, excluded": Architecture(spectral_normed, chosen={"exclude": "0"}),
    "complex": Architecture(complex_linear, of((FEATURES,), torch.complex64)),
    "einsum of a weight": Architecture(Einsum),
    "F.linear of a weight": Architecture(Functional),
    "LoRA by hand": Architecture(lora),
    "LoRA of PEFT": Architecture(peft_lora, heavy=True),
    "compiled": Architecture(compiled),
    "DataParallel": Architecture(lambda: nn.DataParallel(Perceptron())),
    "AveragedModel": Architecture(averaged),
    "Bilinear": Architecture(Bilinear, pair),
    "EmbeddingBag": Architecture(Bag, tokens),
    "gradient checkpointing": Architecture(Checkpointed),
    "labels=None": Architecture(OptionalLabels),
    "scale=None": Architecture(OptionalScale),
    "reads its layers' attributes": Architecture(ReadsAttributes),
    "auxiliary head": Architecture(Auxiliary),
    "average of itself": Architecture(OwnAverage),
    "dropout and batch norm": Architecture(DropoutAndNorms),
    "frozen layer": Architecture(frozen_start),
    "forward hooks": Architecture(hooked),
    "float64": Architecture(lambda: Perceptron().double(), of((FEATURES,), torch.float64)),
    "bfloat16": Architecture(
        lambda: Perceptron().bfloat16(),
        lambda n, generator: (vectors(n, generator)[0].bfloat16(),),
    ),
    "float16": Architecture(
        lambda: Perceptron().half(), lambda n, generator: (vectors(n, generator)[0].half(),)
    ),
    "on meta": Architecture(on_meta, onnx=True),
    "lazy, not run": Architecture(lazy, onnx=True),
    "experts by index_add": Architecture(Experts),
    "experts, all used": Architecture(AllExperts),
    "experts in one parameter": Architecture(StackedExperts, sequences),
    "Mixtral": Architecture(mixtral, tokens, heavy=True),
    "depends on data": Architecture(DependsOnData),
    "returns a tuple": Architecture(ReturnsTuple, logits=lambda out: out[0]),
    "returns a dict": Architecture(ReturnsDict),
    "returns an object": Architecture(ReturnsOutput),
    "takes a dict": Architecture(TakesTwoByName, by_name),
    "perceptron": Architecture(perceptron, onnx=True),
}
