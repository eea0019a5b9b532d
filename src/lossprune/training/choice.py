"""Which training a pruned network gets, or many together: dense, compacted or sparse, and why."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossprune.channels.narrowing import NotNarrowableError
from lossprune.data import Dataset, Split
from lossprune.kernels.compiler import NoCompiler
from lossprune.kernels.cuda import NoCudaCompiler
from lossprune.pruning.curvature.distributed import processes
from lossprune.training.compacted import CompactedTraining
from lossprune.training.convolution.training import (
    ConvolutionTraining,
    KeptWork,
    check_convolutions,
    kept_work,
)
from lossprune.training.evaluation import Evaluation, evaluate
from lossprune.training.loop import train_epoch
from lossprune.training.perceptron.stack import SparseGpuTraining, SparseStack
from lossprune.training.perceptron.structure import NotSparseError, check_perceptron, read_layers
from lossprune.training.perceptron.training import SparseTraining
from lossprune.training.precision import Forward
from lossprune.training.stacked.epoch import TogetherTraining
from lossprune.training.stacked.stackable import NotStackableError
from lossprune.training.stacked.training import StackedTraining

TRAININGS = ("auto", "dense", "sparse")
FASTER_BELOW = 0.3  # share of the weights left; docs/training.md has the measurements
PAYS_BELOW = 0.9  # share of the work left when a network is compacted, or sparse
# What a multiply-add of a kept weight takes, where one of torch's takes 1: docs/training.md.
CONVOLUTIONS = 1.8
LINEAR = 4.0


class Training(Protocol):
    """A way to train and evaluate one network on one data set."""

    @property
    def mode(self) -> str:
        """``"dense"``, ``"compacted"``, ``"sparse"`` or ``"distributed"``."""
        ...

    @property
    def reason(self) -> str:
        """Why this one, in one line."""
        ...

    def train_epoch(
        self, optimizer: Optimizer, *, batch_size: int = 100, generator: torch.Generator
    ) -> float:
        """Do what :func:`lossprune.training.train_epoch` does, and return the mean loss.

        Args:
            optimizer: but for ``"dense"`` and ``"distributed"``, plain SGD: on all parameters of
                the network, in one group, without Nesterov's momentum and dampening; its momentum
                is read and written in torch's own format.
            batch_size: examples a step; the last batch holds what is left.
            generator: draws the order and the augmentation.

        Raises:
            DivergedError: the loss becomes infinite or NaN.
            ValueError: another optimizer.
        """
        ...

    def evaluate(self, split: Split) -> Evaluation:
        """Return loss and error rate on a split."""
        ...


class DenseTraining:
    """Training by torch on all weights; a mask is held by the optimizer's hook."""

    mode = "dense"

    def __init__(
        self, network: nn.Module, dataset: Dataset, reason: str, forward: Forward | None = None
    ) -> None:
        self.network = network
        self.dataset = dataset
        self.reason = reason
        self.forward = forward

    def train_epoch(
        self, optimizer: Optimizer, *, batch_size: int = 100, generator: torch.Generator
    ) -> float:
        """As :func:`lossprune.training.train_epoch`."""
        return train_epoch(
            self.network,
            self.dataset,
            optimizer,
            batch_size=batch_size,
            generator=generator,
            forward=self.forward,
        )

    def evaluate(self, split: Split) -> Evaluation:
        """As :func:`lossprune.training.evaluate`."""
        return evaluate(self.network, self.dataset, split, forward=self.forward)


def dense_training(
    network: nn.Module, dataset: Dataset, reason: str, forward: Forward | None = None
) -> Training:
    """Return the training on all weights: by all processes of a group, where there are several.

    Raises:
        ValueError: several processes are to compute otherwise than in float32 by torch as it is.
    """
    if processes() == 1:
        return DenseTraining(network, dataset, reason, forward)
    if forward is not None and not forward.plain:
        raise ValueError(f"amp and compile are for one process, and there are {processes()}")
    from lossprune.training.distributed import DistributedTraining

    return DistributedTraining(
        network,
        dataset,
        f"{processes()} processes share every batch; {reason}",
    )


def choose_training(
    network: nn.Module,
    mask: Mapping[str, Tensor],
    dataset: Dataset,
    train: str = "auto",
    forward: Forward | None = None,
) -> Training:
    """Return the training of a pruned network.

    Args:
        network: with its removed weights at 0.
        mask: bool tensors by parameter name, True where a weight survives.
        dataset: on the network's device.
        train: ``"dense"``; ``"sparse"``; or ``"auto"``: sparse where it can be done and pays; else
            compacted where at most ``PAYS_BELOW`` of the multiply-adds are left; else dense.
            Sparse training pays for a perceptron with at most ``FASTER_BELOW`` of its weights, and
            for other networks, on the CPU, by the multiply-adds of what is kept.
        forward: computes the logits; what is not plain is not sparse under "auto".

    Several processes of a ``torch.distributed`` group train densely, together.

    Raises:
        ValueError: ``train`` is none of these, or ``"sparse"`` cannot be done.
    """
    if train not in TRAININGS:
        raise ValueError(f"train must be one of {', '.join(TRAININGS)}, got {train!r}")
    if train == "dense":
        return dense_training(network, dataset, "asked for", forward)
    plain = forward is None or forward.plain
    if train == "sparse":
        if not plain:
            raise ValueError("train sparse cannot be done with amp or compile")
        return _sparse(network, mask, dataset)
    try:
        if not plain:
            reason = "amp or compile is asked for"
        elif (left := _left(network, mask)) > FASTER_BELOW:
            reason = f"{left:.0%} of the weights are left, more than {FASTER_BELOW:.0%}"
        else:
            return _perceptron(network)(network, mask, dataset)
    except (NoCompiler, NoCudaCompiler) as error:
        # Sparse training would gain more than compaction: let the reason be read.
        return dense_training(network, dataset, str(error), forward)
    except (NotSparseError, NotStackableError) as error:
        reason = str(error)
        if _convolves(network) and _on_cpu(network) and processes() == 1:
            return _least_work(network, mask, dataset)
    return _compacted(network, mask, dataset, forward) or dense_training(
        network, dataset, reason, forward
    )


