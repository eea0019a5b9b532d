"""Folders and archives of images: what is decoded, cached, noticed and refused."""

import io
import os
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lossprune.data import load
from tests.processes import FORKSERVER, begin

CLASSES = ("cat", "dog")


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def picture(seed, shape=(6, 5, 3)):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def write(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def decodings(capfd, *, seed=0, path):
    """Load ``path`` and tell whether its images were decoded, for that shows a bar."""
    loaded = load("folder", path, seed=seed, progress=True)
    return loaded, "decoding images" in capfd.readouterr().err


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOSSPRUNE_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    """20 training and 4 test images, of 6×5 pixels in two classes."""
    place = tmp_path / "pets"
    for number in range(20):
        write(place, f"train/{CLASSES[number % 2]}/{number:02}.png", encoded(picture(number)))
    for number in range(4):
        write(place, f"test/{CLASSES[number % 2]}/{number:02}.png", encoded(picture(50 + number)))
    return place


def pack(folder, file, mode, top="."):
    with tarfile.open(file, mode) as archive:
        archive.add(folder, top)
    return file


def contents(dataset):
    return [
        tensor.tolist()
        for split in dataset.splits.values()
        for tensor in (split.images, split.labels)
    ]


def test_images_by_class_and_name(folder):
    pets = load("folder", folder, seed=1)
    assert (pets.classes, pets.shape, pets.augmented) == (CLASSES, (3, 6, 5), True)
    assert [len(split) for split in pets.splits.values()] == [18, 2, 4]
    assert pets.test.labels.tolist() == [0, 0, 1, 1]
    expected = [picture(50 + number).transpose(2, 0, 1) for number in (0, 2, 1, 3)]
    assert np.array_equal(pets.test.images.numpy(), expected)


def test_without_a_valid_split_the_same_tenth_is_held_out_for_any_seed(folder):
    first, second = load("folder", folder, seed=1), load("folder", folder, seed=2)
    assert contents(first) == contents(second)
    both = torch.cat([first.train.images, first.valid.images])
    assert len(torch.unique(both, dim=0)) == 20


@pytest.mark.parametrize("name", ["valid", "val"])
def test_a_valid_split_is_taken(folder, name):
    write(folder, f"{name}/dog/x.png", encoded(picture(99)))
    pets = load("folder", folder, seed=1)
    assert [len(split) for split in pets.splits.values()] == [20, 1, 4]
    assert pets.valid.labels.tolist() == [1]
    assert np.array_equal(pets.valid.images[0].numpy(), picture(99).transpose(2, 0, 1))


def test_normalised_by_channel_with_the_training_images(folder):
    pets = load("folder", folder, seed=1)
    inputs = pets.inputs(pets.train.images).double()
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3).double())


@pytest.mark.parametrize(
    ("suffix", "mode", "top"),
    [(".tar", "w", "."), (".tar.gz", "w:gz", "pets"), (".tgz", "w:gz", "."), (".tar", "w", "a")],
)
def test_an_archive_holds_the_same(folder, tmp_path, suffix, mode, top):
    file = pack(folder, tmp_path / f"packed{suffix}", mode, top)
    assert contents(load("folder", file, seed=1)) == contents(load("folder", folder, seed=1))


def test_jpeg_files_are_decoded_as_pillow_does(folder):
    smooth = np.linspace(0, 255, 6 * 5 * 3).reshape(6, 5, 3).astype(np.uint8)
    for number, name in enumerate(("a.jpg", "b.JPEG")):
        raw = encoded(smooth, "JPEG", quality=95)
        write(folder, f"val/cat/{number}{name}", raw)
    pets = load("folder", folder, seed=1)
    expected = np.asarray(Image.open(io.BytesIO(raw))).transpose(2, 0, 1)
    assert np.array_equal(pets.valid.images[0].numpy(), expected)
    assert np.array_equal(pets.valid.images[1].numpy(), expected)


