"""A data set of the user's own: what a function of theirs returns, as a :class:`Dataset`.

People have data as pairs of tensors or arrays, and as data sets of torch, for training and test and
perhaps for validation.  Whatever it is, it is read once, into tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lossprune.data import Source
from lossprune.data.dataset import KINDS, Dataset, Split, moments
from lossprune.torch_state import seeded
from lossprune.user_code import UsersCodeError, call, find_function, offering

WHAT = "--dataset"
SPLITS = {
    **{"train": "train", "training": "train", "test": "test"},
    **{"valid": "valid", "val": "valid", "validation": "valid"},
}
SETTINGS = ("classes", "mean", "std", "scale", "augmented")  # of a Dataset, in a dictionary
ACCEPTED = "(train, test), (train, validation, test), a dict of these or a lossprune.data.Dataset"
_BYTE = 255.0


def read_own(named: str, source: Source) -> Dataset:
    """Return the data set that the function ``named`` loads, as ``MODULE:FUNCTION``.

    It is called with those of the fields of ``source`` that it names, under its seed.

    Raises:
        ValueError: there is no such function, it fails, or what it returns cannot be used; one
            sentence says why.
    """
    with seeded(source.seed):
        function = find_function(named, WHAT)
    with seeded(source.seed):  # anew: a module draws only when it is imported for the first time
        given = call(offering(function, vars(source), f"{WHAT} {named}"), named, WHAT)
        try:
            return dataset_of(given, named, source.seed)
        except UsersCodeError:
            raise
        except ValueError as error:
            raise ValueError(f"{WHAT} {named}: {error}") from error


def dataset_of(given: Any, name: str, seed: int) -> Dataset:
    """Return what somebody's function returned as a data set.

    Bytes are taken as images: divided by 255, and normalised by mean and standard deviation of the
    training ones, of each channel where they are (channels, height, width).  Other numbers are
    taken as they are.  Where nothing is given for validation, a tenth of training is, by the seed.

    Raises:
        ValueError: it is nothing of the kind.

    >>> points = torch.randn(40, 2), torch.arange(40) % 3
    >>> points = dataset_of((points, points), "points", seed=1111)
    >>> len(points.train), len(points.valid), len(points.test), points.shape, points.classes
    (36, 4, 40, (2,), ('0', '1', '2'))
    """
    if isinstance(given, Dataset):
        return given
    parts, settings = _parts(given)
    splits = {which: _split(part, which, name) for which, part in parts.items()}
    classes = settings.pop("classes", None) or getattr(parts["train"], "classes", None)
    if "valid" not in splits:
        splits["train"], splits["valid"] = _tenth_apart(splits["train"], seed)
    train = splits["train"].images
    usual: dict[str, Any] = {"mean": (0.0,), "std": (1.0,), "scale": 1.0}
    if train.dtype == torch.uint8:
        scale = settings.get("scale", _BYTE)
        images = train if train.ndim == 4 else train.reshape(len(train), 1, 1, -1)
        usual = dict(zip(("mean", "std"), moments(images, scale), strict=True), scale=scale)
    settings = {
        key: tuple(map(float, np.atleast_1d(value))) if key in ("mean", "std") else value
        for key, value in settings.items()
    }
    return Dataset(name, **splits, classes=_classes(classes, splits), **{**usual, **settings})


def _parts(given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The splits by name, and what else is said of the data set."""
    if isinstance(given, Mapping):
        unknown = [key for key in given if key not in (*SPLITS, *SETTINGS)]
        if unknown:
            known = ", ".join(("train", "validation", "test", *SETTINGS))
            raise ValueError(f"it returned a dict with {unknown[0]!r}; its keys may be {known}")
        parts = {SPLITS[key]: part for key, part in given.items() if key in SPLITS}
        settings = {key: given[key] for key in SETTINGS if given.get(key) is not None}
        parts = {which: part for which, part in parts.items() if part is not None}
    elif isinstance(given, Sequence) and len(given) in (2, 3) and not isinstance(given, str):
        if any(isinstance(part, (Tensor, np.ndarray)) for part in given):
            raise ValueError(
                "it returned inputs and labels alone, and must return those of training and of "
                f"test: {ACCEPTED}"
            )
        names = ["train", "test"] if len(given) == 2 else ["train", "valid", "test"]
        parts, settings = dict(zip(names, given, strict=True)), {}
    else:
        raise ValueError(f"it must return {ACCEPTED}; it returned {_a_kind_of(given)}")
    if missing := [which for which in ("train", "test") if which not in parts]:
        raise ValueError(f"what it returned lacks {' and '.join(missing)}")
    return parts, settings


