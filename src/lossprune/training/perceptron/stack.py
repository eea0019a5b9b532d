"""Training pruned perceptrons over their surviving weights alone, on a GPU: many, or one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossprune.data import Dataset, Split
from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import Outcome, mean_of, not_finite
from lossprune.training.mirror import Mirror, read_, read_momentum_, write_, write_momentum_
from lossprune.training.perceptron.stack_kernel import StackKernel, StackMachine, gpu
from lossprune.training.perceptron.stack_layout import (
    StackExamples,
    Where,
    lay_out,
    split_in_parts,
)
from lossprune.training.perceptron.structure import NotSparseError, check_fit, read_layers
from lossprune.training.plain import step_without_gradients
from lossprune.training.stacked.epoch import Epoch, TogetherTraining
from lossprune.training.stacked.stackable import read_members


class SparseStack(TogetherTraining):
    """Pruned perceptrons that train together on a GPU, each over its own surviving weights.

    What comes out is what :class:`lossprune.training.StackedTraining` gives, to rounding; the work
    is that of ``sparse_stack.cu``: one launch an epoch, a block a network.  An epoch of a
    network is the same to the bit whichever others train beside it.

    Networks are read when the stack is made, and an optimizer's momentum when its network first
    trains; what was trained stays on the device until :meth:`store` writes it back.

    Args:
        networks: built alike: ``nn.Sequential`` of flatten, linear layers, tanh and ReLU, none
            after the last layer, in float32.
        masks: for each, bool tensors by parameter name, True where a weight is kept.
        datasets: for each, on the networks' device, not augmented.
        machine: where the kernels run; None: the networks' GPU.

    Raises:
        NotSparseError, NotStackableError: networks, masks or data are not like that, or more
            weights survive than a GPU's shared memory has room for; the message says why.
        NoCudaCompiler: CUDA files cannot be compiled here.
    """

    mode = "sparse stack"

    def __init__(
        self,
        networks: Sequence[nn.Module],
        masks: Sequence[Mapping[str, Tensor] | None],
        datasets: Sequence[Dataset],
        *,
        machine: StackMachine | None = None,
    ) -> None:
        members = read_members(networks, masks, datasets)
        super().__init__(networks, datasets)
        device = next(networks[0].parameters()).device
        if machine is None:
            if device.type != "cuda":
                raise NotSparseError(f"the networks are on {device}, not on a GPU")
            machine = gpu(device)
        layers = read_layers(networks[0])
        for network, dataset in zip(networks, datasets, strict=True):
            check_fit(layers, dataset)
            _check_place(network, dataset)
        self._layouts = [
            lay_out(layers, {name: kept.cpu() for name, kept in member.kept.items()})
            for member in members
        ]
        channels = max(len(dataset.std) for dataset in datasets)
        self._kernel = StackKernel(self._layouts, len(layers), channels, device, machine)
        self._values = [_on(device, layout.values) for layout in self._layouts]
        self._idle = [_on(device, layout.idle) for layout in self._layouts]
        self._optimizers: dict[int, Optimizer] = {}
        self._splits: dict[str, tuple[list[int], StackExamples]] = {}
        for number in range(len(networks)):
            read_(self._mirrors(number))

    @property
    def reason(self) -> str:
        """What is trained, in one line."""
        return f"{len(self.networks)} networks at once, {self.sizes}"

    @property
    def sizes(self) -> str:
        """How many parameters of a network have a path to an output, in words."""
        counts = [layout.sizes[1] for layout in self._layouts]
        some = f"{min(counts):,}" + (f" to {max(counts):,}" if max(counts) > min(counts) else "")
        return f"{some} parameters with a path to an output"

    def _train(self, epoch: Epoch) -> dict[int, Outcome]:
        for member, optimizer in epoch.optimizers.items():
            if self._optimizers.get(member) is not optimizer:
                self._optimizers[member] = optimizer
                read_momentum_(self._mirrors(member), optimizer)
        groups, settings = epoch.groups, epoch.settings
        ordered = [member for group in groups for member in group.members]
        parts = split_in_parts(
            [group.dataset for group in groups],
            lambda dataset: dataset.train,
            min(epoch.batch_size, len(self.datasets[0].train)),
            [group.draw_order() for group in groups],
        )
        totals, bad = self._kernel.epoch(
            ordered,
            [number for number, group in enumerate(groups) for _ in group.members],
            parts,
            batch=min(epoch.batch_size, parts.examples),
            rates=[float(settings[member]["lr"]) for member in ordered],
            decays=[float(settings[member]["weight_decay"]) for member in ordered],
            momentum=epoch.momentum,
        )
        return {
            member: not_finite(failed) if failed else total / parts.examples
            for member, total, failed in zip(ordered, totals.tolist(), bad.tolist(), strict=True)
        }

    def _evaluate(self, which: str, members: Sequence[int]) -> dict[int, Evaluation]:
        group_of, parts = self._split(which)
        sums = self._kernel.evaluate(members, [group_of[member] for member in members], parts)
        return {
            member: Evaluation.mean(loss, wrong, parts.examples)
            for member, loss, wrong in zip(members, *(own.tolist() for own in sums), strict=True)
        }

    def store(self, members: Iterable[int]) -> None:
        """Write parameters and momentum of these members to their networks and optimizers."""
        for member in members:
            mirrors, optimizer = self._mirrors(member), self._optimizers.get(member)
            write_(mirrors)
            if optimizer is not None and optimizer.param_groups[0]["momentum"]:
                write_momentum_(mirrors, optimizer)

    def _mirrors(self, member: int) -> list[Mirror]:
        """The parameters that are trained or decay, and the kernel's copies of them."""
        kernel, found = self._kernel, []
        named = dict(self.networks[member].named_parameters())
        for kind, places, values, velocities in (
            (1, self._values[member], kernel.values, kernel.velocities),
            (2, self._idle[member], kernel.idle, kernel.idle_velocities),
        ):
            start = int(kernel.starts[member, kind])
            for name, where in places:
                own = slice(start, start + len(where))
                start = own.stop
                if name in named:
                    found.append(Mirror(named[name], where, values[own], velocities[own]))
        return found

    def _split(self, which: str) -> tuple[list[int], StackExamples]:
        """Return which group of examples is each member's, and a split's examples; made once."""
        if which not in self._splits:
            different = list({id(dataset): dataset for dataset in self.datasets}.values())
            number = {id(dataset): group for group, dataset in enumerate(different)}
            parts = split_in_parts(
                different, lambda dataset: dataset.scored[which], self._kernel.panel()
            )
            self._splits[which] = ([number[id(dataset)] for dataset in self.datasets], parts)
        return self._splits[which]


