"""Training a pruned network without the channels that lead to no output.

The network stays an ordinary one: a smaller copy is trained, and parameters, running statistics and
the optimizer's momentum are read before and written after every epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lossprune.channels.costs import multiply_adds
from lossprune.channels.narrowing import Index, NotNarrowableError, narrow
from lossprune.data import Dataset, Split
from lossprune.pruning.matching import match
from lossprune.training.evaluation import Evaluation, evaluate
from lossprune.training.loop import train_epoch
from lossprune.training.mirror import MOMENTUM, Mirror, read_, write_, write_momentum_
from lossprune.training.plain import hooked_module, plain_settings, step_without_gradients
from lossprune.training.precision import Forward


class CompactedTraining:
    """The channels of a pruned network from which a path of kept weights leads to an output.

    The others get no gradient, so what comes out is what :func:`lossprune.training.train_epoch`
    gives with the mask enforced, to rounding: order and augmentation of the examples, momentum,
    errors, and the weight decay of what was left out, step by step.  One thing is not the same:
    running statistics of batch norms over channels that were left out, which nothing reads.

    Args:
        network: trained in place, with its removed weights at 0.
        mask: bool tensors by parameter name, True where a weight survives.
        dataset: on the network's device.
        forward: how logits are computed; of ``network``, which the smaller copy follows.

    Attributes:
        multiply_adds: of linear and convolution layers for one example, in the network and in the
            smaller copy.

    Raises:
        NotNarrowableError: the network cannot be trained so; the message says why.
    """

    mode = "compacted"

    def __init__(
        self,
        network: nn.Module,
        mask: Mapping[str, Tensor],
        dataset: Dataset,
        forward: Forward | None = None,
    ) -> None:
        _check(network)
        narrowing = narrow(network, mask)
        self.network = network
        self.dataset = dataset
        self._small, self._mask, self._index = narrowing.model, narrowing.mask, narrowing.index
        kept = {found: mask[name] for name, found in match(mask, network).items()}
        self._idle_index = _idle(network, narrowing.index, kept)
        parameters = dict(network.named_parameters())
        self._idle = {
            name: nn.Parameter(parameters[name].detach()[index])
            for name, index in self._idle_index.items()
        }
        forward = forward or Forward(network)
        self._forward = Forward(self._small, forward.amp, compiled=forward.compiled)
        example = dataset.inputs(dataset.train.images[:1])
        self.multiply_adds = multiply_adds(network, example), multiply_adds(self._small, example)

    @property
    def reason(self) -> str:
        """How much smaller it is, in one line."""
        before, after = self.multiply_adds
        return f"{after / 1e6:,.1f} of {before / 1e6:,.1f} million multiply-adds an example"

    def train_epoch(
        self, optimizer: Optimizer, *, batch_size: int = 100, generator: torch.Generator
    ) -> float:
        """As :meth:`lossprune.training.Training.train_epoch`, for plain SGD."""
        parameters = self._parameters()
        inner = self._optimizer(optimizer, parameters)
        tensors = (*parameters, *self._buffers())
        read_(tensors)
        self.network.train()
        try:
            with self._mask.enforce(self._small, inner):
                return train_epoch(
                    self._small,
                    self.dataset,
                    inner,
                    batch_size=batch_size,
                    generator=generator,
                    forward=self._forward,
                )
        finally:
            write_(tensors)
            trained = [(mirror, inner.state[mirror.part].get(MOMENTUM)) for mirror in parameters]
            write_momentum_((replace(one, velocity=own) for one, own in trained), optimizer)
            step_without_gradients(optimizer)

    def evaluate(self, split: Split) -> Evaluation:
        """Return what :func:`lossprune.training.evaluate` does, to rounding."""
        read_((*self._parameters(), *self._buffers()))
        return evaluate(self._small, self.dataset, split, forward=self._forward)

    def _optimizer(self, optimizer: Optimizer, parameters: Sequence[Mirror]) -> SGD:
        """The same for what is trained here, with its momentum; what is idle gets zeros."""
        group = plain_settings(self.network, optimizer)
        inner = SGD(
            [mirror.part for mirror in parameters],
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            weight_decay=float(group["weight_decay"]),
            fused=True,
        )
        for mirror in parameters:
            momentum = optimizer.state[mirror.whole].get(MOMENTUM)
            if momentum is not None:
                inner.state[mirror.part][MOMENTUM] = mirror.of(momentum).clone()
        zeros = [(part, torch.zeros_like(part)) for part in self._idle.values()]

        def give_zeros(*_: object) -> None:
            for part, zero in zeros:
                part.grad = zero

        inner.register_step_pre_hook(give_zeros)
        return inner

    def _parameters(self) -> list[Mirror]:
        whole = dict(self.network.named_parameters())
        return [
            Mirror(whole[name], index[name], part)
            for parts, index in (
                (dict(self._small.named_parameters()), self._index),
                (self._idle, self._idle_index),
            )
            for name, part in parts.items()
        ]

    def _buffers(self) -> list[Mirror]:
        whole = dict(self.network.named_buffers())
        return [
            Mirror(whole[name], self._index[name], part)
            for name, part in self._small.named_buffers()
        ]


def _check(network: nn.Module) -> None:
    if hooked_module(network) is not None:
        raise NotNarrowableError("it has hooks")
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            raise NotNarrowableError(f"{name} is not trained")


def _idle(
    network: nn.Module, index: Mapping[str, Index], mask: Mapping[str, Tensor]
) -> dict[str, Index]:
    """Where each parameter has surviving numbers that are not in the smaller copy."""
    found: dict[str, Index] = {}
    for name, parameter in network.named_parameters():
        idle = torch.ones_like(parameter, dtype=torch.bool)
        if name in mask:
            idle &= mask[name].to(idle.device)
        idle[index[name]] = False
        if idle.any():
            found[name] = idle.nonzero(as_tuple=True)
    return found
