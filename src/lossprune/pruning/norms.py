"""Layers that normalise by running statistics, and the means of these over batches."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch, join
from lossprune.pruning.curvature.examples import NO_EXAMPLES
from lossprune.pruning.curvature.statistics import check_entries
from lossprune.pruning.errors import PruningError

# The statistic that a call of a layer found, the buffer it is for, and of how many examples.
_Noted = tuple[str, Tensor, int]


def tracking_norms(model: nn.Module) -> list[_NormBase]:
    """The layers that have running statistics, and use them in evaluation mode."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _NormBase)
        and all(module._buffers.get(name) is not None for name in ("running_mean", "running_var"))
        and (module.track_running_stats or not isinstance(module, _InstanceNorm))
    ]


def untaken_norms(model: nn.Module) -> list[str]:
    """Return the names of modules of other kinds that have running statistics."""
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, _NormBase)
        and any(buffer == "running_mean" for buffer, _ in module.named_buffers(recurse=False))
    ]


class _OneValueError(PruningError):
    """A layer that is to find a variance gets one value per channel."""


class Averages:
    """Means over batches of the statistics of layers, by the names of the buffers they are for.

    Attributes:
        device: the one that the network takes its inputs on.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = dict(model.named_buffers())
        named = {id(buffer): name for name, buffer in buffers.items()}
        self._norms = {
            norm: (named[id(norm.running_mean)], named[id(norm.running_var)])
            for norm in tracking_norms(model)
        }
        names = sorted({name for both in self._norms.values() for name in both})
        self._own = {name: buffers[name] for name in names}
        self._sums = {
            name: torch.zeros_like(b, dtype=torch.float64) for name, b in self._own.items()
        }
        self._counts = dict.fromkeys(names, 0)
        self._passes = 0
        self._noted: list[_Noted] = []  # of the pass that runs
        first = next(chain(model.parameters(), self._own.values()))
        self.device = first.device

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Let each layer note, and normalise by, the statistics of what it is about to get.

        It does so in evaluation mode, in which it takes what is in its buffers: no process waits
        for another, whatever they are synchronised by, and no momentum or counter has a part.
        Instance normalisation has statistics for each example, and so finds its own.
        """
        with ExitStack() as stack:
            for norm in self._norms:
                handle = norm.register_forward_pre_hook(self._note, with_kwargs=True)
                stack.callback(handle.remove)
                if isinstance(norm, _InstanceNorm):
                    stack.callback(vars(norm).update, track_running_stats=True)
                    vars(norm).update(track_running_stats=False)
            yield

    def _note(self, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: Tensor = args[0] if args else kwargs["input"]
        own = isinstance(norm, _InstanceNorm)
        if own and given.ndim == norm._get_no_batch_dim():
            given = given[None]
        if not len(given):
            return
        mean_name, var_name = self._norms[norm]
        count = given[0, 0].numel() * (1 if own else len(given))
        if count == 1:
            raise _OneValueError(
                f"{mean_name.removesuffix('.running_mean')!r} gets one value per channel of a "
                "batch, of which there is no variance: give batches of more examples"
            )
        wide = given.to(torch.promote_types(given.dtype, torch.float32))
        dims = [d for d in range(given.ndim) if d > 1 or (d == 0 and not own)]
        var, mean = torch.var_mean(wide, dims, correction=0)
        if own:
            var, mean = var.mean(0), mean.mean(0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        self._noted.append((mean_name, mean, len(given)))
        self._noted.append((var_name, var * (count / (count - 1)), len(given)))

    def add(self, call: Callable[[Batch], Any], batches: Iterable[Batch]) -> None:
        """Add batches; one example that is too few for some layer goes with a neighbour.

        What is noted is added once the next pass has been: the last one may be done again.
        """
        last = single = error = None
        noted: list[_Noted] = []
        for batch in batches:
            batch = batch.to(self.device)
            if single is not None:
                batch, single = _joined(single, batch, error), None
            try:
                more = self._pass(call, batch)
            except _OneValueError as raised:
                if batch.size != 1:
                    raise
                single, error = batch, raised
                continue
            self._add(noted)
            last, noted = batch, more
        if single is not None:
            noted = self._pass(call, _joined(last, single, error))
        self._add(noted)

    def _pass(self, call: Callable[[Batch], Any], batch: Batch) -> list[_Noted]:
        self._noted = []
        call(batch)
        self._passes += 1
        return self._noted

    def _add(self, noted: list[_Noted]) -> None:
        for name, statistic, count in noted:
            self._sums[name] += count * statistic.double()
            self._counts[name] += count

    def join_(self) -> None:
        """Add everybody else's."""
        counts = [self._passes, *self._counts.values()]
        counted = torch.tensor(counts, dtype=torch.float64, device=self.device)
        distributed.sum_over_processes_([*self._sums.values(), counted])
        self._passes, *counts = map(int, counted.tolist())
        self._counts = dict(zip(self._counts, counts, strict=True))

    def means(self) -> dict[str, Tensor]:
        """Return the statistics of the layers that were run, as their buffers are."""
        if not self._passes:
            raise PruningError(NO_EXAMPLES)
        means = {
            name: (self._sums[name] / count).to(self._own[name].dtype)
            for name, count in self._counts.items()
            if count
        }
        for name, mean in means.items():
            check_entries("new value", name, mean)
        return means


def _joined(one: Batch | None, other: Batch, error: Exception | None) -> Batch:
    """Both as one batch, or else the error that one of them alone gave."""
    if one is None or one.kind != other.kind:
        assert error is not None
        raise error
    return join([one, other])
