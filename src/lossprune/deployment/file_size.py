"""The size of a pruned network's small file, as the end of a pruning."""

from collections.abc import Mapping
from numbers import Integral

from torch import Tensor, nn

from lossprune.deployment.sparse_file import check_values, sparse_bytes
from lossprune.pruning.mask import Mask


class FileSize:
    """Whether the file of :func:`lossprune.save_sparse` has at most so many bytes.

    As ``until`` of :func:`lossprune.prune` it ends a pruning with the first mask of which the file
    is small enough.

    Args:
        model: the network that is pruned.
        most: bytes.
        values: of the file, ``"exact"`` or ``"float16"``, as there.

    Raises:
        ValueError: ``most`` is not a whole number above 0, or ``values`` is neither.

    >>> import torch
    >>> from lossprune import Mask
    >>> network = nn.Linear(100, 10)
    >>> small_enough = FileSize(network, 1000)
    >>> [small_enough(Mask({"weight": torch.rand(10, 100) < kept})) for kept in (0.5, 0.01)]
    [False, True]
    """

    def __init__(self, model: nn.Module, most: int, *, values: str = "exact") -> None:
        if isinstance(most, bool) or not isinstance(most, Integral) or most < 1:
            raise ValueError(f"most must be a whole number of bytes above 0, got {most!r}")
        self._model, self.most, self._values = model, int(most), values
        check_values(values)

    def __repr__(self) -> str:
        return f"FileSize(at most {self.most:,} bytes, values={self._values!r})"

    def __call__(self, mask: Mask, moved: Mapping[str, Tensor] | None = None) -> bool:
        """Whether the network at the mask fits, with tensors that were moved, by name."""
        return self.bytes(mask, moved) <= self.most

    def bytes(self, mask: Mask, moved: Mapping[str, Tensor] | None = None) -> int:
        """Return the size of the file of the network at the mask."""
        contents, _ = sparse_bytes(self._model, mask, self._values, moved)
        return len(contents)
