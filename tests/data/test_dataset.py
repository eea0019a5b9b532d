"""Data sets in memory: normalisation, batches, augmentation and what is refused."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossprune.data import DATASETS, Dataset, Split, load
from lossprune.data.dataset import moments


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def split(count=20, shape=(3, 6, 5), classes=4):
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=seeded())
    return Split(images, torch.arange(count) % classes)


def dataset(train=None, **options):
    train = train or split()
    settings = {
        "name": "small",
        "train": train,
        "valid": train,
        "test": train,
        "classes": ("a", "b", "c", "d"),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    return Dataset(**(settings | options))


def test_inputs_are_standardised_by_channel():
    small = dataset()
    mean = torch.tensor(small.mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(small.std, dtype=torch.float64)[:, None, None]
    expected = (small.train.images.double() / 255 - mean) / std
    inputs = small.inputs(small.train.images)
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.double(), expected, rtol=1e-5, atol=1e-6)


def test_one_mean_and_scale_serve_all_channels():
    small = dataset(mean=(0.25,), std=(0.5,), scale=16.0)
    image = torch.full((1, 3, 1, 1), 8, dtype=torch.uint8)
    assert small.inputs(image).flatten().tolist() == [0.5, 0.5, 0.5]


def test_moments_are_those_of_the_pixels():
    images = split(count=5000).images
    pixels = images.double() / 255
    mean, std = moments(images)
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(std).double(), pixels.std((0, 2, 3), correction=0))
    mean, std = moments(images, per_channel=False)
    assert mean == (pytest.approx(float(pixels.mean())),)
    assert std == (pytest.approx(float(pixels.std(correction=0))),)


def test_without_an_order_all_are_visited_as_stored():
    small = dataset()
    batches = list(small.batches(small.train, 8))
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(images, small.inputs(small.train.images))
    assert torch.equal(labels, small.train.labels)


@settings(max_examples=30, deadline=None)
@given(order=st.lists(st.integers(0, 19)), size=st.integers(1, 25))
def test_an_order_is_followed(order, size):
    small = dataset()
    order = torch.tensor(order, dtype=torch.int64)
    batches = list(small.batches(small.train, size, order=order))
    assert [len(labels) for _, labels in batches] == [
        min(size, len(order) - start) for start in range(0, len(order), size)
    ]
    for part, (images, labels) in zip(order.split(size), batches, strict=False):
        assert torch.equal(images, small.inputs(small.train.images[part]))
        assert torch.equal(labels, small.train.labels[part])


def test_batches_belong_to_the_caller():
    small = dataset()
    before = small.train.images.clone()
    for images, _ in small.batches(small.train, 8):
        images.zero_()
    assert torch.equal(small.train.images, before)


def possible_crops(image):
    """All crops and their mirror images, made one pixel at a time."""
    height, width = image.shape[1:]
    for down in range(-4, 5):
        for right in range(-4, 5):
            crop = torch.zeros_like(image)
            for y in range(height):
                for x in range(width):
                    if 0 <= y + down < height and 0 <= x + right < width:
                        crop[:, y, x] = image[:, y + down, x + right]
            yield (down, right, False), crop
            yield (down, right, True), torch.stack([crop[:, :, x] for x in range(width)][::-1], 2)


def test_augmented_images_are_uniform_over_crops_and_flips():
    image = split(count=1).images
    copies = 16_200  # 100 for each of the 9 · 9 · 2 outcomes
    same = Split(image.expand(copies, -1, -1, -1), torch.arange(copies) % 4)
    small = dataset(same, mean=(0.0,), std=(1.0,))
    outcomes = {tuple(crop.flatten().tolist()): key for key, crop in possible_crops(image[0])}
    assert len(outcomes) == 162
    counts = dict.fromkeys(outcomes.values(), 0)
    for inputs, _ in small.batches(same, 700, generator=seeded(), augment=True):
        for row in (inputs * 255).round().to(torch.uint8).flatten(1).tolist():
            counts[outcomes[tuple(row)]] += 1
    # A standard deviation of the count is 10: six of them both ways.
    assert min(counts.values()) > 40
    assert max(counts.values()) < 160


def test_augmentation_is_decided_by_its_generator_not_by_the_batches():
    small = dataset()
    order = torch.randperm(20, generator=seeded())

    def augmented(size, seed):
        batches = small.batches(
            small.train, size, order=order, generator=seeded(seed), augment=True
        )
        return torch.cat([images for images, _ in batches])

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(augmented(20, seed=1), augmented(7, seed=1))
    assert not torch.equal(augmented(20, seed=1), augmented(20, seed=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_the_same_on_cuda(augment):
    small = dataset(split(count=1000))
    order = torch.randperm(1000, generator=seeded())
    here, there = small, small.to("cuda")
    pairs = zip(
        here.batches(here.train, 64, order=order, generator=seeded(), augment=augment),
        there.batches(there.train, 64, order=order, generator=seeded(), augment=augment),
        strict=True,
    )
    for (images, labels), (cuda_images, cuda_labels) in pairs:
        assert cuda_images.is_cuda
        assert torch.equal(images, cuda_images.cpu())
        assert torch.equal(labels, cuda_labels.cpu())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "^size of a batch must be .* got 0$"),
        ({"order": torch.tensor([0.0])}, "^order must be a row of int64 .* got torch.float32"),
        ({"order": torch.tensor([[0]])}, r"^order must be .* of shape \(1, 1\)$"),
        ({"order": torch.tensor([3, 20])}, "^order must hold positions from 0 to 19, got 3 to 20$"),
        ({"order": torch.tensor([-1])}, "got -1 to -1$"),
    ],
)
def test_batches_refuses_at_once(options, message):
    small = dataset()
    with pytest.raises(ValueError, match=message):
        small.batches(small.train, **({"size": 4} | options))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3).double(), [0, 1], "^images must be uint8, .* got torch.float64"),
        (torch.tensor(0.0), [0, 1], r"of shape \(\)$"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0], r"^labels must be int64 of shape \(2,\)"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), [0.5], "got torch.float32 of shape"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), [], r"^images must not be empty"),
    ],
)
def test_a_split_refuses_other_tensors(images, labels, message):
    labels = torch.tensor(labels, dtype=None if labels else torch.int64)
    with pytest.raises(ValueError, match=message):
        Split(images, labels)


def with_label(value):
    whole = split()
    labels = whole.labels.clone()
    labels[7] = value
    return Split(whole.images, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"test": with_label(4)},
            r"^data set 'small': test label 4 of example 7 is outside the 4 classes \(0 to 3\)$",
        ),
        ({"valid": with_label(-1)}, "valid label -1 of example 7"),
        (
            {"classes": ("a", "b", "c", "d", "e")},
            r"^data set 'small': class 'e' \(label 4\) has no training example$",
        ),
        (
            {"test": split(shape=(3, 5, 6))},
            r"test images have shape \(3, 5, 6\), train images \(3, 6, 5\)$",
        ),
        ({"mean": (0.5,)}, "mean and std must hold 1 or 3 values each, got 1 and 3$"),
        ({"std": (0.1, 0.0, 0.1)}, "std and scale must be above 0"),
        ({"scale": float("nan")}, "std and scale must be above 0"),
    ],
)
def test_a_data_set_that_cannot_be_trained_on_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataset(**options)


def test_digits_are_split_by_the_seed():
    first, again, other = (load("digits", seed=seed) for seed in (1, 1, 2))
    assert [len(s) for s in first.splits.values()] == [1297, 250, 250]
    assert (first.shape, first.scale, first.augmented) == ((1, 8, 8), 16.0, False)
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.labels, other.train.labels)
    every = torch.cat([s.labels for s in first.splits.values()])
    # The counts that the UCI repository states for its test part.
    assert every.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    inputs = first.inputs(first.train.images)
    assert inputs.mean().abs() < 1e-5
    assert abs(inputs.std(correction=0) - 1) < 1e-5


@pytest.mark.parametrize("name", ["mnist", "cifar10", "folder"])
def test_a_missing_path_is_asked_for(name):
    with pytest.raises(ValueError, match=rf"^data set '{name}' needs a path \(--data_path\)"):
        load(name, seed=0)


def test_an_unknown_name_is_answered_with_the_known_ones():
    known = f"must be one of {', '.join(DATASETS)}, or MODULE:FUNCTION of your own, got 'x'"
    with pytest.raises(ValueError, match=known):
        load("x", seed=0)


def test_the_table_is_read_without_torch():
    code = (
        "import sys; from lossprune.data import DATASETS; print(len(DATASETS), *("
        "name in sys.modules for name in ('torch', 'pooch', 'PIL', 'numpy', 'rich')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(DATASETS)} False False False False False\n"
