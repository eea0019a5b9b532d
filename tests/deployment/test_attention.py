"""Attention that a network writes out, as torch's one function."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp

from lossprune.channels.tracing import trace
from lossprune.deployment.attention import fuse_attention_

TINY = 1e-5  # of sums of a few numbers around 1, in single precision


class Attention(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix, self.dropout = mix, nn.Dropout(0.3)

    def forward(self, q, k, v):
        return self.mix(self, q, k, v) * 2


FUSED = {
    "divided": lambda _, q, k, v: ((q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5).softmax(-1) @ v,
    "multiplied": lambda _, q, k, v: (
        F.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.3, dim=3) @ v
    ),
    "plain": lambda own, q, k, v: own.dropout(torch.softmax(q @ k.transpose(-2, -1), -1)).matmul(v),
}
LEFT = {
    "masked": lambda _, q, k, v: ((q @ k.transpose(2, 3)) + q[..., :1]).softmax(-1) @ v,
    "other dimension": lambda _, q, k, v: (q @ k.transpose(2, 3)).softmax(2) @ v,
    "read twice": lambda _, q, k, v: (w := (q @ k.transpose(2, 3)).softmax(-1)) @ v + w.sum(),
    "by a tensor": lambda _, q, k, v: ((q @ k.transpose(2, 3)) / q[..., :1].exp()).softmax(-1) @ v,
    "other type": lambda _, q, k, v: (q @ k.transpose(2, 3)).softmax(-1, torch.float64).float() @ v,
    "not turned": lambda _, q, k, v: (q @ k.transpose(2, 3).transpose(2, 3).mT).softmax(-1) @ v,
}


@pytest.mark.parametrize("name", [*FUSED, *LEFT])
@torch.no_grad()
def test_attention_is_one_function(name):
    torch.manual_seed(0)
    model = Attention({**FUSED, **LEFT}[name]).eval()

    def inputs(n, queries, keys):
        shapes = (n, 3, queries, 4), (n, 3, keys, 4), (n, 3, keys, 5)
        return [torch.randn(*shape) for shape in shapes]

    graph = trace(model, {}).module(copy.deepcopy(model))
    ShapeProp(graph).propagate(*inputs(2, 5, 7))
    fuse_attention_(graph)
    calls = [node.target for node in graph.graph.nodes]
    assert "softmax" not in calls or name in LEFT
    assert (F.scaled_dot_product_attention in calls) == (name in FUSED)
    for example in (inputs(2, 5, 7), inputs(1, 9, 2)):
        found, expected = graph(*example), model(*example)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=0, atol=TINY)
