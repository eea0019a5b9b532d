"""Dense, compacted or sparse: which training a pruned network gets, and why."""

from collections.abc import Mapping
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
from lossprune.training.evaluation import Evaluation, evaluate
from lossprune.training.loop import train_epoch
from lossprune.training.perceptron.structure import NotSparseError, read_layers
from lossprune.training.perceptron.training import SparseTraining
from lossprune.training.precision import Forward
from lossprune.training.stacked.stackable import NotStackableError

TRAININGS = ("auto", "dense", "sparse")
FASTER_BELOW = 0.3  # share of the weights left; docs/training.md has the measurements
PAYS_BELOW = 0.9  # share of the multiply-adds left when a network is compacted


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
        """Visit every training example once and return the mean loss."""
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
        train: ``"dense"``; ``"sparse"``; or ``"auto"``: sparse where it can be done and at most
            ``FASTER_BELOW`` of the linear layers' weights are left; else compacted where at most
            ``PAYS_BELOW`` of the multiply-adds are left.
        forward: computes the logits; what is not plain is not sparse under "auto".

    Several processes of a ``torch.distributed`` group train densely, together.

    Raises:
        ValueError: ``train`` is none of these, or ``"sparse"`` cannot be done.
    """
    if train not in TRAININGS:
        raise ValueError(f"train must be one of {', '.join(TRAININGS)}, got {train!r}")
    if train == "dense":
        return dense_training(network, dataset, "asked for", forward)
    if forward is not None and not forward.plain:
        if train == "sparse":
            raise ValueError("train sparse cannot be done with amp or compile")
        return _compacted_or_dense(network, mask, dataset, "amp or compile is asked for", forward)
    try:
        if train == "auto" and (left := _left(network, mask)) > FASTER_BELOW:
            reason = f"{left:.0%} of the weights are left, more than {FASTER_BELOW:.0%}"
            return _compacted_or_dense(network, mask, dataset, reason, forward)
        return sparse_training(network, mask, dataset)
    except (NotSparseError, NotStackableError, NoCompiler, NoCudaCompiler) as error:
        if train == "sparse":
            raise ValueError(f"train sparse cannot be done: {error}") from None
        if isinstance(error, NoCompiler | NoCudaCompiler):
            # Sparse training would gain more than compaction: let the reason be read.
            return dense_training(network, dataset, str(error), forward)
        return _compacted_or_dense(network, mask, dataset, str(error), forward)


def _compacted_or_dense(
    network: nn.Module,
    mask: Mapping[str, Tensor],
    dataset: Dataset,
    reason: str,
    forward: Forward | None,
) -> Training:
    """The compacted training where it pays, else the dense one, for this reason."""
    if processes() == 1:
        try:
            compacted = CompactedTraining(network, mask, dataset, forward)
        except NotNarrowableError:
            return dense_training(network, dataset, reason, forward)
        before, after = compacted.multiply_adds
        if after <= PAYS_BELOW * before:
            return compacted
    return dense_training(network, dataset, reason, forward)


def sparse_training(network: nn.Module, mask: Mapping[str, Tensor], dataset: Dataset) -> Training:
    """Return the training over the surviving weights, where the network is.

    Raises:
        NotSparseError, NotStackableError: it cannot be done, and why.
        NoCompiler, NoCudaCompiler: its kernels cannot be compiled.
    """
    if next(network.parameters()).device.type == "cuda":
        from lossprune.training.perceptron.gpu import SparseGpuTraining

        return SparseGpuTraining(network, mask, dataset)
    return SparseTraining(network, mask, dataset)


def _left(network: nn.Module, mask: Mapping[str, Tensor]) -> float:
    """The share of the linear layers' weights that survives."""
    total = kept = 0
    for stage in read_layers(network):
        weights = stage.linear.weight.numel()
        survivors = mask.get(f"{stage.name}.weight")
        total += weights
        kept += weights if survivors is None else int(survivors.sum())
    return kept / total
