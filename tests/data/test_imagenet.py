"""Photographs in ImageNet's layout: what is decoded, mapped, resumed, split and refused."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lossprune.data import load
from lossprune.data.crops import RandomWindows
from lossprune.json_text import parse_digested
from tests.data.photographs import photograph, write_photographs

SIDE, STORED = 28, 32
# One of 255: Pillow rounds to whole levels, and its weights in fixed point depend on where in an
# image the square begins.
LEVELS = 1.01
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOSSPRUNE_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    """4 classes with 30 images each for training, 3 to test."""
    return write_photographs(tmp_path / "photographs", classes=4, train=30, val=3)


def read(path, **options):
    return load("imagenet", path, seed=1, image_size=SIDE, **options)


def decodings(capfd, path):
    loaded = read(path, progress=True)
    return loaded, "decoding images" in capfd.readouterr().err


def levels(inputs):
    """The pixels, 0 to 255, that these inputs were made of."""
    return (inputs * STD + MEAN) * 255


def test_splits_classes_and_sizes(folder):
    photos = read(folder)
    assert photos.classes == ("n00000000", "n00000001", "n00000002", "n00000003")
    # Of 120 images every 25th is held out: the 25th, 50th, 75th and 100th.
    assert [len(split) for split in photos.splits.values()] == [116, 4, 12]
    assert photos.shape == (3, SIDE, SIDE)
    assert photos.train.images.shape == (116, 3, STORED, STORED)
    assert photos.train.labels.bincount().tolist() == [29, 29, 29, 29]
    assert photos.valid.labels.tolist() == [0, 1, 2, 3]
    assert photos.test.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_test_split_of_its_own_leaves_val_for_validation(tmp_path):
    folder = write_photographs(tmp_path / "three", classes=2, train=3, val=2, test=1)
    assert [len(split) for split in read(folder).splits.values()] == [6, 4, 2]


def test_an_image_is_its_middle_square_resized_then_its_middle(folder):
    photos = read(folder)
    files = sorted(folder.glob("val/*/*"))
    (inputs, _), *rest = photos.batches(photos.test, 100)
    assert not rest
    assert inputs.shape == (12, 3, SIDE, SIDE)
    for file, found in zip(files, levels(inputs), strict=True):
        image = Image.open(file).convert("RGB")
        least = min(image.size)
        left, top = ((side - least) // 2 for side in image.size)  # the sides are even
        square = image.crop((left, top, left + least, top + least))
        small = np.asarray(square.resize((STORED, STORED), Image.Resampling.BILINEAR))
        expected = torch.from_numpy(small[2:-2, 2:-2].copy()).permute(2, 0, 1).float()
        assert (found - expected).abs().max() < LEVELS
    torch.testing.assert_close(photos.inputs(photos.test.images), inputs)


def test_grey_images_have_three_equal_channels(folder):
    photos = read(folder)
    grey = [
        (image[0] == image[1]).all() and (image[1] == image[2]).all()
        for image in photos.train.images
    ]
    # 120 training images have the seeds 1 to 120, and four of them are held out.
    assert 17 - 4 <= sum(map(int, grey)) <= 17


def bilinear(image, y, x):
    """The value between the centres of pixels, those at the edge reaching on; float64."""
    height, width = image.shape[1:]
    top, left = int(np.floor(y)), int(np.floor(x))
    total = 0
    for row, col, weight in (
        (top, left, (top + 1 - y) * (left + 1 - x)),
        (top, left + 1, (top + 1 - y) * (x - left)),
        (top + 1, left, (y - top) * (left + 1 - x)),
        (top + 1, left + 1, (y - top) * (x - left)),
    ):
        total += weight * image[:, np.clip(row, 0, height - 1), np.clip(col, 0, width - 1)]
    return total


def test_a_random_window_is_interpolated_pixel_by_pixel():
    images = torch.randint(256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    windows = RandomWindows.draw(6, 14, torch.Generator().manual_seed(1))
    found = windows(images.to(torch.uint8)).double()
    for image, half, centre, result in zip(
        images.double().numpy(), windows.half.double(), windows.centre.double(), found, strict=True
    ):
        # From −1 … 1 over the whole image to pixels, whose centres are at whole numbers.
        left, right = ((c * 8 + 7.5) for c in (centre[0] - half[0], centre[0] + half[0]))
        top, bottom = ((c * 8 + 7.5) for c in (centre[1] - half[1], centre[1] + half[1]))
        for row in range(14):
            for col in range(14):
                y = top + (bottom - top) * (row + 0.5) / 14
                x = left + (right - left) * (col + 0.5) / 14
                expected = bilinear(image, float(y), float(x))
                # float32 coordinates of up to 16 pixels, times 255 levels between neighbours.
                np.testing.assert_allclose(result[:, row, col], expected, atol=1e-2)


def test_random_windows_have_the_published_distribution():
    count = 100_000
    windows = RandomWindows.draw(count, 224, torch.Generator().manual_seed(0))
    width, height = windows.half.abs().T
    assert (windows.centre.abs() + windows.half.abs()).max() <= 1 + 1e-6
    uncut = (width < 1) & (height < 1)
    area, ratio = (width * height)[uncut], (width / height)[uncut]
    assert area.min() >= 0.08 - 1e-6
    assert 3 / 4 - 1e-5 <= ratio.min() < 0.76
    assert 1.32 < ratio.max() <= 4 / 3 + 1e-5
    # Below an area of ¾ no side is ever cut, so there it is uniform: (0.5 − 0.08) / 0.92 below ½.
    share = float((width * height < 0.5).double().mean())
    assert share == pytest.approx(0.42 / 0.92, abs=5 * 0.5 / count**0.5)
    assert float((windows.half[:, 0] < 0).double().mean()) == pytest.approx(0.5, abs=0.01)


def test_training_batches_are_drawn_from_the_generator_alone(folder):
    photos = read(folder)

    def batches(size, seed):
        generator = torch.Generator().manual_seed(seed)
        drawn = photos.batches(photos.train, size, generator=generator, augment=True)
        return torch.cat([inputs for inputs, _ in drawn])

    assert batches(50, 1).shape == (116, 3, SIDE, SIDE)
    torch.testing.assert_close(batches(50, 1), batches(33, 1))
    assert not torch.allclose(batches(50, 1), batches(50, 2))


def test_training_is_scored_on_every_25th_image(folder):
    photos = read(folder)
    scored = photos.scored["train"]
    assert len(scored) == 5
    assert torch.equal(scored.images, photos.train.images[[0, 25, 50, 75, 100]])
    # A view of the file, not a copy.
    assert scored.images.data_ptr() == photos.train.images.data_ptr()


def test_images_are_decoded_once_and_not_held_in_memory(folder, capfd, cache):
    first, decoded = decodings(capfd, folder)
    assert decoded
    again, decoded = decodings(capfd, folder)
    assert not decoded
    assert torch.equal(first.train.images, again.train.images)
    (file,) = cache.glob("*/images.u8")
    assert file.stat().st_size == 132 * 3 * STORED**2
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line for line in maps if str(file) in line]
    assert mapped
    assert all(line.split()[1] == "r--s" for line in mapped)


def test_another_size_has_a_cache_of_its_own(folder, capfd, cache):
    read(folder)
    other = load("imagenet", folder, seed=1, image_size=14)
    assert other.train.images.shape[2:] == (16, 16)
    _, decoded = decodings(capfd, folder)
    assert not decoded
    assert len(list(cache.glob("*/images.u8"))) == 2


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_a_change_is_noticed_and_the_old_cache_goes(folder, capfd, cache, change):
    decodings(capfd, folder)
    file = folder / "train" / "n00000001" / "n00000001_3.JPEG"
    if change == "added":
        file.with_name("new.JPEG").write_bytes(photograph(500))
    elif change == "removed":
        file.unlink()
    else:
        file.rename(file.with_name("zz.JPEG"))
    photos, decoded = decodings(capfd, folder)
    assert decoded
    total = sum(len(split) for split in photos.splits.values())
    assert total == {"added": 133, "removed": 131, "renamed": 132}[change]
    assert len(list(cache.glob("*/images.u8"))) == 1


def test_a_cache_cut_short_is_made_anew(folder, capfd, cache):
    first, _ = decodings(capfd, folder)
    expected = first.train.images.clone()
    (file,) = cache.glob("*/images.u8")
    os.truncate(file, 1000)
    again, decoded = decodings(capfd, folder)
    assert decoded
    assert torch.equal(again.train.images, expected)


LOAD = """
import sys
from lossprune.data import image_map, load