def check_sparse(network: nn.Module, dataset: Dataset) -> None:
    """Raise NotSparseError unless a network can be trained sparsely where it is, once pruned."""
    try:
        check_perceptron(network, dataset)
    except NotSparseError:
        if not (_on_cpu(network) or _convolves(network)):
            raise
        check_convolutions(network)


def _sparse(network: nn.Module, mask: Mapping[str, Tensor], dataset: Dataset) -> Training:
    try:
        return _perceptron(network)(network, mask, dataset)
    except (NotSparseError, NotStackableError, NoCompiler, NoCudaCompiler) as error:
        reason: Exception = error
    convolves = _convolves(network)
    if isinstance(reason, NotSparseError) and (_on_cpu(network) or convolves):
        try:
            return ConvolutionTraining(network, mask, dataset)
        except NotSparseError as error:
            reason = error if convolves else reason
    raise ValueError(f"train sparse cannot be done: {reason}")


def _perceptron(network: nn.Module) -> type[SparseTraining] | type[SparseGpuTraining]:
    return SparseTraining if _on_cpu(network) else SparseGpuTraining


def _on_cpu(network: nn.Module) -> bool:
    return next(network.parameters()).device.type == "cpu"


def _convolves(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in network.modules())


def _least_work(network: nn.Module, mask: Mapping[str, Tensor], dataset: Dataset) -> Training:
    """The training of a network of convolutions: sparse, compacted or dense."""
    compacted = _compacted(network, mask, dataset, None)
    work = kept_work(network, mask, dataset)
    least = compacted.multiply_adds[1] if compacted else work.whole
    reason = (
        f"{work.done / 1e6:,.1f} of {work.whole / 1e6:,.1f} million multiply-adds an example would "
        "be left, too many to gain by"
    )
    if _pays(work, least):
        try:
            over_kept = ConvolutionTraining(network, mask, dataset)
            if over_kept.traced and _pays(over_kept.work, least):
                return over_kept
            reason = f"sparse would not pay: {over_kept.reason}"
        except NotSparseError as error:
            reason = str(error)
    return compacted or dense_training(network, dataset, reason)


def _pays(work: KeptWork, least: int) -> bool:
    """Whether it takes less time than so many multiply-adds by torch."""
    slowed = CONVOLUTIONS * work.convolutions + LINEAR * work.linear + work.by_torch
    return work.convolutions > 0 and slowed <= PAYS_BELOW * least


def _compacted(
    network: nn.Module, mask: Mapping[str, Tensor], dataset: Dataset, forward: Forward | None
) -> CompactedTraining | None:
    """The training without channels that lead to no output, where it can be done and pays."""
    if processes() > 1:
        return None
    try:
        compacted = CompactedTraining(network, mask, dataset, forward)
    except NotNarrowableError:
        return None
    before, after = compacted.multiply_adds
    return compacted if after <= PAYS_BELOW * before else None


def _left(network: nn.Module, mask: Mapping[str, Tensor]) -> float:
    """The share of the linear layers' weights that survives."""
    total = kept = 0
    for layer in read_layers(network):
        weights = layer.linear.weight.numel()
        survivors = mask.get(f"{layer.name}.weight")
        total += weights
        kept += weights if survivors is None else int(survivors.sum())
    return kept / total


def choose_stack(
    networks: Sequence[nn.Module],
    masks: Sequence[Mapping[str, Tensor] | None],
    datasets: Sequence[Dataset],
    train: str = "auto",
) -> TogetherTraining:
    """Return the training of networks together; arguments as :class:`StackedTraining`.

    Args:
        networks: built alike.
        masks: of each, or None.
        datasets: of each.
        train: ``"auto"``, on a GPU over the surviving weights where all are pruned and it can be
            done; ``"dense"``; or ``"sparse"``, which on the CPU is done alone.

    Raises:
        NotStackableError: they cannot be trained together; the message says why.
    """
    on_gpu = next(networks[0].parameters()).device.type == "cuda"
    if train == "sparse" and not on_gpu:
        raise NotStackableError("sparse training was asked for, which is done alone")
    if on_gpu and train != "dense" and all(mask is not None for mask in masks):
        try:
            return SparseStack(networks, masks, datasets)
        except (NotSparseError, NoCudaCompiler) as error:
            if train == "sparse":
                raise NotStackableError(str(error)) from None
    return StackedTraining(networks, masks, datasets)
