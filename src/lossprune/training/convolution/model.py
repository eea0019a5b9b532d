"""A pruned network that trains at the cost of its kept weights, in anyone's loop."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from lossprune.channels.calls import Call
from lossprune.channels.costs import inputs_of, weighted_layers
from lossprune.channels.nodes import changed
from lossprune.channels.tracing import UntraceableError
from lossprune.deployment.traced import GraphInputs, traced
from lossprune.kernels.compiler import NoCompiler
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.matching import match
from lossprune.torch_state import in_mode
from lossprune.training.convolution.graph import rewritten
from lossprune.training.convolution.kernel import library
from lossprune.training.convolution.layers import (
    BLOCK_NORMS,
    Scattered,
    SparseLayer,
    convolution_of,
    over_blocks,
    settings_of,
)
from lossprune.training.convolution.structure import dense_is_faster


class SparseModel(nn.Module):
    """A network whose pruned weights are vectors of those that are kept.

    It takes what the network takes and gives what the masked network gives, with gradients of its
    parameters and inputs; see :func:`sparse`.

    Attributes:
        network: the network's modules, its pruned layers replaced.
        notes: what runs as torch runs it, and why.
    """

    def __init__(self, network: nn.Module, source: nn.Module, notes: list[str]) -> None:
        super().__init__()
        self.network = network
        self.notes = notes
        self._source = _Source(source)
        # By the mode; not registered, as their layers are the network's.
        self._graphs: dict[bool, tuple[nn.Module, GraphInputs]] = {}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the network returns."""
        if not self._graphs:
            return self.network(*inputs, **named)
        graph, arguments = self._graphs[self.training]
        return graph(*arguments(inputs, named))

    @torch.no_grad()
    def write_back_(self) -> nn.Module:
        """Put parameters and buffers into the network that this was made of, and return it.

        Kept weights get their values, removed ones are 0.
        """
        model = self._source.network
        own = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        for name, values, kept in self.mirrored():
            whole = own[name]
            if kept is None:
                whole.copy_(values)
            else:
                whole.zero_()
                whole.view(-1)[kept.long()] = values
        return model

    def mirrored(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Yield parameters and buffers: name in the network, tensor here, places if pruned."""
        for path, module in self.network.named_modules(remove_duplicate=False):
            if isinstance(module, (Scattered, parametrize.ParametrizationList)):
                continue
            prefix = f"{path}." if path else ""
            if isinstance(module, SparseLayer):
                yield f"{prefix}weight", module.weight, module.kept
                if module.bias is not None:
                    yield f"{prefix}bias", module.bias, None
                continue
            tensors = [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]
            for name, tensor in tensors:
                yield f"{prefix}{name}", tensor, None
            for name, found in parametrizations(module).items():
                if isinstance(found[0], Scattered):
                    yield f"{prefix}{name}", found.original, found[0].kept


def parametrizations(module: nn.Module) -> Mapping[str, Any]:
    """Return torch's parametrisations of a module's tensors, by their names."""
    found: Any = getattr(module, "parametrizations", {})
    return found if parametrize.is_parametrized(module) else {}


class _Source:
    """Where the values are written back to; copies of a model share it."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Source":
        return self


def sparse(network: nn.Module, mask: Mask | Mapping[str, Tensor], example: Any) -> SparseModel:
    """Return a module that trains a pruned network over its kept weights alone.

    Linear and two-dimensional convolution layers run by compiled kernels on the CPU, and so does
    what stands between them: activations, batch normalisation, maxima, means and sums.  The rest
    runs as torch runs it.  The result is an ordinary module in training mode with autograd of the
    first order: its parameters are the kept values, biases and all others, so that no optimizer
    keeps a state of what is removed.

    Args:
        network: in float32 on the CPU; left as it is.
        mask: which weights are kept.
        example: a batch as it will come, or a tuple or mapping of the network's arguments.

    Raises:
        PruningError: the mask does not fit the network, or that does not run on ``example`` or is
            not in float32 on the CPU; there is no C compiler.

    >>> from lossprune import prune
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    >>> mask = prune(network, "MP", sparsity=0.9).mask
    >>> model = sparse(network, mask, torch.randn(2, 3, 8, 8))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> model(torch.randn(2, 3, 8, 8)).sum().backward()
    >>> optimizer.step()
    >>> trained = model.write_back_()  # the network itself
    """
    names = match(mask, network)
    kept = {found: mask[name].bool() for name, found in names.items()}
    _check(network)
    notes: list[str] = []
    call = Call.of(example)
    dense = _faster_dense(network, kept, call)
    made = SparseModel(_replaced(network, kept, dense, notes), network, notes)
    try:
        for training in (True, False):
            made._graphs[training] = _graph(made.network, call, training, notes)
    except UntraceableError as error:
        made._graphs.clear()
        notes.append(f"layers change their layout each by itself: {error}")
    made.train()
    return made


def _check(network: nn.Module) -> None:
    for name, tensor in network.named_parameters():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise PruningError(
                f"sparse training is in float32 on the CPU, but {name} is {tensor.dtype} on "
                f"{tensor.device}"
            )
    try:
        library()
    except NoCompiler as error:
        raise PruningError(f"sparse training needs a C compiler: {error}") from None


def _faster_dense(network: nn.Module, kept: Mapping[str, Tensor], call: Call) -> dict[str, str]:
    """Return which layers torch computes faster, by name, and why."""
    layers = {n: m for n, m in weighted_layers(network).items() if f"{n}.weight" in kept}
    with in_mode(network, training=False):
        seen = inputs_of(network, call, list(layers.values()))
    found = {}
    for name, layer in layers.items():
        if layer not in seen or _unfit(layer, ["weight"]):
            continue
        (x,) = seen[layer].inputs or (None,)
        if isinstance(x, Tensor) and x.dim() in (2, 4):
            channels, height, width = (*x.shape[1:], 1, 1)[:3]
            _, settings = settings_of(layer)
            weight = kept[f"{name}.weight"]
            done = convolution_of(weight.shape, (channels, height, width), settings)
            left = int(weight.sum())
            if dense_is_faster(done, left):
                found[name] = f"{left / weight.numel():.0%} of its weights are kept"
    return found


def _replaced(
    network: nn.Module,
    kept: Mapping[str, Tensor],
    dense: Mapping[str, str],
    notes: list[str],
) -> nn.Module:
    """Return a copy with the pruned layers replaced, but for those that are faster ``dense``."""
    whole = copy.deepcopy(network).train()
    values: dict[int, nn.Parameter] = {}  # by the parameter, which layers may share
    done: dict[nn.Module, nn.Module] = {}
    for path, module in list(whole.named_modules(remove_duplicate=False)):
        prefix = f"{path}." if path else ""
        own = [name for name in module._parameters if f"{prefix}{name}" in kept]
        new = done.get(module)
        if new is None and own:
            new = _layer(module, own, kept, prefix, values, notes, dense.get(path))
        elif new is None and type(module) in BLOCK_NORMS and not changed(module):
            new = over_blocks(module)
        if new is not None and new is not module:
            done[module] = new
            whole = _put(whole, path, new)
    return whole


def _layer(
    module: nn.Module,
    own: list[str],
    kept: Mapping[str, Tensor],
    prefix: str,
    values: dict[int, nn.Parameter],
    notes: list[str],
    dense: str | None,
) -> nn.Module:
    """A sparse layer, or the module itself with its weights made of the kept ones."""
    why = _unfit(module, own) or dense
    if why is None:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        weight, mask = module.weight, kept[f"{prefix}weight"]
        if id(weight) not in values:
            found = weight.detach().flatten()[mask.flatten()]
            values[id(weight)] = nn.Parameter(found, weight.requires_grad)
        return SparseLayer(module, mask, values[id(weight)])
    notes.append(f"{prefix.rstrip('.') or type(module).__name__} runs as torch runs it: {why}")
    for name in own:
        parametrize.register_parametrization(
            module, name, Scattered(kept[f"{prefix}{name}"]), unsafe=True
        )
    return module


def _unfit(module: nn.Module, own: list[str]) -> str | None:
    """Why a module is none that the kernels compute; None: it is."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"it is a {type(module).__name__}"
    if own != ["weight"]:
        return f"its {' and '.join(own)} are pruned"
    if why := changed(module):
        return why
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str):
            return f"its padding is {module.padding!r}"
        if module.padding_mode != "zeros":
            return f"its padding is of {module.padding_mode!r}"
    return None


def _put(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
    return root


def _graph(
    network: nn.Module, call: Call, training: bool, notes: list[str]
) -> tuple[nn.Module, GraphInputs]:
    """Return the network's graph in one mode, over blocks."""
    if isinstance(network, SparseLayer):
        raise UntraceableError("the network is one layer")
    with in_mode(network, training=training):
        trace, arguments = traced(network, call.example)
        module = trace.module(network).eval()
    own = call.copied()
    with torch.no_grad():
        ShapeProp(module).propagate(*arguments(own.inputs, own.named))
    for node, known in zip(trace.graph.nodes, module.graph.nodes, strict=True):
        node.meta.update(known.meta)
    found = rewritten(trace, network)
    for name in found.left:
        note = f"{name} runs as torch runs it"
        if note not in notes:
            notes.append(note)
    return found.module, arguments
