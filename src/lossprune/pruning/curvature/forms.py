"""Forms of batches that need no ``forward``: how a network is called, what targets suit a loss."""

import inspect
import warnings
from collections import UserDict
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from lossprune.pruning.errors import PruningError

LABELS = "labels"
# What else a dict may call its targets.
_OTHER_NAMES = ("label", "targets", "target", "y")


def check_batches(data: Any, forward: Any = None) -> None:
    """Raise where data is no iterable of batches but a data set, or one batch itself.

    Raises:
        PruningError: it is; the message says what to write.
    """
    kind = type(data).__name__
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise PruningError(
            f"data is a {kind}, whose items are single examples, where batches are needed: give "
            "torch.utils.data.DataLoader(data, batch_size=100)"
        )
    pair = isinstance(data, (tuple, list)) and len(data) > 1
    if isinstance(data, (Mapping, UserDict)) or (
        pair and forward is None and all(isinstance(part, (Tensor, np.ndarray)) for part in data)
    ):
        raise PruningError(
            f"data is one batch, it seems ({_named(data)}), where an iterable of batches is "
            "needed: give [batch], such as data=[(inputs, targets)], or a DataLoader"
        )
    if isinstance(data, (Tensor, np.ndarray)) and forward is None:
        raise PruningError(
            f"data is a {kind} of shape {tuple(data.shape)}, where batches are needed: give "
            "data=[(inputs, targets)] or a DataLoader"
        )
    if isinstance(data, (str, bytes)) or not (
        isinstance(data, Iterable) or hasattr(data, "__getitem__")
    ):
        raise PruningError(f"data must be an iterable of batches, got {kind}")


def _named(batch: Any) -> str:
    if isinstance(batch, (Mapping, UserDict)):
        return f"{type(batch).__name__} with {', '.join(map(repr, [*batch][:4]))}"
    shapes = " and ".join(str(tuple(part.shape)) for part in batch[:4])
    return f"{type(batch).__name__} of tensors of shape {shapes}"


def understood(batch: Any) -> Any:
    """Return the batch as a pair (inputs, targets), or as a dict of inputs and ``labels``.

    A tuple or list is a pair once what holds no numbers (strings, paths, None) is left out.  Of
    three tensors any may be the targets or no input at all (an index, a weight), so they are none.
    A dict has its targets under ``labels``, or under one alone of ``label``, ``targets``,
    ``target`` and ``y``.  NumPy arrays become tensors.

    Raises:
        PruningError: it is of no such form; the message says what to write.

    >>> inputs, targets = understood((np.zeros((2, 3)), np.zeros(2), ["a.png", "b.png"]))
    >>> inputs.shape, targets.dtype
    (torch.Size([2, 3]), torch.float64)
    """
    if isinstance(batch, dict):
        return {name: _as_tensor(part) for name, part in _with_labels(batch).items()}
    if not isinstance(batch, (tuple, list)):
        raise PruningError(
            f"a batch must be a pair (inputs, targets), got {type(batch).__name__}; a dict must "
            "have 'labels', and anything else needs forward= (data is an iterable of batches, such "
            "as [(inputs, targets)] or a DataLoader)"
        )
    parts = [part for part in batch if len(batch) == 2 or not _has_no_numbers(part)]
    if len(parts) != 2:
        raise PruningError(
            f"a batch must be a pair (inputs, targets), got {type(batch).__name__} of {len(batch)}"
            f" with {len(parts)} parts that hold numbers: say which are inputs and which targets "
            "with forward=lambda model, batch: (model(batch[0]), batch[1])"
        )
    inputs, targets = map(_as_tensor, parts)
    _check_part("inputs", inputs)
    _check_part("targets", targets)
    if len(inputs) != len(targets):
        raise PruningError(f"a batch has {len(inputs)} inputs but {len(targets)} targets")
    return inputs, targets


