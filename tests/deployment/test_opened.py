"""torch's attention and encoder layers, written out, against torch's own."""

import copy

import pytest
import torch
from torch import nn

import lossprune
from lossprune.deployment.opened import opened
from lossprune.kernels.compiler import compiler_available

TINY = 1e-12  # of numbers around 1 in double precision

N, QUERIES, KEYS, SIZE, HEADS = 3, 5, 7, 12, 2
PADDING = torch.arange(KEYS) > torch.tensor([[6], [3], [4]])
LATER = torch.ones(KEYS, KEYS).triu(1).bool()


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"average_attn_weights": False},
        {"need_weights": False},
        {"key_padding_mask": PADDING},
        {"key_padding_mask": PADDING, "need_weights": False, "attn_mask": LATER[:QUERIES]},
        {"attn_mask": double(N * HEADS, QUERIES, KEYS)},
        {"attn_mask": LATER[:QUERIES], "need_weights": False, "is_causal": True},
    ],
)
@torch.no_grad()
def test_attention(batch_first, bias, asked):
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(
        SIZE, HEADS, bias=bias, kdim=SIZE - bias, vdim=SIZE, batch_first=batch_first
    )
    whole = whole.double().eval()
    inputs = double(N, QUERIES, SIZE), double(N, KEYS, SIZE - bias), double(N, KEYS, SIZE)
    if not batch_first:
        inputs = tuple(tensor.transpose(0, 1) for tensor in inputs)
    for found, expected in zip(
        opened(whole)(*inputs, **asked), whole(*inputs, **asked), strict=True
    ):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, rtol=0, atol=TINY)


@torch.no_grad()
def test_attention_of_one_example():
    whole = nn.MultiheadAttention(SIZE, HEADS).double().eval()
    x, mask = double(KEYS, SIZE), PADDING[1]
    for asked in ({}, {"key_padding_mask": mask}, {"attn_mask": LATER, "need_weights": False}):
        for found, expected in zip(
            opened(whole)(x, x, x, **asked), whole(x, x, x, **asked), strict=True
        ):
            if expected is not None:
                assert torch.allclose(found, expected, rtol=0, atol=TINY)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.Tanh()])
@torch.no_grad()
def test_encoders(norm_first, activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        SIZE, HEADS, 20, activation=activation, norm_first=norm_first, batch_first=True
    )
    whole = nn.TransformerEncoder(layer, 2, nn.LayerNorm(SIZE), enable_nested_tensor=False)
    whole, x = whole.double().eval(), double(N, KEYS, SIZE)
    for asked in ({}, {"mask": LATER}, {"src_key_padding_mask": PADDING}):
        # Torch's compiled function takes some of these, its code in Python the others.
        assert torch.allclose(opened(whole)(x, **asked), whole(x, **asked), rtol=0, atol=TINY)


def test_what_is_left_as_it_is():
    plain = nn.Sequential(nn.Linear(3, 3))
    assert opened(plain) is plain
    hooked = nn.MultiheadAttention(SIZE, HEADS)
    hooked.register_forward_hook(lambda *_: None)
    for left in (hooked, nn.MultiheadAttention(SIZE, HEADS, add_bias_kv=True)):
        assert type(opened(nn.Sequential(left))[0]) is nn.MultiheadAttention


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, SIZE)
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, 40, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
        self.head = nn.Linear(SIZE, 4)

    def forward(self, ids):
        x = self.encoder(self.embed(ids))
        return self.head(self.attention(x, x, x)[0].mean(1))


@pytest.mark.skipif(not compiler_available(), reason="no C compiler here")
@torch.no_grad()
def test_a_network_of_torchs_layers_is_deployed_in_sparse_ones():
    torch.manual_seed(0)
    model = Classifier().eval()
    mask = lossprune.prune(model, "MP", sparsity=0.8).mask
    ids = torch.arange(22).reshape(2, 11) % 20
    deployed = lossprune.deploy(model, mask, ids, seconds=0.01)
    assert "sparse" in deployed.seconds
    assert not any("left out" in note for note in deployed.notes)
    names = [layer.name for layer in deployed.layers]
    assert {"encoder.layers.1.self_attn.k_proj", "encoder.layers.0.linear1"} <= set(names)
    assert all(layer.multiply_adds for layer in deployed.layers if layer.kept)
    masked = mask.apply_(copy.deepcopy(model))
    for example in (ids, torch.arange(15).reshape(5, 3)):
        assert torch.allclose(deployed(example), masked(example), rtol=0, atol=1e-5)
