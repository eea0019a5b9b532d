"""Functions that torch has as a whole, attention and recurrence, in the linear ones inside them.

torch dispatches them as one, so that the products inside would not be seen.  Here each is computed
by linear functions that are called one by one, in evaluation mode and with the examples first.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# x, weight and bias → x Wᵀ + b
LinearFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# What the input gives, the state, and what the state gives → the next state; the first part of a
# state is what the layer puts out.
_Step = Callable[[Tensor, tuple[Tensor, ...], Tensor], tuple[Tensor, ...]]


def attention(linear: LinearFunction, *args: Any, **kwargs: Any) -> Any:
    """Compute ``F.multi_head_attention_forward``: torch's own between identities for projections.

    Where queries, keys and values are not the same, each is given to all of a packed projection,
    and the third that is its own is taken.
    """
    function = F.multi_head_attention_forward
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    query, key, value = given["query"], given["key"], given["value"]
    batched = query.ndim == 3
    turned = (lambda x: x.transpose(0, 1)) if batched else (lambda x: x)
    bias, packed = given["in_proj_bias"], given["in_proj_weight"]
    if given["use_separate_proj_weight"]:
        weights = (given[f"{part}_proj_weight"] for part in "qkv")
        biases = (None, None, None) if bias is None else bias.chunk(3)
        parts = [
            linear(turned(x), weight, b)
            for x, weight, b in zip((query, key, value), weights, biases, strict=True)
        ]
    elif query is key is value:
        parts = linear(turned(query), packed, bias).chunk(3, dim=-1)
    else:
        parts = [
            linear(turned(x), packed, bias).chunk(3, dim=-1)[third]
            for third, x in enumerate((query, key, value))
        ]
    query, key, value = map(turned, parts)
    identity = torch.eye(query.shape[-1], dtype=query.dtype, device=query.device)
    output = given["out_proj_weight"], given["out_proj_bias"]
    given |= {"query": query, "key": key, "value": value, "in_proj_weight": None}
    given |= {"in_proj_bias": None, "use_separate_proj_weight": True, "out_proj_bias": None}
    given |= dict.fromkeys([f"{part}_proj_weight" for part in ("q", "k", "v", "out")], identity)
    heads, scores = function(*bound.args, **bound.kwargs)
    return turned(linear(turned(heads), *output)), scores


def _lstm(given: Tensor, state: tuple[Tensor, ...], own: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = (given + own).chunk(4, dim=-1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru(given: Tensor, state: tuple[Tensor, ...], own: Tensor) -> tuple[Tensor, ...]:
    (r, z, n), (r_own, z_own, n_own) = given.chunk(3, dim=-1), own.chunk(3, dim=-1)
    n = torch.tanh(n + torch.sigmoid(r + r_own) * n_own)
    return ((state[0] - n) * torch.sigmoid(z + z_own) + n,)


def _tanh(given: Tensor, state: tuple[Tensor, ...], own: Tensor) -> tuple[Tensor, ...]:
    return ((given + own).tanh(),)


def _relu(given: Tensor, state: tuple[Tensor, ...], own: Tensor) -> tuple[Tensor, ...]:
    return ((given + own).relu(),)


def _cell(step: _Step) -> Callable[..., Any]:
    def cell(
        linear: LinearFunction,
        input: Tensor,  # noqa: A002 - torch's argument names, which callers may use as keywords
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state: tuple[Tensor, ...] = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        hidden, *cell = step(linear(input, w_ih, b_ih), state, linear(state[0], w_hh, b_hh))
        return (hidden, *cell) if cell else hidden

    return cell


def _layers(step: _Step) -> Callable[..., Any]:
    def layers(
        linear: LinearFunction,
        input: Tensor,  # noqa: A002
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        x = input if batch_first else input.transpose(0, 1)
        directions = 2 if bidirectional else 1
        each = len(params) // (num_layers * directions)
        last = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                weights = params[index * each : (index + 1) * each]
                start = tuple(part[index] for part in state)
                out, end = _run(linear, step, x, start, weights, has_biases, direction == 1)
                outputs.append(out)
                last.append(end)
            x = torch.cat(outputs, dim=-1)
        ends = [torch.stack(parts) for parts in zip(*last, strict=True)]
        return (x if batch_first else x.transpose(0, 1), *ends)

    return layers


def _run(
    linear: LinearFunction,
    step: _Step,
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    has_biases: bool,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one layer in one direction over x (n, tokens, features): outputs and the last state."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh, *rest = rest if has_biases else (None, None, *rest)
    given, outputs = linear(x, w_ih, b_ih), []
    for token in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        state = step(given[:, token], state, linear(state[0], w_hh, b_hh))
        if rest:  # the output of an LSTM, projected
            state = (linear(state[0], rest[0], None), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1), state


def written_out(function: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
    """Return what computes such a call by linear functions, its first argument; None if nothing."""
    if function in _RECURRENT and not isinstance(args[2], (tuple, list)):
        return None  # of a packed sequence: its rows are not the examples
    return _RECURRENT.get(function) or _OTHERS.get(function)


_RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.lstm: _layers(_lstm),
    torch.gru: _layers(_gru),
    torch.rnn_tanh: _layers(_tanh),
    torch.rnn_relu: _layers(_relu),
}
_OTHERS: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: attention,
    torch.lstm_cell: _cell(_lstm),
    torch.gru_cell: _cell(_gru),
    torch.rnn_tanh_cell: _cell(_tanh),
    torch.rnn_relu_cell: _cell(_relu),
}
