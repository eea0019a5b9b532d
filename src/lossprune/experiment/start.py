"""The network that a run begins from: newly built, of a file, or pruned already.

A file of ``save_sparse``, as ``lossprune prune`` writes it, says which weights are removed, and
they stay so.  Any other file is of values alone: all of them are trained.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lossprune.deployment.sparse_file import is_sparse_file, load_sparse
from lossprune.experiment.folder import start_file
from lossprune.experiment.network_file import load_weights_, read_network, weights_sha256
from lossprune.experiment.record import RunRecord, Start
from lossprune.pruning import Mask, PruningError

_ASKED = "--model_0: "
_PRUNED_ABOVE = 0.1  # no training leaves so many weights at exactly 0

Read = Callable[[Path], tuple[dict[str, Tensor], dict[str, Any], str]]


@dataclass(frozen=True)
class Begun:
    """What a run begins from.

    Attributes:
        start: for the record.
        mask: of the weights that are removed already; None: none are.
        note: what to tell of it, if anything.
    """

    start: Start
    mask: Mask | None = None
    note: str | None = None


def begin_(network: nn.Module, arch: str, path: Path | None, read: Read = read_network) -> Begun:
    """Load the network of a file, if there is one, and say what came of it.

    Args:
        network: newly built; it is changed in place.
        arch: what messages call it.
        path: what ``--model_0`` says.
        read: as :func:`read_network`, for a file that is not of :func:`lossprune.save_sparse`.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_network` and :func:`load_weights_`.
    """
    if path is None:
        return Begun(Start(None, None, weights_sha256(network.state_dict())))
    file, mask, note = start_file(path), None, None
    if file.is_file() and is_sparse_file(file):
        mask, sha256 = _load_pruned_(network, file), _file_sha256(file)
    else:
        weights, metadata, sha256 = read(file)
        load_weights_(network, arch, file, weights, metadata)
        note = _note_of(file, weights)
    removed = 0 if mask is None else mask.removed
    return Begun(
        Start(str(path), sha256, weights_sha256(network.state_dict()), removed), mask, note
    )


def holds_start(file: Path, record: RunRecord) -> bool:
    """Whether a file of other bytes holds the weights that a run began from.

    Raises:
        ValueError: as :func:`read_network`.
    """
    if is_sparse_file(file):
        return False
    weights, _, _ = read_network(file)
    return weights_sha256(weights) == record.start.weights_sha256


def _note_of(file: Path, weights: Mapping[str, Tensor]) -> str | None:
    """What to tell of a file of values alone, which may be those of a pruned network."""
    matrices = [tensor for tensor in weights.values() if tensor.ndim > 1]
    zeros = sum(int((tensor == 0).sum()) for tensor in matrices)
    share = zeros / max(1, sum(tensor.numel() for tensor in matrices))
    if share < _PRUNED_ABOVE:
        return None
    return (
        f"note: {share:.0%} of the weights in {file} are 0, and all are trained: it says of none "
        "that it is removed, as a file of lossprune.save_sparse does"
    )


def _load_pruned_(network: nn.Module, file: Path) -> Mask:
    try:
        mask = load_sparse(file, network)
    except PruningError as error:
        raise ValueError(f"{_ASKED}{error}") from error
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{_ASKED}{file}: {name!r} holds values that are not finite")
    return mask


def _file_sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