def _split(part: Any, which: str, named: str) -> Split:
    if isinstance(part, Split):
        return part
    if isinstance(part, DataLoader):
        raise ValueError(f"{which} is a DataLoader: give its dataset, which is not in batches")
    if isinstance(part, (tuple, list)) and len(part) == 2 and _is_array(part[0]):
        inputs, labels = part
        if not _is_array(labels):
            raise ValueError(f"the labels of {which} must be a tensor, got {_a_kind_of(labels)}")
    elif hasattr(part, "__getitem__") and hasattr(part, "__len__") and not _is_array(part):
        examples = call(lambda: [part[at] for at in range(len(part))], named, WHAT)
        inputs, labels = _columns(examples, which)
    else:
        raise ValueError(
            f"{which} must be a pair of tensors (inputs, labels) or a data set of torch with a "
            f"length, got {_a_kind_of(part)}"
        )
    inputs, labels = _inputs(torch.as_tensor(inputs), which), _labels(labels, which)
    if not len(inputs) == len(labels):
        raise ValueError(f"{which} has {len(inputs)} inputs and {len(labels)} labels")
    if inputs.numel() == 0:
        raise ValueError(f"{which} has no examples")
    return Split(inputs, labels)


def _columns(examples: Sequence[Any], which: str) -> tuple[Tensor, Tensor]:
    """Inputs and labels of examples that are pairs."""
    inputs, labels = [], []
    for at, example in enumerate(examples):
        if not (isinstance(example, (tuple, list)) and len(example) == 2):
            raise ValueError(
                f"example {at} of {which} must be (input, label), got {_a_kind_of(example)}"
            )
        if not isinstance(example[0], (Tensor, np.ndarray, np.number, int, float)):
            raise ValueError(
                f"the input of example {at} of {which} must be a tensor or an array, got "
                f"{_a_kind_of(example[0])} (torchvision's data sets take a transform: ToTensor())"
            )
        inputs.append(torch.as_tensor(example[0]))
        if inputs[-1].shape != inputs[0].shape:
            raise ValueError(
                f"the input of example {at} of {which} has shape {tuple(inputs[-1].shape)}, that "
                f"of example 0 {tuple(inputs[0].shape)}"
            )
        try:
            labels.append(index(example[1]))
        except TypeError:
            raise ValueError(
                f"the label of example {at} of {which} must be a whole number, got {example[1]!r}"
            ) from None
    if not inputs:
        raise ValueError(f"{which} has no examples")
    return torch.stack(inputs), torch.tensor(labels)


def _inputs(inputs: Tensor, which: str) -> Tensor:
    """Numbers of one of the types that a data set holds."""
    if inputs.is_floating_point():
        return inputs.detach().to(torch.float32)
    if inputs.is_complex() or inputs.dtype == torch.bool or inputs.ndim == 0:
        raise ValueError(
            f"the inputs of {which} must be numbers of shape (examples, …), "
            f"got {inputs.dtype} of shape {tuple(inputs.shape)}"
        )
    return inputs if inputs.dtype in KINDS else inputs.to(torch.int64)


def _labels(labels: Any, which: str) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1:
        raise ValueError(
            f"the labels of {which} must be whole numbers of shape (examples,), "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return labels.to(torch.int64)


def _tenth_apart(every: Split, seed: int) -> tuple[Split, Split]:
    """What is left for training, and a tenth, drawn by the seed, for validation."""
    if len(every) < 2:
        raise ValueError("train must hold at least 2 examples where none are for validation")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    first = len(every) - max(1, len(every) // 10)
    return every.take(order[:first]), every.take(order[first:])


def _classes(named: Any, splits: Mapping[str, Split]) -> tuple[str, ...]:
    """The classes by the names given, or numbered as far as there are labels."""
    if named is not None and not isinstance(named, str):
        return tuple(map(str, named))
    most = max(int(split.labels.max()) for split in splits.values())
    if most >= len(splits["train"]):
        raise ValueError(
            f"a label is {most}: labels count the classes from 0, and train has "
            f"{len(splits['train'])} examples, fewer than these would be classes"
        )
    return tuple(map(str, range(most + 1)))


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _a_kind_of(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"
