"""Training a pruned network, as one of convolutions, over its kept weights alone.

The network stays an ordinary one: a copy of it that holds the kept weights as vectors is trained,
and parameters, running statistics and the optimizer's momentum are read before and written after
every epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lossprune.channels.costs import multiply_adds_by_layer, weighted_layers
from lossprune.data import Dataset, Split
from lossprune.pruning.curvature.distributed import processes
from lossprune.pruning.errors import PruningError
from lossprune.pruning.matching import match
from lossprune.training.convolution.layers import SparseLayer
from lossprune.training.convolution.model import SparseModel, sparse
from lossprune.training.evaluation import Evaluation, evaluate
from lossprune.training.loop import train_epoch
from lossprune.training.mirror import MOMENTUM, Mirror, momentum_of, read_, write_, write_momentum_
from lossprune.training.perceptron.structure import NotSparseError
from lossprune.training.plain import hooked_module, plain_settings, step_without_gradients

# Images at a time: what they need is kept for the next, so that more take more memory, and they are
# no faster. It is the memory of a training step of 100 where blocks hold 16.
EVALUATED = 112


@dataclass(frozen=True)
class KeptWork:
    """Multiply-adds of a network's linear and convolution layers for one example.

    Attributes:
        whole: of all weights.
        convolutions: of the kept weights of sparse convolutions.
        linear: of the kept weights of sparse linear layers.
        by_torch: of all weights of the other layers.
    """

    whole: int
    convolutions: int
    linear: int
    by_torch: int

    @property
    def done(self) -> int:
        """What is done."""
        return self.convolutions + self.linear + self.by_torch


class ConvolutionTraining:
    """The kept weights of a pruned network of convolutions and linear layers, on the CPU.

    What comes out is what :func:`lossprune.training.train_epoch` gives with the mask enforced, to
    rounding: order and augmentation of the examples, momentum, weight decay, running statistics,
    errors.  With the same number of threads it is the same to the bit.

    Args:
        network: in float32 on the CPU, with its removed weights at 0; trained in place.
        mask: bool tensors by parameter name, True where a weight survives.
        dataset: on the CPU.

    Attributes:
        work: what is computed for an example.
        layers: how many of its layers are sparse.
        traced: whether values stay in one layout from layer to layer.
        notes: which layers and operations run as torch runs them, and why.

    Raises:
        NotSparseError: network, mask or data set cannot be trained so; the message says why.
    """

    mode = "sparse"

    def __init__(self, network: nn.Module, mask: Mapping[str, Tensor], dataset: Dataset) -> None:
        check_convolutions(network)
        example = dataset.inputs(dataset.train.images[:2])
        try:
            if not _masks(network, mask):
                raise NotSparseError("no linear or two-dimensional convolution layer is pruned")
            self._model = sparse(network, mask, example)
        except PruningError as error:
            raise NotSparseError(str(error)) from None
        self.network = network
        self.dataset = dataset
        self.traced, self.notes = self._model.traced, tuple(self._model.notes)
        layers = self._model.network.named_modules()
        kept = {name: m.values.numel() for name, m in layers if isinstance(m, SparseLayer)}
        self.layers = len(kept)
        self.work = _work(network, kept, dataset)
        self._parameters, self._buffers = _mirrors(network, self._model)

    @property
    def reason(self) -> str:
        """How much is computed, in one line."""
        work, layers = self.work, self.layers
        return (
            f"{work.done / 1e6:,.1f} of {work.whole / 1e6:,.1f} million multiply-adds an example, "
            f"{layers:,} layer{'' if layers == 1 else 's'} over kept weights alone"
            f"{_first(self.notes)}"
        )

    def train_epoch(
        self, optimizer: Optimizer, *, batch_size: int = 100, generator: torch.Generator
    ) -> float:
        """As :meth:`lossprune.training.Training.train_epoch`, for plain SGD."""
        inner = self._optimizer(optimizer)
        tensors = (*self._parameters, *self._buffers)
        read_(tensors)
        self.network.train()
        try:
            return train_epoch(
                self._model, self.dataset, inner, batch_size=batch_size, generator=generator
            )
        finally:
            write_(tensors)
            self._give_momentum_(inner, optimizer)
            step_without_gradients(optimizer)

    def evaluate(self, split: Split) -> Evaluation:
        """Return what :func:`lossprune.training.evaluate` does, to rounding."""
        read_((*self._parameters, *self._buffers))
        return evaluate(self._model, self.dataset, split, batch_size=EVALUATED)

    def _optimizer(self, optimizer: Optimizer) -> SGD:
        """The same for what is trained here, with its momentum."""
        group = plain_settings(self.network, optimizer)
        inner = SGD(
            [mirror.part for mirror in self._parameters],
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            weight_decay=float(group["weight_decay"]),
            fused=True,
        )
        for mirror in self._parameters:
            momentum = optimizer.state[mirror.whole].get(MOMENTUM)
            if momentum is not None:
                inner.state[mirror.part][MOMENTUM] = mirror.of(momentum).clone()
        return inner

    def _give_momentum_(self, inner: SGD, optimizer: Optimizer) -> None:
        """Write the momentum back; that of removed weights is 0."""
        for mirror in self._parameters:
            own = inner.state[mirror.part].get(MOMENTUM)
            if own is not None:
                momentum_of(mirror.whole, optimizer).zero_()
                write_momentum_((replace(mirror, velocity=own),), optimizer)


def _first(notes: Sequence[str]) -> str:
    """The first note, behind a colon, and how many more there are."""
    more = f", and {len(notes) - 1} more" if len(notes) > 1 else ""
    return f": {notes[0]}{more}" if notes else ""


def check_convolutions(network: nn.Module) -> None:
    """Raise NotSparseError if a network has what such training would not do, whatever its mask."""
    if processes() > 1:
        raise NotSparseError(f"sparse training is for one process, and there are {processes()}")
    if not weighted_layers(network):
        raise NotSparseError("it has no linear or two-dimensional convolution layer")
    if hooked_module(network) is not None:
        raise NotSparseError("it has hooks, which sparse training would not run")
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            raise NotSparseError(f"{name} is not trained")
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise NotSparseError(
                f"{name} is {parameter.dtype} on {parameter.device}, not torch.float32 on the CPU"
            )


def kept_work(network: nn.Module, mask: Mapping[str, Tensor], dataset: Dataset) -> KeptWork:
    """Count what would be done if layers that keep at most half of their weights were sparse.

    Raises:
        PruningError: the mask does not fit the network.
    """
    counts = {name: int(kept.sum()) for name, kept in _masks(network, mask).items()}
    layers = weighted_layers(network)
    few = {n: count for n, count in counts.items() if 2 * count <= layers[n].weight.numel()}
    return _work(network, few, dataset)


def _masks(network: nn.Module, mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of the weights of linear and convolution layers, by the layer."""
    kept = {found: mask[name] for name, found in match(mask, network).items()}
    weights = {name: f"{name}.weight" if name else "weight" for name in weighted_layers(network)}
    return {name: kept[weight] for name, weight in weights.items() if weight in kept}


