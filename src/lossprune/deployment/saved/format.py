"""The bytes of a deployed network's file, and all that its header says.

The file is safetensors, with a SHA-256 of all of it.  It holds no code: not that of the network,
and not the compiled kernels, which every machine builds for itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lossprune.deployment.choices import LayerChoice
from lossprune.deployment.saved.torch_parts import SavedTorchPart
from lossprune.deployment.saved.values import described, read
from lossprune.deployment.sparse.network import Tuning
from lossprune.deployment.sparse.steps import SparseStep
from lossprune.json_text import parse_json
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask_file import UNSIGNED, check_signed, header_in, signed

Arrays = Mapping[str, "np.ndarray[Any, Any]"]

_NAME = "lossprune deployed network"
FORMAT = f"{_NAME} 1"


@dataclass(frozen=True)
class SavedPart:
    """A :class:`SparseNetwork` without its weights."""

    steps: tuple[SparseStep, ...]
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, bool], ...]
    tuning: Tuning
    rows: bool = False


@dataclass(frozen=True)
class SavedArgument:
    """An argument of the network's ``forward``; ``default`` is that of one that may be left out."""

    name: str
    kind: str
    optional: bool
    default: Any


@dataclass(frozen=True)
class SavedCall:
    """How the network is called: ``GraphInputs``."""

    called: str
    arguments: tuple[SavedArgument, ...]
    order: tuple[str, ...]
    fixed: Any


@dataclass(frozen=True)
class SavedOriginal:
    """What is known of the network that was deployed: ``Original``."""

    module: str
    name: str
    attributes: Any
    gone: tuple[str, ...]


@dataclass(frozen=True)
class SavedNetwork:
    """All of a deployed network but its weights.

    Attributes:
        parts: in order.
        wires: the values that each part reads and makes.
        inputs: names of the network's inputs.
        output: the network's output, of names.
        whole: whether the only part is the network.
        call: how it is called.
        original: what it was made of.
        layers, seconds, notes: as of ``Deployed``.
        kernels: SHA-256 of the source that it was tuned with.
        lanes: numbers of a vector where it was tuned.
    """

    parts: tuple[SavedPart | SavedTorchPart, ...]
    wires: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    inputs: tuple[str, ...]
    output: Any
    whole: bool
    call: SavedCall
    original: SavedOriginal
    layers: tuple[LayerChoice, ...]
    seconds: Mapping[str, float]
    notes: tuple[str, ...]
    kernels: str
    lanes: int


def packed(network: SavedNetwork, arrays: Arrays) -> bytes:
    """Return the file; the same network is the same file."""
    from safetensors.numpy import save

    text = json.dumps(described(network), separators=(",", ":"))
    return signed(save(dict(arrays), {"format": FORMAT, "network": text, "sha256": UNSIGNED}))


def unpacked(path: Path) -> tuple[SavedNetwork, dict[str, "np.ndarray[Any, Any]"]]:
    """Return what is in a file that is as it was written.

    Raises:
        PruningError: it is something else, of another version, or damaged; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    contents = path.read_bytes()
    try:
        _, metadata = header_in(contents)
    except ValueError as error:
        raise PruningError(f"{path} is truncated, or no deployed network: {error}") from None
    _check_format(path, metadata.get("format", ""))
    try:
        check_signed(contents, metadata)
        network = read(SavedNetwork, parse_json(metadata.get("network", "")), "the network")
        return network, load(contents)
    except (ValueError, SafetensorError) as error:
        raise PruningError(f"{path} is a deployed network, but damaged: {error}") from None


def _check_format(path: Path, found: str) -> None:
    if found == FORMAT:
        return
    if found.startswith(f"{_NAME} "):
        raise PruningError(
            f"{path} is of another version of lossprune (its format is {found[:60]!r}, this one "
            f"reads {FORMAT!r}): load it with that one"
        )
    if found.startswith("lossprune sparse network"):
        raise PruningError(
            f"{path} is a sparse network, not a deployed one: lossprune.load_sparse loads it"
        )
    raise PruningError(
        f"{path} is safetensors, but no deployed network of lossprune (its format is "
        f"{found[:60]!r}, needed is {FORMAT!r})"
    )
