"""Sparse inference: a pruned network as fast as this machine computes it.

The network is compacted, then every layer is either torch's dense one or the project's sparse
kernel, whichever is faster here for a batch like the example.  Consecutive sparse layers run by one
call, in one layout; see ``kernels/sparse_network.c``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from lossprune.deployment.agreement import same_outputs
from lossprune.deployment.calls import call_of
from lossprune.deployment.compaction import compact, masked_copy
from lossprune.deployment.csr import csr_layer
from lossprune.deployment.layer_by_layer import layer_by_layer, sparse_layer
from lossprune.deployment.semi_structured import with_semi_structured
from lossprune.deployment.sparse_network import check_conversion
from lossprune.deployment.sparse_parts import in_parts, sparse_networks
from lossprune.deployment.sparse_tuning import (
    dense_seconds,
    sparse_seconds,
    tune_,
    weighted_layers,
)
from lossprune.deployment.timing import interleaved
from lossprune.deployment.tracing import UntraceableError, trace
from lossprune.kernels.compiler import NoCompiler, compiler_available
from lossprune.pruning.mask import Mask


@dataclass(frozen=True)
class LayerChoice:
    """How one layer is computed, and why.

    Attributes:
        name: the layer's, in the model.
        kind: "sparse" or "dense".
        kept: its weights that are not zero.
        total: its weights after compaction.
        multiply_adds: of its kept weights, for the example's whole batch.
        sparse_seconds: of the sparse kernel alone, on the example; None: it has none.
        dense_seconds: of torch's layer alone.
    """

    name: str
    kind: str
    kept: int
    total: int
    multiply_adds: int
    sparse_seconds: float | None
    dense_seconds: float


class Deployed(nn.Module):
    """A pruned network for inference; an ordinary module, always in evaluation mode.

    Attributes:
        network: what computes.
        layers: a :class:`LayerChoice` for each linear layer and convolution, in order.
        seconds: the shortest time on the example of each way that was tried.
        notes: what could not be done, and why.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[LayerChoice],
        seconds: dict[str, float],
        notes: Sequence[str] = (),
    ) -> None:
        """Hold ``network`` and the account of how it was chosen."""
        super().__init__()
        self.network = network
        self.layers, self.seconds, self.notes = tuple(layers), dict(seconds), tuple(notes)
        self.eval().requires_grad_(False)

    def forward(self, *inputs: Any) -> Any:
        """Return what the masked network returns, to rounding."""
        return self.network(*inputs)

    def train(self, mode: bool = True) -> "Deployed":
        """Stay in evaluation mode: batch norms are part of the weights."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Deployed":
        if sparse_networks(self.network):
            check_conversion(fn)  # before any part is converted
        super()._apply(fn, recurse)
        return self

    def __prepare_scriptable__(self) -> "Deployed":
        """Let sparse parts refuse ``torch.jit.script`` first, and give it what it can compile."""
        for part in sparse_networks(self.network):
            part.__prepare_scriptable__()
        return self

    def extra_repr(self) -> str:
        """Say how each layer is computed."""
        kinds = ", ".join(f"{layer.name}: {layer.kind}" for layer in self.layers)
        return "; ".join((kinds, *self.notes))


@torch.no_grad()
def deploy(
    model: nn.Module, mask: Mask, example: Tensor | Sequence[Tensor], *, seconds: float = 0.3
) -> Deployed:
    """Return the pruned network, as fast as this machine computes it.

    The result takes what ``model`` takes, in batches of any size, and gives what the masked model
    gives in evaluation mode, to rounding; it computes no gradients.  ``model`` is left as it is.
    On a GPU, linear layers with 2:4 masks become PyTorch's semi-structured ones.

    Args:
        model: any network; what cannot be traced by ``torch.fx`` is replaced layer by layer.
        mask: which weights are kept.
        example: a batch as it will come: its size decides what is fastest.
        seconds: how long each comparison may take.

    Raises:
        PruningError: the mask does not fit the model.

    >>> import lossprune
    >>> network = lossprune.networks.NETWORKS["MLP"](shape=(1, 8, 8), hidden=(32,))
    >>> mask = Mask({"fc1.weight": torch.rand(32, 64) < 0.05})
    >>> deployed = deploy(network, mask, torch.randn(1, 1, 8, 8), seconds=0.01)
    >>> deployed(torch.randn(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    masked, mask = masked_copy(model, mask)
    if inputs[0].is_cuda:
        return _on_gpu(masked, inputs, seconds)
    compacted = compact(model, mask).model.eval()
    candidates: dict[str, nn.Module] = {"masked": masked, "compacted": compacted}
    notes: list[str] = []
    if not compiler_available():
        notes.append("no C compiler, so torch's CSR products are all there is for sparse layers")
        candidates["CSR"] = layer_by_layer(compacted, inputs, seconds, csr_layer)
        return _fastest(candidates, inputs, compacted, seconds, notes)
    try:
        graph = trace(compacted, call_of(compacted, inputs)).module(compacted)
        ShapeProp(graph).propagate(*inputs)
        candidates |= _sparse_candidates(graph, compacted, inputs, seconds)
    except UntraceableError as error:
        notes.append(str(error))
        candidates["layer by layer"] = layer_by_layer(compacted, inputs, seconds, sparse_layer)
    except NoCompiler as error:
        notes.append(str(error))
    return _fastest(candidates, inputs, compacted, seconds, notes)


def _on_gpu(masked: nn.Module, inputs: tuple[Tensor, ...], seconds: float) -> Deployed:
    """Return the masked network with semi-structured products where masks and types allow."""
    network, changed = with_semi_structured(masked, inputs, seconds)
    layers = [
        LayerChoice(
            name, "2:4" if name in changed else "dense", int(torch.count_nonzero(weight)),
            weight.numel(), int(torch.count_nonzero(weight)) * positions, None, 0.0,
        )
        for (name, weight), positions in _positions(masked, inputs).items()
    ]  # fmt: skip
    note = f"{len(changed)} of {len(layers)} layers run as PyTorch's semi-structured products"
    return Deployed(network, layers, {}, [note])


def _sparse_candidates(
    graph: fx.GraphModule, compacted: nn.Module, inputs: tuple[Tensor, ...], seconds: float
) -> dict[str, nn.Module]:
    """Return all layers sparse, and those alone that are then faster than torch's."""
    sparse = in_parts(graph)
    if not sparse_networks(sparse):
        return {}
    tune_(sparse, inputs, seconds)
    times = sparse_seconds(sparse, inputs, seconds)
    dense = dense_seconds(compacted, inputs, seconds)
    found = {"sparse": sparse}
    for name, share in (("mixed", 1.0), ("mostly sparse", 2.0)):
        losing = {layer for layer, time in times.items() if time > share * dense.get(layer, 1e9)}
        if losing and losing != set(times):
            mixed = in_parts(graph, losing)
            tune_(mixed, inputs, seconds)
            found[name] = mixed
    return found


def _fastest(
    candidates: dict[str, nn.Module],
    inputs: tuple[Tensor, ...],
    compacted: nn.Module,
    seconds: float,
    notes: list[str],
) -> Deployed:
    """Return the candidate that is fastest on the whole network and gives the same outputs."""
    expected = candidates["masked"](*inputs)
    for name in list(candidates):
        if not same_outputs(candidates[name](*inputs), expected):
            del candidates[name]
            notes.append(f"{name} was left out: on the example it differs from the masked network")
    calls: list[Callable[[], object]] = [
        (lambda network=network: network(*inputs)) for network in candidates.values()
    ]
    timings = interleaved(calls, seconds=seconds * len(calls))
    taken = {name: timing.best for name, timing in zip(candidates, timings, strict=True)}
    best = min(taken, key=lambda name: taken[name])
    network = candidates[best]
    if sparse_networks(network):
        notes.append(f"{best} was fastest")
    else:
        notes.append(f"{best} was fastest: torch's dense layers all through")
    dense = dense_seconds(compacted, inputs, seconds)
    return Deployed(network, _account(network, compacted, inputs, dense, seconds), taken, notes)


def _account(
    network: nn.Module,
    compacted: nn.Module,
    inputs: tuple[Tensor, ...],
    dense: dict[str, float],
    seconds: float,
) -> list[LayerChoice]:
    """Say of each layer how it is computed and what that costs."""
    sparse = sparse_seconds(network, inputs, seconds) if sparse_networks(network) else {}
    positions = _positions(compacted, inputs)
    out = []
    for name, weight in positions:
        kept = int(torch.count_nonzero(weight))
        kind = "sparse" if name in sparse else "dense"
        work = kept * positions[name, weight]
        times = (sparse.get(name), dense.get(name, 0.0))
        out.append(LayerChoice(name, kind, kept, weight.numel(), work, *times))
    return out


def _positions(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[tuple[str, Tensor], int]:
    """Return how often every weight of a layer is used on ``inputs``: images times positions."""
    found: dict[tuple[str, Tensor], int] = {}
    hooks = []
    for name, layer in weighted_layers(network).items():
        weight = layer.get_parameter("weight")
        found[name, weight] = 0

        def count(_: nn.Module, __: object, out: Tensor, key: tuple[str, Tensor]) -> None:
            found[key] += out.numel() // key[1].shape[0]

        hooks.append(layer.register_forward_hook(partial(count, key=(name, weight))))
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return found