class SparseGpuTraining:
    """The surviving weights of a multilayer perceptron on a GPU, for whole epochs of SGD.

    What :class:`lossprune.training.SparseTraining` is on the CPU.  Its epochs are, to the bit, what
    they are in a sparse stack of many; arguments and errors are those of
    :class:`lossprune.training.SparseStack`.
    """

    mode = "sparse"

    def __init__(
        self,
        network: nn.Module,
        mask: Mapping[str, Tensor],
        dataset: Dataset,
        *,
        machine: StackMachine | None = None,
    ) -> None:
        self.dataset = dataset
        self._stack = SparseStack([network], [mask], [dataset], machine=machine)

    @property
    def reason(self) -> str:
        """What is trained, in one line."""
        return f"on the GPU, {self._stack.sizes}"

    def train_epoch(
        self, optimizer: Optimizer, *, batch_size: int = 100, generator: torch.Generator
    ) -> float:
        """As :meth:`lossprune.training.Training.train_epoch`, for plain SGD."""
        (outcome,) = self._stack.train_epoch(
            [optimizer], batch_size=batch_size, generators=[generator]
        )
        self._stack.store([0])
        step_without_gradients(optimizer)
        return mean_of(outcome)

    def evaluate(self, split: Split) -> Evaluation:
        """Return what :func:`lossprune.training.evaluate` does, to rounding.

        Raises:
            ValueError: it is none of the splits that the data set scores.
        """
        for which, own in self.dataset.scored.items():
            if own.images.data_ptr() == split.images.data_ptr() and len(own) == len(split):
                return self._stack.evaluate(which)[0]
        raise ValueError("split must be one of the data set's own")


def _check_place(network: nn.Module, dataset: Dataset) -> None:
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise NotSparseError(f"{name} is {parameter.dtype}, not torch.float32")
    if dataset.train.images.device != dataset.train.labels.device:
        raise NotSparseError("its images are not on the networks' device")


def _on(device: torch.device, places: Sequence[Where]) -> list[Where]:
    return [(name, where.to(device)) for name, where in places]