image_map.CHUNK = 20
load("imagenet", sys.argv[1], seed=1, image_size=28, progress=True)
"""


KILLED = """
import os, signal, sys
from lossprune.data import image_map

opened = image_map.opened

def killed(name, raw):
    if name.endswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return opened(name, raw)

image_map.opened = killed
"""


def test_decoding_that_was_killed_goes_on(folder, cache):
    whole = [split.images.clone() for split in read(folder).splits.values()]
    (file,) = cache.glob("*/images.u8")
    index, progress = file.with_name("index.json"), file.with_name("progress.json")
    index.unlink()
    command = [sys.executable, "-c", KILLED + LOAD, folder, "val/n00000003/n00000003_2.JPEG"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    # Images go to the disk in chunks of 20 there.
    assert parse_digested(progress.read_text()) == {"done": 120, "unreadable": []}
    assert not index.exists()
    raw = bytearray(file.read_bytes())
    raw[: 3 * STORED**2] = bytes([7]) * 3 * STORED**2  # What is done is not done again, ...
    raw[125 * 3 * STORED**2 :] = b""  # ... and what is not is.
    file.write_bytes(raw)
    train, valid, test = (split.images for split in read(folder).splits.values())
    assert (train[0] == 7).all()
    assert torch.equal(train[1:], whole[0][1:])
    assert torch.equal(valid, whole[1])
    assert torch.equal(test, whole[2])
    assert sorted(path.name for path in file.parent.iterdir()) == ["images.u8", "index.json"]


def test_of_several_processes_one_decodes(folder, cache):
    command = [sys.executable, "-c", LOAD, folder]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("decoding images" in error for error in errors) == 1


def test_unreadable_images_are_all_named_and_can_be_put_right(folder):
    bad = [folder / "train" / "n00000000" / "n00000000_0.JPEG", folder / "val/n00000003/x.JPEG"]
    good = bad[0].read_bytes()
    bad[0].write_bytes(b"\xff\xd8\xff no image")
    bad[1].write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"^2 of 133 images cannot be used") as raised:
        read(folder)
    assert all(f"{file} cannot be read as an image" in str(raised.value) for file in bad)
    bad[0].write_bytes(good)
    bad[1].write_bytes(good)
    assert len(read(folder).test) == 13


def test_a_png_or_a_cmyk_jpeg_may_bear_the_name_of_a_jpeg(folder):
    """ImageNet has a few of either."""
    file = folder / "val" / "n00000000" / "n00000000_0.JPEG"
    file.write_bytes(photograph(1, "PNG"))
    assert np.array_equal(read(folder).test.images[0].numpy().shape, (3, STORED, STORED))
    stream = io.BytesIO()
    Image.open(file).convert("CMYK").save(stream, "JPEG")
    file.with_name("cmyk.JPEG").write_bytes(stream.getvalue())
    photos = read(folder)
    assert len(photos.test) == 13
    difference = photos.test.images[0].int() - photos.test.images[1].int()
    assert difference.abs().float().mean() < 5  # of 255 levels: JPEG is not exact


def test_too_little_room_is_told_before_anything_is_decoded(folder, monkeypatch, cache):
    with pytest.raises(
        ValueError, match=r"the decoded images take .* GB more, but .* LOSSPRUNE_CACHE"
    ):
        load("imagenet", folder, seed=1, image_size=65_535)


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (
            lambda at: (at / "val").rename(at / "other"),
            FileNotFoundError,
            "no images for test in val/<class>/$",
        ),
        (
            lambda at: (at / "train").rename(at / "other"),
            FileNotFoundError,
            "no images for train in train/<class>/$",
        ),
        (
            lambda at: (at / "test").mkdir(),
            FileNotFoundError,
            "no images for test in test/<class>/: unpack each",
        ),
        (lambda at: (at / "valid").mkdir(), ValueError, "holds both valid and val"),
        (
            lambda at: (
                write_photographs(at / "val" / "x", 1, emu=1)
                and (at / "val/x/emu/n00000000").rename(at / "val/emu")
            ),
            ValueError,
            "val/emu: class 'emu' has no images in train$",
        ),
    ],
)
def test_what_does_not_fit_is_named(folder, prepare, error, message):
    prepare(folder)
    with pytest.raises(error, match=message):
        read(folder)


def test_an_archive_is_refused(tmp_path):
    file = tmp_path / "photographs.tar"
    file.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=rf"\(--data_path\) {file} is not a folder"):
        read(file)


def test_image_size_is_for_photographs():
    with pytest.raises(ValueError, match=r"^image size .* is for imagenet, not for digits$"):
        load("digits", seed=1, image_size=28)
    with pytest.raises(ValueError, match=r"from 1 to 65,535, got 0$"):
        load("imagenet", "x", seed=1, image_size=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_images_that_a_gpu_has_no_room_for_stay_and_batches_are_moved(folder, monkeypatch):
    monkeypatch.setattr("lossprune.data.dataset.SHARE", 1e12)
    photos = read(folder, device="cuda")
    assert not photos.train.images.is_cuda
    (inputs, labels), *_ = photos.batches(photos.train, 10)
    assert inputs.is_cuda
    assert labels.is_cuda
