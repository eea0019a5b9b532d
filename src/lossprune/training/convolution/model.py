"""A pruned network that trains at the cost of its kept weights, in anyone's loop."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from lossprune.channels.calls import Call
from lossprune.channels.nodes import changed
from lossprune.channels.tracing import UntraceableError
from lossprune.deployment.candidates import understood
from lossprune.deployment.traced import GraphInputs, traced
from lossprune.kernels.compiler import NoCompiler
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.matching import match
from lossprune.pruning.wholeness import unwrapped
from lossprune.torch_state import in_mode, seeded
from lossprune.training.convolution.graph import rewritten
from lossprune.training.convolution.kernel import library
from lossprune.training.convolution.layers import Scattered, SparseLayer
from lossprune.training.convolution.replacing import hooked_backwards, replaced


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
        vars(self)["forward"] = _Forward(self)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the network returns."""
        if not self._graphs:
            return self.network(*inputs, **named)
        graph, arguments = self._graphs[self.training]
        return graph(*arguments(inputs, named))

    @property
    def traced(self) -> bool:
        """Whether its operations could be followed, so that layers share one layout."""
        return bool(self._graphs)

    @torch.no_grad()
    def write_back_(self) -> nn.Module:
        """Put parameters and buffers into the network that this was made of, and return it.

        Kept weights get their values, removed ones are 0.
        """
        model = unwrapped(self._source.network)
        own = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        for name, values, kept in self.mirrored():
            found = values
            if kept is not None:
                found = values.new_zeros(own[name].numel()).index_copy(0, kept.long(), values)
            own[name].copy_(found.view(own[name].shape))
        return self._source.network

    def mirrored(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Yield parameters and buffers: name in the network, tensor here, places if pruned."""
        for path, module in self.network.named_modules(remove_duplicate=False):
            ours = isinstance(module, parametrize.ParametrizationList) and module[0]
            if isinstance(module, Scattered) or isinstance(ours, Scattered):
                continue
            prefix = f"{path}." if path else ""
            if isinstance(module, SparseLayer):
                yield f"{prefix}weight", module.values, module.kept
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


class _Forward:
    """The ``forward`` of a model with the signature of the network's, which trainers read."""

    def __init__(self, model: SparseModel) -> None:
        self._model = model

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return SparseModel.forward(self._model, *inputs, **named)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(unwrapped(self._model._source.network).forward)


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
    inner = unwrapped(network)
    kept = _kept(inner, mask)
    _check(inner)
    with in_mode(inner, training=False):
        call, _ = understood(inner, example)
    notes: list[str] = []
    with seeded(0):  # a dropout that is always on draws numbers
        made = SparseModel(replaced(inner, kept, call, notes), network, notes)
        try:
            for training in (True, False):
                made._graphs[training] = _graph(made.network, call, training, notes)
        except UntraceableError as error:
            made._graphs.clear()
            notes.append(f"layers change their layout each by itself: {error}")
    return made.train()


def _kept(network: nn.Module, mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is kept of every pruned parameter, by each of its names."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    kept: dict[Tensor, Tensor] = {}
    for name, found in match(mask, network).items():
        parameter = parameters[found]
        kept[parameter] = kept.get(parameter, True) & mask[name].bool()
    return {name: kept[parameter] for name, parameter in parameters.items() if parameter in kept}


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


def _graph(
    network: nn.Module, call: Call, training: bool, notes: list[str]
) -> tuple[nn.Module, GraphInputs]:
    """Return the network's graph in one mode, over blocks."""
    if isinstance(network, SparseLayer):
        raise UntraceableError("the network is one layer")
    if changed(network) or any(map(hooked_backwards, network.modules())):
        raise UntraceableError("the network has hooks")
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
        if not any(said == note or said.startswith(f"{note}: ") for said in notes):
            notes.append(note)
    return found.module, arguments
