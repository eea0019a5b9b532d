"""A data set of one's own: what a function may return, and what is refused."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lossprune.data import Dataset as Ours
from lossprune.data import load
from lossprune.data.own import dataset_of

LABELS = torch.arange(60) % 3
INPUTS = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
PAIR = (INPUTS, LABELS)


class Items(Dataset):
    """Examples one by one, with names of classes, as torchvision's data sets have them."""

    classes = ("red", "green", "blue")

    def __init__(self, change=lambda at, item: item) -> None:
        self.change = change

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, at: int):
        return self.change(at, (INPUTS[at].numpy(), int(LABELS[at])))


def same(one: Ours, other: Ours) -> bool:
    return all(
        torch.equal(one.splits[which].images, split.images)
        and torch.equal(one.splits[which].labels, split.labels)
        for which, split in other.splits.items()
    )


@pytest.mark.parametrize(
    "given",
    [
        (PAIR, PAIR, PAIR),
        {"train": PAIR, "validation": PAIR, "test": PAIR},
        [TensorDataset(*PAIR)] * 3,
        [Items()] * 3,
        [(INPUTS.double().numpy(), LABELS.int().numpy())] * 3,
        {"train": Items(), "val": [INPUTS, LABELS.to(torch.uint8)], "test": PAIR},
    ],
)
def test_all_ways_to_give_it_are_one_data_set(given):
    found = dataset_of(given, "own", seed=1)
    assert same(found, dataset_of((PAIR, PAIR, PAIR), "own", seed=1))
    (batch, labels), *rest = found.batches(found.test, 60)
    assert not rest
    assert torch.equal(batch, INPUTS)
    assert torch.equal(labels, LABELS)
    batch.zero_()  # a network may change what it gets
    assert torch.equal(found.test.images, INPUTS)
    train = given["train"] if isinstance(given, dict) else given[0]
    assert found.classes == getattr(train, "classes", ("0", "1", "2"))


def test_a_tenth_of_training_is_for_validation_by_the_seed():
    one, again, other = (dataset_of((PAIR, PAIR), "own", seed) for seed in (1, 1, 2))
    assert (len(one.train), len(one.valid), len(one.test)) == (54, 6, 60)
    assert same(one, again)
    assert not same(one, other)
    rows = torch.cat((one.train.images, one.valid.images))
    assert torch.equal(rows.sort(0).values, INPUTS.sort(0).values)


def test_bytes_are_images_and_normalised_by_those_of_training():
    pixels = torch.randint(256, (60, 3, 5, 5), dtype=torch.uint8)
    found = dataset_of(((pixels, LABELS), (pixels, LABELS), (pixels, LABELS)), "own", seed=1)
    inputs = found.inputs(found.train.images)
    assert inputs.mean((0, 2, 3)) == pytest.approx(torch.zeros(3), abs=1e-5)
    assert inputs.std((0, 2, 3), correction=0) == pytest.approx(torch.ones(3), abs=1e-5)
    grey = dataset_of({"train": (pixels[:, 0], LABELS), "test": (pixels[:, 0], LABELS)}, "own", 1)
    assert grey.shape == (5, 5)
    assert float(grey.inputs(grey.train.images).mean()) == pytest.approx(0, abs=1e-5)


def test_what_is_said_in_a_dictionary_counts():
    found = dataset_of(
        {"train": PAIR, "test": PAIR, "classes": list("abc"), "mean": 1, "std": [2.0]},
        "own",
        seed=1,
    )
    assert found.classes == ("a", "b", "c")
    assert torch.equal(found.inputs(INPUTS), INPUTS * 0.5 - 0.5)


def text(at, item):
    return ("four", item[1])


NAN = INPUTS.clone()
NAN[7, 1] = torch.nan


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, r"it must return \(train, test\), .*; it returned None$"),
        (PAIR, "it returned inputs and labels alone, and must return those of training and of"),
        ((PAIR,), "it returned a tuple of 1$"),
        ({"train": PAIR, "tset": PAIR}, "a dict with 'tset'; its keys may be train, validation, "),
        ({"train": PAIR}, "what it returned lacks test$"),
        ((DataLoader(Items()), PAIR), "train is a DataLoader: give its dataset, which is not in"),
        ((PAIR, 3), "test must be a pair of tensors .* got an object of type int$"),
        (((INPUTS, LABELS[:9]), PAIR), "train has 60 inputs and 9 labels$"),
        (((INPUTS, LABELS.float()), PAIR), "labels of train must be whole .* got torch.float32"),
        (((INPUTS, LABELS[:, None]), PAIR), r"the labels of train .* of shape \(60, 1\)$"),
        (((INPUTS, "labels"), PAIR), "the labels of train must be a tensor, got an object of"),
        ((PAIR, (INPUTS[:0], LABELS[:0])), "test has no examples$"),
        ((PAIR, PAIR, (INPUTS[:, :3], LABELS)), "test images have shape .3,., train images .4,.$"),
        ((PAIR, (INPUTS.long(), LABELS)), "test images are torch.int64, train images torch.float"),
        (((NAN, LABELS), PAIR, PAIR), "train input 7 holds a value that is not finite$"),
        ((PAIR, (INPUTS, LABELS + 1)), r"class '3' \(label 3\) has no training example$"),
        (((INPUTS, LABELS - 1), PAIR), "label -1 of example "),
        (((INPUTS, LABELS + 10**9), PAIR), "a label is 1000000002: labels count the classes from"),
        (((INPUTS > 0, LABELS), PAIR), "the inputs of train must be numbers .* got torch.bool"),
        ((Items(text), PAIR), "the input of example 0 of train must be a tensor or an array, got"),
        ((Items(lambda at, item: item[0]), PAIR), "example 0 of train must be .input, label., got"),
        ((Items(lambda at, item: (item[0], 0.5)), PAIR), "must be a whole number, got 0.5$"),
        ((Items(lambda at, item: (item[0][at % 2 :], 0)), PAIR), "example 1 of train has shape"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(given, said):
    with pytest.raises(ValueError, match=said):
        dataset_of(given, "own", seed=1)


_numbers = itertools.count()


def test_the_function_gets_what_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"readers{next(_numbers)}"
    Path(f"{name}.py").write_text(
        "import torch\n"
        "def load(path, seed):\n"
        "    pair = torch.full((60, 4), float(seed)), torch.arange(60) % 3\n"
        "    assert str(path) == 'there'\n"
        "    return pair, pair\n"
        "def nothing():\n"
        "    pair = torch.randn(60, 4), torch.arange(60) % 3\n"
        "    return pair, pair\n"
        "def size(image_size=7):\n"
        "    pair = torch.zeros(60, image_size or 3), torch.arange(60) % 3\n"
        "    return pair, pair\n"
        "def fails():\n"
        "    raise OSError('the disk is gone')\n"
    )
    assert float(load(f"{name}:load", "there", seed=5).train.images[0, 0]) == 5
    before = torch.random.get_rng_state()
    drawn = load(f"{name}:nothing", seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(drawn, load(f"{name}:nothing", seed=5))
    assert load(f"{name}:size", seed=5, image_size=9).shape == (9,)
    with pytest.raises(ValueError, match=f"--dataset {name}:fails: it raised OSError: the disk is"):
        load(f"{name}:fails", seed=5)


def test_numpy_counts_as_tensors():
    whole = dataset_of([(np.arange(120).reshape(60, 2), LABELS.numpy())] * 2, "own", seed=1)
    assert whole.train.images.dtype == torch.int64
    inputs, _ = next(whole.batches(whole.train, 9))
    assert inputs.dtype == torch.int64
