"""Training by several processes that share every batch."""

import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lossprune.data import Dataset, Split
from lossprune.pruning.curvature.distributed import sum_over_processes_
from lossprune.training.batch_norm import share_batch_norm_
from lossprune.training.evaluation import Evaluation, count_losses
from lossprune.training.loop import CHECK_EVERY, Losses, training_batches


class DistributedTraining:
    """Training on all weights by the processes of the initialised ``torch.distributed`` group.

    Every process has the whole network, data set and optimizer, and calls every method with the
    same arguments.  Of each batch of B examples, drawn alike in all, process r of W computes on a
    part of b_r, and the gradients of

        (W / B) Σ of its part's losses

    are averaged over the processes by ``DistributedDataParallel``: that is the gradient of the
    whole batch's mean loss, whatever the b_r, 0 included.  So each optimizer takes the same step,
    and the weights stay equal to the last bit.  Batch norms take the whole batch's statistics.

    Args:
        network: its weights become those of the first process; its batch norms are replaced by
            ones that work on shared batches, with the same parameters and names.
        dataset: on the network's device.
        reason: why this training, in one line.
    """

    mode = "distributed"

    def __init__(self, network: nn.Module, dataset: Dataset, reason: str) -> None:
        share_batch_norm_(network)
        self.network = network
        self.dataset = dataset
        self.reason = reason
        self._share = dist.get_rank(), dist.get_world_size()
        # Statistics are of the whole batch, so there are no buffers that would differ. The newer
        # name of the setting is unknown to the oldest torch that is accepted.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            self._averaging = DistributedDataParallel(network, broadcast_buffers=False)

    def train_epoch(
        self, optimizer: Optimizer, *, batch_size: int = 100, generator: torch.Generator
    ) -> float:
        """As :func:`lossprune.training.train_epoch`, with the same examples in each step.

        Raises:
            DivergedError: on every process, within the same steps.
        """
        self.network.train()
        examples, (_, world) = len(self.dataset.train), self._share
        batches = training_batches(self.dataset, batch_size, generator, self._share)
        total = torch.zeros(1, dtype=torch.float64, device=self.dataset.train.labels.device)
        losses = Losses()
        step = 0
        for step, (inputs, labels) in enumerate(batches, start=1):
            whole = min(batch_size, examples - (step - 1) * batch_size)
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self._averaging(inputs), labels, reduction="sum")
            (loss * (world / whole)).backward()
            optimizer.step()
            total += loss.detach()
            if step % CHECK_EVERY == 0:
                losses.note(step, _whole(total))
                losses.mean(examples)
        losses.note(step, _whole(total))
        return losses.mean(examples)

    def evaluate(self, split: Split) -> Evaluation:
        """As :func:`lossprune.training.evaluate`; the same numbers on every process."""
        sums = torch.tensor(
            count_losses(self.network, self.dataset, split, share=self._share),
            dtype=torch.float64,
            device=split.labels.device,
        )
        loss, wrong = _whole(sums).tolist()
        return Evaluation.mean(loss, wrong, len(split))


def _whole(share: Tensor) -> Tensor:
    """Return the sum over the processes."""
    whole = share.clone()
    sum_over_processes_([whole])
    return whole