def default_forward(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    """Return outputs and targets of what :func:`understood` returns.

    The rest of a dict are keyword arguments of the network, which therefore computes no loss of
    its own; a single one whose name the network does not know is its input.  Of what a network
    returns, ``logits`` are the outputs where there are any.
    """
    if isinstance(batch, dict):
        inputs = {name: part for name, part in batch.items() if name != LABELS}
        targets = batch[LABELS]
        alone = len(inputs) == 1 and not _takes(model, *inputs)
        outputs: Any = model(*inputs.values()) if alone else model(**inputs)
    else:
        inputs, targets = batch
        outputs = model(inputs)
    if not isinstance(outputs, Tensor):
        named = isinstance(outputs, Mapping) and "logits" in outputs
        outputs = outputs["logits"] if named else getattr(outputs, "logits", outputs)
    return outputs, targets


def _with_labels(batch: dict[Any, Any]) -> dict[Any, Any]:
    """The same with its targets under ``labels``."""
    if LABELS in batch:
        return batch
    names = [name for name in _OTHER_NAMES if name in batch]
    if len(names) != 1:
        found = f"{' and '.join(map(repr, names))}" if names else "none of these"
        raise PruningError(
            f"a dict must have {LABELS!r}, or one of {', '.join(map(repr, _OTHER_NAMES))}, for its "
            f"targets, got {found} among {', '.join(map(repr, [*batch][:8]))}; anything else needs "
            "forward=lambda model, batch: (model(batch['inputs']), batch['targets']) or the like"
        )
    (targets,) = names
    if not isinstance(batch[targets], (Tensor, np.ndarray)):
        raise PruningError(
            f"a batch must be a pair (inputs, targets) of tensors, got dict whose {targets!r} is "
            f"{type(batch[targets]).__name__}: anything else needs forward="
        )
    return {LABELS if name == targets else name: part for name, part in batch.items()}


def _as_tensor(part: Any) -> Any:
    if not isinstance(part, np.ndarray):
        return part
    try:
        with warnings.catch_warnings():  # of an array that may not be written: nor do we
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(np.ascontiguousarray(part) if part.ndim else part)
    except TypeError:
        raise PruningError(
            f"an array of type {part.dtype} is none of numbers that torch has: convert it, such as "
            "to float32 for inputs or int64 for classes"
        ) from None


def _has_no_numbers(part: Any) -> bool:
    if isinstance(part, np.ndarray):
        return part.dtype.kind in "US"
    if isinstance(part, (tuple, list)):
        return all(map(_has_no_numbers, part))
    return part is None or isinstance(part, (str, bytes, PathLike))


def _check_part(what: str, part: Any) -> None:
    if isinstance(part, Tensor) and part.ndim:
        return
    if isinstance(part, (tuple, list)):
        advice = (
            "stack examples, or for several inputs give "
            "forward=lambda model, batch: (model(*batch[0]), batch[1])"
        )
    elif isinstance(part, Mapping):
        advice = "give forward=lambda model, batch: (model(**batch[0]), batch[1]) or the like"
    else:
        advice = "a DataLoader makes batches of single examples, and anything else needs forward="
    got = "a single number" if isinstance(part, Tensor) else type(part).__name__
    raise PruningError(
        f"the {what} of a batch must be a tensor with one entry per example, got {got}: {advice}"
    )


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the network has an argument of that name."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # of compiled code
        return True
    kinds = {p.name: p.kind for p in parameters}
    if inspect.Parameter.VAR_KEYWORD in kinds.values():
        return True
    return kinds.get(name) in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )


def check_shapes_alike(what: str, outputs: Tensor, targets: Tensor) -> None:
    """Raise unless targets have the shape of the outputs; ``what`` is the loss's name."""
    if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
        got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise PruningError(
            f"{what} needs targets of the shape of the outputs, {tuple(outputs.shape)}, got {got}"
        )


def check_class_shapes(outputs: Tensor, targets: Tensor, class_dim: int, shift: int) -> None:
    """Raise unless there is a class for each position of the outputs, or their probabilities."""
    layout = "(examples, classes" + (", positions...)" if outputs.ndim > 2 else ")")
    if class_dim == -1:
        layout = "(examples, positions..., classes)"
    if outputs.ndim < 2 or outputs.ndim < 2 + shift:
        raise PruningError(
            f"cross-entropy needs outputs of shape {layout}, got {tuple(outputs.shape)}"
        )
    if not isinstance(targets, Tensor):
        raise PruningError(f"cross-entropy needs a tensor of targets, got {type(targets).__name__}")
    expected = outputs.movedim(class_dim, -1).shape[:-1]
    if targets.is_floating_point():
        if targets.shape == outputs.shape and not shift:
            return
    elif targets.shape == expected and not targets.is_complex():
        return
    if class_dim == 1 and outputs.ndim > 2 and targets.shape == outputs.shape[:-1]:
        raise PruningError(
            f"outputs of shape {tuple(outputs.shape)} with targets of shape "
            f"{tuple(targets.shape)} have their classes last: give loss='token_cross_entropy', "
            "or loss='next_token' for a language model whose labels are its own tokens"
        )
    one = "example" if outputs.ndim == 2 else "position"
    raise PruningError(
        f"cross-entropy needs one whole-number class per {one}, shape {tuple(expected)} for "
        f"outputs {layout} of {tuple(outputs.shape)}"
        + ("" if shift else ", or floating class probabilities of the outputs' shape")
        + f", got targets of shape {tuple(targets.shape)} and type {targets.dtype}"
    )


def check_classes(targets: Tensor, classes: int, ignored: int) -> None:
    """Raise unless all targets but ignored ones are in [0, classes)."""
    lowest, highest = int(targets.min()), int(targets.max())
    if lowest < 0 or highest >= classes:
        counted = targets[targets != ignored]
        if not len(counted):
            return
        lowest, highest = int(counted.min()), int(counted.max())
    if lowest < 0 or highest >= classes:
        raise PruningError(
            f"targets must lie in [0, {classes}), the network's classes, "
            f"got {lowest if lowest < 0 else highest}"
        )


def check_probabilities(targets: Tensor) -> None:
    """Raise unless all are finite numbers of at least 0."""
    if not bool((targets.isfinite() & (targets >= 0)).all()):
        raise PruningError(
            "class probabilities must be finite numbers of at least 0, got "
            f"{float(targets.min())} to {float(targets.max())}"
        )
