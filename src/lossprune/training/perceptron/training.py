"""Training and evaluating a pruned multilayer perceptron over its surviving weights alone.

The network stays an ordinary one: its weights, and the optimizer's momentum, are read before and
written after every epoch.  The work is that of ``sparse_training.c``, on one thread.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossprune.data import Dataset, Split
from lossprune.pruning.curvature.distributed import processes
from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import CHECK_EVERY, not_finite
from lossprune.training.perceptron.kernel import Kernel
from lossprune.training.perceptron.structure import (
    NotSparseError,
    Stage,
    find_survivors,
    read_layers,
    read_stages,
)
from lossprune.training.plain import plain_settings

_CHUNK = 5120  # examples of an evaluation that one thread takes at a time


class SparseTraining:
    """The surviving weights of a multilayer perceptron, for whole epochs of SGD.

    What comes out is what :func:`lossprune.training.train_epoch` gives with the mask enforced, to
    rounding: order of examples, momentum, weight decay, biases, errors.  On the same processor it
    is the same to the bit, whatever the number of threads.

    >>> from lossprune.data import load
    >>> from lossprune.networks import NETWORKS
    >>> from lossprune.training import make_optimizer
    >>> digits = load("digits", seed=1111)
    >>> network = NETWORKS["MLP"](shape=digits.shape, generator=torch.Generator().manual_seed(1))
    >>> mask = {"fc1.weight": torch.rand(300, 64) < 0.1}
    >>> with torch.no_grad():
    ...     _ = network.fc1.weight.masked_fill_(~mask["fc1.weight"], 0)
    >>> training = SparseTraining(network, mask, digits)  # doctest: +SKIP
    >>> optimizer = make_optimizer(network, lr=0.1, l2=5e-4)
    >>> generator = torch.Generator().manual_seed(1112)
    >>> training.train_epoch(optimizer, generator=generator)  # doctest: +SKIP

    Args:
        network: ``nn.Sequential`` of flatten, linear layers, tanh and ReLU, in float32 on the CPU;
            trained in place.
        mask: bool tensors by parameter name, True where a weight survives; a weight that is not
            named survives as a whole.
        dataset: on the CPU, not augmented.

    Raises:
        NotSparseError: network, mask or data set are not like that; the message says why.
        NoCompiler: there is no C compiler here.
    """

    mode = "sparse"

    def __init__(self, network: nn.Module, mask: Mapping[str, Tensor], dataset: Dataset) -> None:
        stages = read_stages(network)
        check_data(dataset, network)
        self.network = network
        self.dataset = dataset
        self.layers, blocks = find_survivors(stages, mask)
        idle = sum(len(where) for _, where in self._idle())
        self._kernel = Kernel(self.layers, blocks, idle)
        self._kernel.normalise(*normalisation(dataset))

    @property
    def reason(self) -> str:
        """What is trained, in one line: surviving weights and hidden units that reach an output."""
        weights = sum(stage.linear.weight.numel() for stage in (it.stage for it in self.layers))
        used = sum(len(layer.weights) for layer in self.layers)
        units = sum(len(layer.live) for layer in self.layers[:-1])
        hidden = sum(layer.stage.linear.out_features for layer in self.layers[:-1])
        return (
            f"{used:,} of {weights:,} weights of linear layers, {units:,} of {hidden:,} "
            "hidden units"
        )

    def train_epoch(
        self, optimizer: Optimizer, *, batch_size: int = 100, generator: torch.Generator
    ) -> float:
        """Do what :func:`lossprune.training.train_epoch` does, and return the mean loss.

        Args:
            optimizer: SGD on all parameters of the network, in one group, without Nesterov's
                momentum and dampening; its momentum is read and written in torch's own format.
            batch_size: examples a step; the last batch holds what is left.
            generator: draws the order, as the dense loop would.

        Raises:
            DivergedError: the loss becomes infinite or NaN.
            ValueError: another optimizer.
        """
        group = plain_settings(self.network, optimizer)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        self.network.train()
        train = self.dataset.train
        order = torch.randperm(len(train), generator=generator)
        self._read_parameters()
        self._read_velocities(optimizer)
        mean, failed = self._kernel.epoch(
            train.images.contiguous(),
            train.labels.contiguous(),
            order,
            batch=batch_size,
            check=CHECK_EVERY,
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            decay=float(group["weight_decay"]),
        )
        self._write_parameters()
        if group["momentum"]:
            self._write_velocities(optimizer)
        # Hooks and schedules see a step; without gradients it changes no parameter.
        optimizer.zero_grad(set_to_none=True)
        optimizer.step()
        if failed:
            raise not_finite(failed)
        return mean

    def evaluate(self, split: Split) -> Evaluation:
        """Return what :func:`lossprune.training.evaluate` does, to rounding.

        The examples are shared among torch's threads; their number does not change the result.
        """
        self._read_parameters()
        images, labels = split.images.contiguous(), split.labels.contiguous()
        starts = range(0, len(split), _CHUNK)

        def chunk(first: int) -> tuple[float, int]:
            return self._kernel.evaluate(images, labels, first, min(_CHUNK, len(split) - first))

        if torch.get_num_threads() > 1 and len(starts) > 1:
            with ThreadPoolExecutor(torch.get_num_threads()) as threads:
                parts = list(threads.map(chunk, starts))
        else:
            parts = [chunk(first) for first in starts]
        loss, wrong = (sum(values) / len(split) for values in zip(*parts, strict=True))
        return Evaluation(loss, wrong)

    def _idle(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters, and the positions in them, that lead to no output."""
        return [
            (parameter, where)
            for layer in self.layers
            for parameter, where in (
                (layer.stage.linear.weight, layer.idle_weights),
                (layer.stage.linear.bias, layer.idle),
            )
            if parameter is not None and len(where)
        ]

    def _active(
        self, weights: list[Tensor], biases: list[Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Parameters, the positions in them that are trained, and the kernel's copy of those."""
        return [
            (parameter, where, copy)
            for layer, weight, bias in zip(self.layers, weights, biases, strict=True)
            for parameter, where, copy in (
                (layer.stage.linear.weight, layer.weights, weight),
                (layer.stage.linear.bias, layer.live, bias),
            )
            if parameter is not None
        ]

    def _places(self, velocity: bool = False) -> list[tuple[Tensor, Tensor, Tensor]]:
        """All positions, and where the kernel keeps their values (or their velocities)."""
        kernel = self._kernel
        if velocity:
            places = self._active(kernel.weight_velocities, kernel.bias_velocities)
        else:
            places = self._active(kernel.weights, kernel.biases)
        idle = kernel.idle_velocity if velocity else kernel.idle
        start = 0
        for parameter, where in self._idle():
            places.append((parameter, where, idle[start : start + len(where)]))
            start += len(where)
        return places

    @torch.no_grad()
    def _read_parameters(self) -> None:
        for parameter, where, copy in self._places():
            copy.copy_(parameter.view(-1)[where])

    @torch.no_grad()
    def _write_parameters(self) -> None:
        for parameter, where, copy in self._places():
            parameter.view(-1)[where] = copy

    def _read_velocities(self, optimizer: Optimizer) -> None:
        for parameter, where, copy in self._places(velocity=True):
            buffer = optimizer.state[parameter].get("momentum_buffer")
            copy.copy_(buffer.view(-1)[where]) if buffer is not None else copy.zero_()

    def _write_velocities(self, optimizer: Optimizer) -> None:
        for parameter in self.network.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(
                parameter, requires_grad=False
            )
        for parameter, where, copy in self._places(velocity=True):
            optimizer.state[parameter]["momentum_buffer"].view(-1)[where] = copy


def check_sparse(network: nn.Module, dataset: Dataset) -> None:
    """Raise NotSparseError unless this network can be trained sparsely where it is."""
    if next(network.parameters()).device.type == "cuda":
        check_fit(read_layers(network), dataset)
    else:
        check_data(dataset, network)


def check_data(dataset: Dataset, network: nn.Module) -> None:
    """Raise NotSparseError unless the CPU can do the epochs of this network on this data set."""
    stages = read_stages(network)
    check_fit(stages, dataset)
    if dataset.train.images.device.type != "cpu":
        raise NotSparseError("the data are not on the CPU")


def check_fit(stages: Sequence[Stage], dataset: Dataset) -> None:
    """Raise NotSparseError unless a perceptron of these layers can be trained on this data set."""
    if processes() > 1:
        raise NotSparseError(f"sparse training is for one process, and there are {processes()}")
    pixels = dataset.train.images[0].numel()
    if dataset.augmented:
        raise NotSparseError("its training images are augmented")
    if stages[0].linear.in_features != pixels:
        raise NotSparseError(
            f"{stages[0].name} takes {stages[0].linear.in_features} inputs, an image has {pixels}"
        )
    if len(dataset.classes) > stages[-1].linear.out_features:
        raise NotSparseError(f"{stages[-1].name} has fewer outputs than the data have classes")


def normalisation(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return factor and offset of every pixel, rounded as the dense batches round them."""
    channels, height, width = dataset.shape
    spread = [channels // len(dataset.std) * height * width] * len(dataset.std)
    factors = [1 / (dataset.scale * std) for std in dataset.std]
    offsets = [mean / std for mean, std in zip(dataset.mean, dataset.std, strict=True)]
    repeats = torch.tensor(spread)
    return (
        torch.tensor(factors, dtype=torch.float32).repeat_interleave(repeats),
        torch.tensor(offsets, dtype=torch.float32).repeat_interleave(repeats),
    )