def test_grey_images_stay_grey_until_one_has_colour(tmp_path):
    place = tmp_path / "grey"
    for split in ("train", "val", "test"):
        write(place, f"{split}/cat/1.png", encoded(picture(1, (4, 4))))
    assert load("folder", place, seed=1).shape == (1, 4, 4)
    write(place, "val/cat/2.png", encoded(picture(2, (4, 4, 3))))
    write(place, "val/cat/3.png", encoded(picture(3, (4, 4, 4))))
    pets = load("folder", place, seed=1)
    assert pets.shape == (3, 4, 4)
    assert np.array_equal(pets.train.images[0].numpy(), [picture(1, (4, 4))] * 3)
    without_alpha = picture(3, (4, 4, 4))[:, :, :3].transpose(2, 0, 1)
    assert np.array_equal(pets.valid.images[2].numpy(), without_alpha)


def test_other_files_are_passed_over(folder):
    before = contents(load("folder", folder, seed=1))
    write(folder, "train/cat/.hidden.png", b"no image")
    write(folder, "train/cat/notes.txt", b"no image")
    write(folder, "train/.git/x.png", b"no image")
    write(folder, "drafts/cat/x.png", b"no image")
    assert contents(load("folder", folder, seed=1)) == before


def test_images_are_decoded_once(folder, capfd, cache):
    first, decoded = decodings(capfd, path=folder)
    assert decoded
    again, decoded = decodings(capfd, path=folder)
    assert not decoded
    assert contents(first) == contents(again)
    assert first.classes == again.classes
    assert len(list(cache.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("change", ["content", "added", "removed", "renamed", "same size and time"])
def test_a_change_is_noticed(folder, capfd, cache, change):
    decodings(capfd, path=folder)
    file = folder / "test" / "cat" / "00.png"
    if change == "content":
        file.write_bytes(encoded(picture(77)))
    elif change == "added":
        write(folder, "test/cat/04.png", encoded(picture(77)))
    elif change == "removed":
        file.unlink()
    elif change == "renamed":
        file.rename(file.with_name("zz.png"))
    else:
        status, raw = file.stat(), bytearray(file.read_bytes())
        file.write_bytes(raw)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    _, decoded = decodings(capfd, path=folder)
    assert decoded
    assert len(list(cache.glob("*.safetensors"))) == 1  # The old one is gone.


def test_an_archive_that_changed_is_noticed(folder, tmp_path, capfd):
    file = pack(folder, tmp_path / "pets.tar", "w")
    decodings(capfd, path=file)
    write(folder, "test/cat/99.png", encoded(picture(77)))
    pack(folder, file, "w")
    pets, decoded = decodings(capfd, path=file)
    assert decoded
    assert len(pets.test) == 5


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "another class", "emptied"])
def test_a_damaged_cache_is_made_anew(folder, capfd, cache, damage):
    first, _ = decodings(capfd, path=folder)
    (file,) = cache.glob("*.safetensors")
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-10] ^= 1
    file.write_bytes(
        {
            "truncated": good[:-10],
            "a flipped bit": flipped,
            "another class": good.replace(b"cat", b"bat"),
            "emptied": b"",
        }[damage]
    )
    again, decoded = decodings(capfd, path=folder)
    assert decoded
    assert contents(first) == contents(again)
    _, decoded = decodings(capfd, path=folder)
    assert not decoded


def test_a_cache_that_cannot_be_written_is_warned_of(folder, cache):
    cache.write_bytes(b"not a folder")
    with pytest.warns(UserWarning, match=f"cannot be cached in {cache} .*LOSSPRUNE_CACHE"):
        pets = load("folder", folder, seed=1)
    assert len(pets.test) == 4


LOAD = """
import os
from pathlib import Path
from lossprune.data import load
from lossprune.data.folder import read_folder

os.environ["LOSSPRUNE_CACHE"] = cache
errors = os.open(f"{out}.err", os.O_WRONLY | os.O_CREAT)
os.dup2(errors, 2)
ready.wait()
pets = load("folder", folder, seed=1, progress=True)
Path(out).write_text(f"{pets.train.images.sum()} {pets.test.labels.tolist()}")
"""


@pytest.mark.full("many processes of a folder, beside those of ImageNet")
def test_of_many_processes_one_decodes(folder, cache, tmp_path):
    for number in range(20, 60):  # Big enough that all three would be at it at once.
        write(folder, f"train/cat/{number}.png", encoded(picture(number, (300, 300, 3))))
    for file in folder.rglob("[01]?.png"):
        file.write_bytes(encoded(picture(0, (300, 300, 3))))
    outs = [tmp_path / f"out-{number}" for number in range(3)]
    names = {"folder": str(folder), "cache": str(cache), "ready": FORKSERVER.Barrier(3)}
    processes = [begin(LOAD, out=str(out), **names) for out in outs]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    pets = load("folder", folder, seed=1)
    expected = f"{pets.train.images.sum()} {pets.test.labels.tolist()}"
    assert [out.read_text() for out in outs] == [expected] * 3
    errors = [out.with_suffix(".err").read_text() for out in outs]
    assert sum("decoding images" in error for error in errors) == 1
    assert [path.suffix for path in cache.iterdir() if path.suffix != ".lock"] == [".safetensors"]


