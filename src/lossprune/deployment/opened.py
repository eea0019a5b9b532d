"""torch's attention and encoder layers, written out in linear layers that can be made sparse.

``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` hand their weights to one compiled
function, so that no layer in them is ever called.  Here the projections are linear layers,
``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``, and what is between them stays torch's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lossprune.channels.nodes import changed
from lossprune.channels.tracing import apart


def opened(network: nn.Module) -> nn.Module:
    """Return a copy of a network in evaluation mode whose attention is written out.

    It shares the parameters.  A network without attention of torch's is returned itself.

    >>> network = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    >>> names = [name for name, part in opened(network).named_modules() if type(part) is nn.Linear]
    >>> names[:3]
    ['0.self_attn.q_proj', '0.self_attn.k_proj', '0.self_attn.v_proj']
    >>> x = torch.randn(3, 5, 8)
    >>> torch.allclose(opened(network)(x), network(x), atol=1e-5)
    True
    """
    if not any(type(part) in _OPENED for part in network.modules()):
        return network
    return _opened_(apart(network))


def _opened_(module: nn.Module) -> nn.Module:
    if type(module) in _OPENED and changed(module) is None and not _adds_keys(module):
        return _OPENED[type(module)](module)
    for name, child in module.named_children():
        module._modules[name] = _opened_(child)
    return module


def _adds_keys(module: nn.Module) -> bool:
    """Whether attention reads keys and values of its own beside those given."""
    return getattr(module, "bias_k", None) is not None or bool(
        getattr(module, "add_zero_attn", False)
    )


class WrittenAttention(nn.Module):
    """``nn.MultiheadAttention`` in evaluation mode."""

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        """Take the parameters of ``whole``."""
        super().__init__()
        self.num_heads, self.batch_first = whole.num_heads, whole.batch_first
        if whole.in_proj_weight is None:
            weights = [whole.q_proj_weight, whole.k_proj_weight, whole.v_proj_weight]
        else:
            weights = whole.in_proj_weight.chunk(3)
        biases = [None] * 3 if whole.in_proj_bias is None else whole.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(whole.out_proj.weight, whole.out_proj.bias)
        self.train(whole.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what ``nn.MultiheadAttention`` returns."""
        projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        shape = self.num_heads, self.batch_first
        masks = key_padding_mask, attn_mask, is_causal
        mixed, weights = attended(*projected, *shape, *masks, need_weights, average_attn_weights)
        return self.out_proj(mixed), weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer of these very tensors."""
    outputs, inputs = weight.shape
    made = nn.Linear(inputs, outputs, bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    batch_first: bool,
    padding: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the values mixed by attention, and its weights where they are wanted.

    Queries, keys and values are projected: (tokens, size), (n, tokens, size), or (tokens, n, size)
    without ``batch_first``.  ``padding``, (n, keys) or (keys,), and ``mask``, (queries, keys) or
    (n · heads, queries, keys), are True where a key is left out, or what is added to its score;
    ``causal`` says that the mask leaves out later keys, and nothing else.
    """
    single = query.dim() == 2
    if single:
        query, key, value = (one[None] for one in (query, key, value))
    elif not batch_first:
        query, key, value = (one.transpose(0, 1) for one in (query, key, value))
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (query, key, value))
    causal = causal and padding is None and not need_weights
    bias = None if causal else _added(padding, mask, q)
    weights = None
    if need_weights:
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        weights = (scores if bias is None else scores + bias).softmax(-1)
        mixed = weights @ v
        weights = weights.mean(1) if average else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal)
    mixed = mixed.transpose(1, 2).flatten(2)
    if single:
        return mixed[0], None if weights is None else weights[0]
    return mixed if batch_first else mixed.transpose(0, 1), weights


fx.wrap("attended")  # one operation: it looks at shapes and types


def _added(padding: Tensor | None, mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return what is added to the scores, to be broadcast to (n, heads, queries, keys)."""
    found = None
    if padding is not None:
        found = _number(padding, query).reshape(-1, 1, 1, padding.shape[-1])
    if mask is not None:
        own = _number(mask, query)
        own = own if own.dim() == 2 else own.unflatten(0, (-1, query.shape[1]))
        found = own if found is None else found + own
    return found


def _number(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return like.new_zeros(mask.shape).masked_fill_(mask, -math.inf)


class WrittenLayer(nn.Module):
    """``nn.TransformerEncoderLayer`` in evaluation mode."""

    def __init__(self, whole: nn.TransformerEncoderLayer) -> None:
        """Take the parts of ``whole``."""
        super().__init__()
        self.self_attn = _opened_(whole.self_attn)
        self.linear1, self.linear2 = whole.linear1, whole.linear2
        self.norm1, self.norm2, self.norm_first = whole.norm1, whole.norm2, whole.norm_first
        self.activation = whole.activation
        self.train(whole.training)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return what ``nn.TransformerEncoderLayer`` returns."""
        asked = {
            "attn_mask": src_mask, "key_padding_mask": src_key_padding_mask,
            "is_causal": is_causal, "need_weights": False,
        }  # fmt: skip
        x = self.norm1(src) if self.norm_first else src
        mixed = src + self.self_attn(x, x, x, **asked)[0]
        if self.norm_first:
            return mixed + self._perceptron(self.norm2(mixed))
        mixed = self.norm1(mixed)
        return self.norm2(mixed + self._perceptron(mixed))

    def _perceptron(self, x: Tensor) -> Tensor:
        return self.linear2(self.activation(self.linear1(x)))


class WrittenEncoder(nn.Module):
    """``nn.TransformerEncoder`` in evaluation mode."""

    def __init__(self, whole: nn.TransformerEncoder) -> None:
        """Take the layers of ``whole``."""
        super().__init__()
        self.layers, self.norm = nn.ModuleList(map(_opened_, whole.layers)), whole.norm
        self.train(whole.training)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Return what ``nn.TransformerEncoder`` returns."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


_OPENED = {
    nn.MultiheadAttention: WrittenAttention,
    nn.TransformerEncoderLayer: WrittenLayer,
    nn.TransformerEncoder: WrittenEncoder,
}
