"""Training and evaluating a pruned multilayer perceptron over its surviving weights alone.

The network stays an ordinary one: its weights, and the optimizer's momentum, are read before and
written after every epoch.  The work is that of ``sparse_training.c``, on one thread.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossprune.data import Dataset, Split
from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import not_finite
from lossprune.training.mirror import (
    Mirror,
    momentum_of,
    read_,
    read_momentum_,
    write_,
    write_momentum_,
)
from lossprune.training.perceptron.kernel import SparseKernel
from lossprune.training.perceptron.structure import find_survivors, layers_on_cpu, normalisation
from lossprune.training.plain import check_batch_size, plain_settings, step_without_gradients

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
        layers = layers_on_cpu(network, dataset)
        self.network = network
        self.dataset = dataset
        self.layers, blocks = find_survivors(layers, mask)
        idle = sum(len(where) for _, where in self._idle())
        self._kernel = SparseKernel(self.layers, blocks, idle, normalisation(dataset))

    @property
    def reason(self) -> str:
        """What is trained, in one line: surviving weights and hidden units that reach an output."""
        weights = sum(kept.layer.linear.weight.numel() for kept in self.layers)
        used = sum(len(kept.weights) for kept in self.layers)
        units = sum(len(kept.live) for kept in self.layers[:-1])
        hidden = sum(kept.layer.linear.out_features for kept in self.layers[:-1])
        return (
            f"{used:,} of {weights:,} weights of linear layers, {units:,} of {hidden:,} "
            "hidden units"
        )

    def train_epoch(
        self, optimizer: Optimizer, *, batch_size: int = 100, generator: torch.Generator
    ) -> float:
        """As :meth:`lossprune.training.Training.train_epoch`, for plain SGD."""
        group = plain_settings(self.network, optimizer)
        check_batch_size(batch_size)
        self.network.train()
        train = self.dataset.train
        order = torch.randperm(len(train), generator=generator)
        mirrors = self._mirrors()
        read_(mirrors)
        read_momentum_(mirrors, optimizer)
        mean, failed = self._kernel.epoch(train, order, batch_size, group)
        write_(mirrors)
        if group["momentum"]:
            for parameter in self.network.parameters():  # of removed weights it is 0
                momentum_of(parameter, optimizer).zero_()
            write_momentum_(mirrors, optimizer)
        step_without_gradients(optimizer)
        if failed:
            raise not_finite(failed)
        return mean

    def evaluate(self, split: Split) -> Evaluation:
        """Return what :func:`lossprune.training.evaluate` does, to rounding.

        The examples are shared among torch's threads; their number does not change the result.
        """
        read_(self._mirrors())
        images, labels = split.images.contiguous(), split.labels.contiguous()
        starts = range(0, len(split), _CHUNK)

        def chunk(first: int) -> tuple[float, int]:
            return self._kernel.evaluate(images, labels, first, min(_CHUNK, len(split) - first))

        if torch.get_num_threads() > 1 and len(starts) > 1:
            with ThreadPoolExecutor(torch.get_num_threads()) as threads:
                parts = list(threads.map(chunk, starts))
        else:
            parts = [chunk(first) for first in starts]
        losses, wrong = zip(*parts, strict=True)
        return Evaluation.mean(sum(losses), sum(wrong), len(split))

    def _mirrors(self) -> list[Mirror]:
        """What is trained, then what only decays, and the kernel's copies of it."""
        kernel = self._kernel
        found = [
            Mirror(parameter, where, *copies)
            for kept, weights, biases in zip(
                self.layers, kernel.weights, kernel.biases, strict=True
            )
            for parameter, where, copies in (
                (kept.layer.linear.weight, kept.weights, weights),
                (kept.layer.linear.bias, kept.live, biases),
            )
            if parameter is not None
        ]
        start = 0
        for parameter, where in self._idle():
            own = slice(start, start + len(where))
            found.append(Mirror(parameter, where, *(copy[own] for copy in kernel.idle)))
            start = own.stop
        return found

    def _idle(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters, and the positions in them, that lead to no output."""
        return [
            (parameter, where)
            for kept in self.layers
            for parameter, where in (
                (kept.layer.linear.weight, kept.idle_weights),
                (kept.layer.linear.bias, kept.idle),
            )
            if parameter is not None and len(where)
        ]
