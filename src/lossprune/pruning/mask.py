"""Masks: which weights are kept, and how a network is held to them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lossprune.files import check_folder_of, write_whole
from lossprune.pruning.choices import Choices
from lossprune.pruning.enforcement import Enforcement
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask_file import mask_bytes, read_mask
from lossprune.pruning.matching import compared, match, warn_of_adapters
from lossprune.pruning.names import counted
from lossprune.pruning.prunable import prunable_weights
from lossprune.pruning.shards import local, part_of, reshard_


@dataclass(frozen=True)
class LayerCounts:
    """How many weights of one parameter a mask keeps and removes."""

    name: str
    shape: tuple[int, ...]
    total: int
    removed: int

    @property
    def kept(self) -> int:
        """``total − removed``."""
        return self.total - self.removed

    @property
    def sparsity(self) -> float:
        """The fraction that is removed: ``removed / total``."""
        return self.removed / self.total if self.total else 0.0


def removed_from(kept: Tensor) -> int:
    """Return how many weights a bool tensor removes."""
    return kept.numel() - int(kept.count_nonzero())  # many times faster than the sum of bools


class Mask(Mapping[str, Tensor]):
    """Which weights are kept: a bool tensor of the weight's shape per parameter name.

    >>> mask = Mask({"weight": torch.tensor([[True, False], [True, True]])}, criterion="MP")
    >>> mask.sparsity
    0.25
    >>> layer = nn.Linear(2, 2)
    >>> _ = mask.apply_(layer)
    >>> layer.weight[0, 1].item()
    0.0
    """

    def __init__(self, kept: Mapping[str, Tensor], *, criterion: str | None = None) -> None:
        for name, tensor in kept.items():
            if tensor.dtype != torch.bool:
                raise ValueError(f"mask of {name!r} must be a bool tensor, got {tensor.dtype}")
        self._kept = dict(kept)
        self.criterion = criterion
        self.total = sum(tensor.numel() for tensor in self._kept.values())
        self.removed = sum(map(removed_from, self._kept.values()))

    @classmethod
    def dense(
        cls,
        model: nn.Module,
        *,
        parameters: Choices | None = None,
        exclude: Choices | None = None,
    ) -> "Mask":
        """Return the mask that keeps every prunable weight of ``model``.

        ``parameters`` and ``exclude`` say which weights those are, as in :func:`lossprune.prune`.
        """
        weights = prunable_weights(model, parameters, exclude)
        return cls(
            {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        )

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that is removed: ``removed / total``."""
        return self.removed / self.total if self.total else 0.0

    def layers(self) -> tuple[LayerCounts, ...]:
        """Return the counts of each parameter, in order.

        >>> for layer in Mask({"fc.weight": torch.tensor([[True, False], [True, True]])}).layers():
        ...     print(layer.name, layer.shape, layer.kept, layer.removed, layer.sparsity)
        fc.weight (2, 2) 3 1 0.25
        """
        return tuple(
            LayerCounts(name, tuple(kept.shape), kept.numel(), removed_from(kept))
            for name, kept in self._kept.items()
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self._kept.keys() == other._kept.keys() and all(
            torch.equal(tensor.cpu(), other[name].cpu()) for name, tensor in self._kept.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        parameters = counted(len(self), "parameter")
        return f"Mask({self.removed:,} of {self.total:,} weights removed, {parameters})"

    def to(self, device: torch.device | str) -> "Mask":
        """Return the same mask on another device."""
        return Mask(
            {name: tensor.to(device) for name, tensor in self._kept.items()},
            criterion=self.criterion,
        )

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> nn.Module:
        """Set the removed weights of ``model`` to exactly 0, in place, and return ``model``.

        Of a sharded network (``fully_shard``) every process calls this, with the whole mask.

        Raises:
            PruningError: the mask names parameters that the model lacks or has in other shapes; all
                are listed.
        """
        for parameter, where in self.removed_of(model):
            local(parameter).masked_fill_(where, 0.0)  # not a product: 0 · NaN is NaN
        return model

    def enforce(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Enforcement:
        """Hold the removed weights of ``model`` at exactly 0 through ``optimizer``'s steps.

        They are set to 0 now and after every ``optimizer.step()``, whatever the loop, gradients,
        momentum or weight decay did to them; nothing else of the step changes.  So are the other
        weights that an optimizer keeps: of schedule-free ones, slow ones, averages.  Call
        ``remove()`` on what is returned, or use it as a context manager, to let them go.

        ``optimizer`` may also be the wrapper that Lightning or Accelerate put around one, or an
        optimizer around another; each level is followed.  Of a sharded network every process calls
        this, with the whole mask, before or after its first step.

        Masked layers under adapters (PEFT) are warned of: a merge fills removed weights again.

        Raises:
            PruningError: as :meth:`apply_`; or the optimizer holds none of the masked parameters,
                or it gives no notice of its steps.
        """
        enforcement = Enforcement(self.removed_of(model), optimizer)
        warn_of_adapters(match(self, model, sharded=True).values(), stacklevel=2)
        return enforcement

    def save(self, path: str | Path) -> None:
        """Write the mask as safetensors: one bit a weight; shapes and criterion in the metadata.

        A file that is there is replaced as a whole.

        Raises:
            FileNotFoundError: the folder to write into does not exist.
        """
        path = Path(path)
        check_folder_of(path)
        # Not safetensors' save_file, whose files only their owner can read.
        write_whole(path, mask_bytes(self._kept, self.sparsity, self.criterion))

    @classmethod
    def load(cls, path: str | Path) -> "Mask":
        """Read a mask that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            PruningError: the file is not a mask, is damaged, or its contents contradict each other.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no mask at {path}")
        return cls.from_bytes(Path(path).read_bytes(), path)

    @classmethod
    def from_bytes(cls, contents: bytes, path: str | Path) -> "Mask":
        """Return the mask of a file with these contents; messages name it ``path``.

        Raises:
            PruningError: as :meth:`load`.
        """
        kept, sparsity, criterion = read_mask(contents, path)
        mask = cls(kept, criterion=criterion)
        if repr(mask.sparsity) != sparsity:
            raise PruningError(
                f"{path} is a mask, but damaged: it says sparsity {sparsity}, "
                f"its bits say {mask.sparsity!r}"
            )
        return mask

    def mismatches(self, model: nn.Module) -> tuple[str, ...]:
        """Return every way in which the mask does not fit ``model``, one clause each.

        None where each parameter that the mask names is there, in the same shape.  Names may
        differ by what ``torch.compile``, data parallel and the like put before them.

        >>> Mask({"fc1.weight": torch.ones(2, 2).bool()}).mismatches(nn.Linear(2, 2))
        ("it names 'fc1.weight', which Linear lacks (did you mean 'weight'?)",)
        """
        return tuple(compared(self, model)[1])

    def removed_of(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of a parameter and where it is removed, a bool tensor on its device.

        Of a sharded parameter that is where this process's part of it is removed.

        Raises:
            PruningError: as :meth:`apply_`.
        """
        reshard_(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return [
            (parameters[found], ~part_of(self._kept[name], parameters[found]))
            for name, found in match(self, model, sharded=True).items()
        ]