def _work(network: nn.Module, kept: Mapping[str, int], dataset: Dataset) -> KeptWork:
    """Count what is done where some layers, by their names, are sparse, with so many weights."""
    counts = multiply_adds_by_layer(network, dataset.inputs(dataset.train.images[:1]))
    linear = convolutions = 0
    for name, layer in weighted_layers(network).items():
        if name in kept:
            done = counts.get(name, 0) * kept[name] // layer.weight.numel()
            if isinstance(layer, nn.Linear):
                linear += done
            else:
                convolutions += done
    by_torch = sum(count for name, count in counts.items() if name not in kept)
    return KeptWork(sum(counts.values()), convolutions, linear, by_torch)


def _mirrors(network: nn.Module, model: SparseModel) -> tuple[list[Mirror], list[Mirror]]:
    """What is trained, and buffers, with the model's copies of them.

    Raises:
        NotSparseError: a parameter of the network is trained as several.
    """
    whole = {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }
    found: dict[int, Mirror] = {}  # by the copy, which modules may share
    for name, part, kept in model.mirrored():
        index = ... if kept is None else kept.long()
        found.setdefault(id(part), Mirror(whole[name], index, part))
    parameters = [one for one in found.values() if isinstance(one.part, nn.Parameter)]
    if len({id(mirror.whole) for mirror in parameters}) < len(parameters):
        raise NotSparseError("a pruned parameter is used twice, and not by such layers alone")
    buffers = [one for one in found.values() if not isinstance(one.part, nn.Parameter)]
    return parameters, buffers
