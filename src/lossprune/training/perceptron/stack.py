"""Training many pruned perceptrons together over their surviving weights alone, on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossprune.data import Dataset
from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import DivergedError, not_finite
from lossprune.training.perceptron.stack_data import Parts, split_in_parts
from lossprune.training.perceptron.stack_kernel import Kernel, Machine, gpu
from lossprune.training.perceptron.stack_layout import Where, lay_out
from lossprune.training.perceptron.structure import NotSparseError, read_layers
from lossprune.training.perceptron.training import check_fit
from lossprune.training.plain import common_momentum, plain_settings
from lossprune.training.stacked.batches import group_by_order
from lossprune.training.stacked.stackable import read_members
from lossprune.training.stacked.state import momentum_of


class SparseStack:
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
        machine: Machine | None = None,
    ) -> None:
        members = read_members(networks, masks, datasets)
        self.networks, self.datasets = tuple(networks), tuple(datasets)
        device = next(networks[0].parameters()).device
        if machine is None:
            if device.type != "cuda":
                raise NotSparseError(f"the networks are on {device}, not on a GPU")
            machine = gpu(device)
        stages = read_layers(networks[0])
        for network, dataset in zip(networks, datasets, strict=True):
            check_fit(stages, dataset)
            _check_place(network, dataset)
        self._layouts = [
            lay_out(stages, {name: kept.cpu() for name, kept in it.kept.items()}) for it in members
        ]
        channels = max(len(dataset.std) for dataset in datasets)
        self._kernel = Kernel(self._layouts, len(stages), channels, device, machine)
        self._values = [_on(device, it.values) for it in self._layouts]
        self._idle = [_on(device, it.idle) for it in self._layouts]
        self._optimizers: dict[int, Optimizer] = {}
        self._splits: dict[str, tuple[list[int], Parts]] = {}
        for number in range(len(networks)):
            self._load(number)

    @property
    def reason(self) -> str:
        """What is trained, in one line."""
        return f"{len(self.networks)} networks at once, {self.sizes}"

    @property
    def sizes(self) -> str:
        """How many parameters of a network have a path to an output, in words."""
        counts = [it.value_count for it in self._layouts]
        some = f"{min(counts):,}" + (f" to {max(counts):,}" if max(counts) > min(counts) else "")
        return f"{some} parameters with a path to an output"

    def train_epoch(
        self,
        optimizers: Sequence[Optimizer],
        *,
        batch_size: int = 100,
        generators: Sequence[torch.Generator],
        active: Sequence[bool] | None = None,
    ) -> list[float | DivergedError]:
        """Train an epoch; arguments, results and errors as those of ``StackedTraining``."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        members = self._members(active)
        outcomes: list[float | DivergedError] = [float("nan")] * len(self.networks)
        if not members:
            return outcomes
        settings = {it: plain_settings(self.networks[it], optimizers[it]) for it in members}
        momentum = common_momentum(settings)
        for member in members:
            if self._optimizers.get(member) is not optimizers[member]:
                self._optimizers[member] = optimizers[member]
                self._load_momentum(member)
        groups = group_by_order(members, self.datasets, generators)
        ordered = [member for group in groups for member in group.members]
        parts = split_in_parts(
            [it.dataset for it in groups],
            lambda dataset: dataset.train,
            min(batch_size, len(self.datasets[0].train)),
            [it.draw_order() for it in groups],
        )
        totals, bad = self._kernel.epoch(
            ordered,
            [number for number, group in enumerate(groups) for _ in group.members],
            parts,
            batch=min(batch_size, parts.examples),
            rates=[float(settings[it]["lr"]) for it in ordered],
            decays=[float(settings[it]["weight_decay"]) for it in ordered],
            momentum=momentum,
        )
        for member, total, failed in zip(ordered, totals.tolist(), bad.tolist(), strict=True):
            outcomes[member] = not_finite(failed) if failed else total / parts.examples
        return outcomes

    def evaluate(self, which: str, active: Sequence[bool] | None = None) -> list[Evaluation]:
        """Evaluate; arguments and results as those of ``StackedTraining``."""
        evaluations = [Evaluation(float("nan"), float("nan"))] * len(self.networks)
        members = self._members(active)
        if not members:
            return evaluations
        group_of, parts = self._split(which)
        losses, wrongs = self._kernel.evaluate(members, [group_of[it] for it in members], parts)
        count = parts.examples  # divided by here: a GPU may round the quotient otherwise
        for member, loss, wrong in zip(members, losses.tolist(), wrongs.tolist(), strict=True):
            evaluations[member] = Evaluation(loss / count, wrong / count)
        return evaluations

    @torch.no_grad()
    def store(self, members: Iterable[int]) -> None:
        """Write parameters and momentum of these members to their networks and optimizers."""
        for member in members:
            optimizer = self._optimizers.get(member)
            momentum = optimizer is not None and optimizer.param_groups[0]["momentum"]
            for parameter, where, value, velocity in self._parameters(member):
                parameter.view(-1)[where] = value
                if optimizer is not None and momentum:
                    momentum_of(parameter, optimizer).view(-1)[where] = velocity

    @torch.no_grad()
    def _load(self, member: int) -> None:
        for parameter, where, value, _ in self._parameters(member):
            value.copy_(parameter.view(-1)[where])

    def _load_momentum(self, member: int) -> None:
        for parameter, where, _, velocity in self._parameters(member):
            buffer = self._optimizers[member].state[parameter].get("momentum_buffer")
            velocity.zero_() if buffer is None else velocity.copy_(buffer.view(-1)[where])

    def _parameters(self, member: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Each parameter, positions in it, and the kernel's values and velocities of those."""
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
                    found.append((named[name], where, values[own], velocities[own]))
        return found

    def _split(self, which: str) -> tuple[list[int], Parts]:
        """Return a split of all data sets, and which one is each member's; made once."""
        if which not in self.datasets[0].splits:
            raise ValueError(f"which must be train, valid or test, got {which!r}")
        if which not in self._splits:
            different = list({id(dataset): dataset for dataset in self.datasets}.values())
            number = {id(dataset): group for group, dataset in enumerate(different)}
            parts = split_in_parts(different, lambda it: it.scored[which], self._kernel.panel())
            self._splits[which] = ([number[id(it)] for it in self.datasets], parts)
        return self._splits[which]

    def _members(self, active: Sequence[bool] | None) -> list[int]:
        if active is None:
            return list(range(len(self.networks)))
        return [member for member, it in enumerate(active) if it]


def _check_place(network: nn.Module, dataset: Dataset) -> None:
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise NotSparseError(f"{name} is {parameter.dtype}, not torch.float32")
    if dataset.train.images.device != dataset.train.labels.device:
        raise NotSparseError("its images are not on the networks' device")


def _on(device: torch.device, places: Sequence[Where]) -> list[Where]:
    return [(name, where.to(device)) for name, where in places]