def test_nothing_is_printed_where_nobody_looks(folder, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("folder", folder, seed=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (
            "test/dog/odd.png",
            encoded(picture(1, (6, 4, 3))),
            ValueError,
            "test/dog/odd.png is 4×6 pixels, but all images must have one size, .* is 5×6$",
        ),
        (
            "train/cat/broken.jpg",
            b"\xff\xd8\xff not an image",
            ValueError,
            "train/cat/broken.jpg cannot be read as an image",
        ),
        (
            "train/cat/cut.png",
            encoded(picture(1, (60, 50, 3)))[:3000],
            ValueError,
            "train/cat/cut.png cannot be read as an image",
        ),
        (
            "train/cat/other.png",
            encoded(picture(1), "BMP"),
            ValueError,
            "train/cat/other.png cannot be read as an image",
        ),
        (
            "train/cat/deep.png",
            encoded(np.full((6, 5), 40_000, np.uint16)),
            ValueError,
            "train/cat/deep.png cannot be read as an image: its pixels are of the type I;16",
        ),
        (
            "test/emu/1.png",
            encoded(picture(1)),
            ValueError,
            "test/emu: class 'emu' has no images in train$",
        ),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_does_not_fit_is_named(folder, tmp_path, name, content, error, message, packed):
    write(folder, name, content)
    path = pack(folder, tmp_path / "pets.tar.gz", "w:gz") if packed else folder
    with pytest.raises(error, match=f"^{path}/{message}"):
        load("folder", path, seed=1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(folder, tmp_path, split):
    (folder / split).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"^{folder} holds no images in {split}/<class>/"):
        load("folder", folder, seed=1)


def test_both_names_of_the_valid_split_at_once_are_refused(folder):
    write(folder, "val/cat/1.png", encoded(picture(1)))
    write(folder, "valid/cat/1.png", encoded(picture(1)))
    with pytest.raises(ValueError, match=f"^{folder} holds both valid and val"):
        load("folder", folder, seed=1)


def test_a_class_only_in_what_is_held_out_is_missing_from_training(tmp_path):
    place = tmp_path / "few"
    for name in ("train/cat/1", "train/dog/1", "test/cat/1"):
        write(place, f"{name}.png", encoded(picture(1)))
    with pytest.raises(ValueError, match=r"class '(cat|dog)' \(label [01]\) has no training"):
        load("folder", place, seed=1)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"\(--data_path\) {tmp_path}/no does not exist"):
        load("folder", tmp_path / "no", seed=1)


@pytest.mark.parametrize("damage", ["truncated", "text", "checksum"])
def test_a_damaged_archive_is_named(folder, tmp_path, damage):
    file = pack(folder, tmp_path / "pets.tar.gz", "w:gz")
    good = file.read_bytes()
    bad = bytearray(good)
    bad[-6] ^= 1  # in the CRC of the gzip file's end
    file.write_bytes({"truncated": good[:-2000], "text": b"hello", "checksum": bad}[damage])
    with pytest.raises(ValueError, match=f"^{file} is not an archive that can be read"):
        load("folder", file, seed=1)


def test_an_archive_with_the_splits_in_two_places_is_refused(folder, tmp_path):
    file = tmp_path / "pets.tar"
    with tarfile.open(file, "w") as archive:
        archive.add(folder, "a")
        archive.add(folder, "b")
    with pytest.raises(ValueError, match=f"^{file} holds splits in two places, a/ and b/$"):
        load("folder", file, seed=1)


def test_links_in_an_archive_are_not_followed(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(picture(1)))
    (folder / "train" / "cat" / "link.png").symlink_to(tmp_path / "secret.png")
    file = pack(folder, tmp_path / "pets.tar", "w")
    pets = load("folder", file, seed=1)
    assert len(pets.train) + len(pets.valid) == 20
