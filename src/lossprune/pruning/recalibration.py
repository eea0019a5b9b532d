"""Batch normalisation of a network whose weights have gone or moved: its statistics, found anew."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch, Forward
from lossprune.pruning.curvature.examples import check_examples, take
from lossprune.pruning.curvature.forms import default_forward
from lossprune.pruning.curvature.network import MaskedNetwork
from lossprune.pruning.curvature.running import (
    advice_on_inputs,
    described,
    evaluating,
    outside_inference,
    run,
)
from lossprune.pruning.names import listed
from lossprune.pruning.norms import Averages, tracking_norms, untaken_norms
from lossprune.pruning.randomness import PrivateRandomness
from lossprune.pruning.wholeness import check_whole


@outside_inference()
def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    examples: int | None = None,
    *,
    forward: Forward | None = None,
    sharded: bool = False,
) -> nn.Module:
    r"""Estimate the statistics of batch normalisation anew, in place, and return ``model``.

    A layer of batch normalisation that a network was trained with has running means and variances
    of the activations that it had then.  Without the weights that pruning removes the activations
    are others, and the statistics no longer theirs.  In one pass over the data, in which every
    such layer normalises a batch by the batch's own mean m_b and variance v_b, as in training,
    they become

        mean = Σ_b n_b m_b / Σ_b n_b,    variance = Σ_b n_b v_b / Σ_b n_b,

    with v_b unbiased and n_b the examples of the batch that the layer gets: nothing is left of the
    old statistics, and a small last batch counts for as much as it has.  Dropout and all else is
    in evaluation mode, as it is where the statistics are used.

    That is done with layers of torch's batch normalisation, those that subclass it and
    ``SyncBatchNorm`` too, and instance normalisation that tracks statistics.  Other layers that
    have running statistics keep them, and a warning names them.  One without running statistics
    needs none, and one that the network does not run in evaluation mode keeps its own; a network
    without any is returned as it is, and no data is read.

    Under an initialised ``torch.distributed`` group every process must call this, with the same
    batches, all of which each runs, or with ``sharded`` and batches of its own; all get the same
    statistics.

    Source: Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning",
    2020, do it ("adaptive batch normalization") before they compare pruned networks; averages of
    batches in the place of moving ones are those of Wu and Johnson, "Rethinking 'Batch' in
    BatchNorm", 2021 ("PreciseBN").

    Args:
        model: the network as it is to be used, its removed weights 0.  Its parameters, gradients,
            modes, hooks and other buffers stay as they are, as do ``momentum`` and
            ``num_batches_tracked``; on an error the statistics do as well.
        data: iterable of batches as in :func:`measure`: those of training, without augmentation
            or with, and about as large.
        examples: how many to read, exactly (the last batch is cut); None reads all.
        forward: ``forward(model, batch)`` runs the network on batches of any other form, such as
            ``lambda model, batch: model(batch)`` of inputs alone; what it returns does not matter.
        sharded: whether the batches of each process of a ``torch.distributed`` group are its own
            share of the data; as in :func:`measure`.

    Raises:
        ValueError: ``examples`` is no whole number of at least 1.
        PruningError: too few examples; the network cannot be run on them; a layer gets one value
            per channel, of which there is no variance (one example at the end is joined with the
            batch before it); statistics that are not finite; or processes with different data.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> with torch.no_grad():
    ...     model[0].weight.zero_(), model[0].bias.fill_(5.0)  # doctest: +ELLIPSIS
    (...)
    >>> recalibrate(model, [(torch.randn(8, 2), torch.zeros(8))])[1].running_mean
    tensor([5., 5., 5.])
    """
    check_examples(examples)
    check_whole(model)
    others = untaken_norms(model)
    if others and not distributed.rank():
        warnings.warn(
            f"the running statistics of {listed(map(repr, others), 3)} stay as they are: "
            "recalibrate finds those of torch's own layers of batch normalisation anew, and of "
            "layers that subclass them",
            stacklevel=3,  # whoever has called this, behind the decorator
        )
    if not tracking_norms(model):
        return model
    if not sharded:
        distributed.check_undivided(data)
    buffers = dict(model.named_buffers())
    batches = take(data, examples, forward, sharded=sharded)
    with _spared(model):
        statistics = _estimated(model, _running(model, forward), batches, sharded=sharded)
    for name, value in statistics.items():
        # What was made in inference mode can be written in that mode alone.
        with torch.no_grad(), torch.inference_mode(buffers[name].is_inference()):
            buffers[name].copy_(value)
    return model


def batch_norm_statistics(
    network: MaskedNetwork, batches: Iterable[Batch], *, sharded: bool = False
) -> dict[str, Tensor]:
    """Return the statistics that :func:`recalibrate` would give a network at θ ⊙ m.

    They are running means and variances by the names that ``named_buffers`` gives them; none where
    the network has nothing to recalibrate.  The network and its module stay as they are.

    Raises:
        PruningError: as :func:`recalibrate`.
    """
    model = network.prunable.model
    if not tracking_norms(model):
        return {}
    network = copy(network)
    network.constants = dict(network.constants)
    for name, _ in model.named_buffers():
        network.constants[name] = network.constants[name].clone()
    return _estimated(model, network, batches, sharded=sharded)


def _running(model: nn.Module, forward: Forward | None) -> Callable[[Batch], Any]:
    """Run the network as it stands on a batch."""

    def call(batch: Batch) -> Any:
        given = batch.map(torch.clone).value  # in case the network changes its inputs in place
        return run(
            f"{'forward' if forward else 'the network'} could not be run on a batch of "
            f"{described(given)}",
            lambda: (forward or default_forward)(model, given),
            lambda text: (
                "it gets the batch as it is"
                if forward
                else advice_on_inputs(given, model.parameters(), text)
            ),
        )

    return call


def _estimated(
    model: nn.Module, call: Callable[[Batch], Any], batches: Iterable[Batch], *, sharded: bool
) -> dict[str, Tensor]:
    """The statistics, by name; ``call`` runs ``model`` with buffers that may be written."""
    averages = Averages(model)
    several = distributed.processes() > 1
    # Processes that work together draw together: their loaders shuffle alike.
    randomness = PrivateRandomness(distributed.shared_random_state())
    with randomness, evaluating(model), torch.no_grad(), averages.noting():
        if several and not sharded:
            batches = _alike(batches, averages.device)
        with distributed.together(averages.device):
            averages.add(call, batches)
    if several and sharded:
        averages.join_()
    statistics = averages.means()
    if several:
        distributed.as_the_first_has_(statistics.values())
    return statistics


def _alike(batches: Iterable[Batch], device: torch.device) -> Iterable[Batch]:
    """The batches, once it is seen that all processes have the same."""
    batches = iter(batches)
    with distributed.together(device):
        first = next(batches, None)
    distributed.check_alike(first, device)
    return chain([first] if first else [], batches)


@contextmanager
def _spared(model: nn.Module) -> Iterator[None]:
    """Let the network run with copies of its buffers, and put its own back."""
    lists = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    copies = {id(buffer): buffer.clone() for buffer in model.buffers()}
    try:
        for buffers, own in lists:
            buffers |= {name: copies[id(b)] for name, b in own.items() if b is not None}
        yield
    finally:
        for buffers, own in lists:
            buffers.clear()
            buffers |= own
