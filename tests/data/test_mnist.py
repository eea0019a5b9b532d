"""Real MNIST: read plain, gzipped and from a server, and refused when damaged."""

import gzip

import pytest
import torch

from lossprune.data import load

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture
def folder(real_data, tmp_path):
    """A data path of links to the four files."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        (raw / f"{name}.gz").symlink_to(real_data / "MNIST" / "raw" / f"{name}.gz")
    return tmp_path


def test_split_labels_and_normalisation(real_data):
    mnist = load("mnist", real_data, seed=1111)
    assert (mnist.name, mnist.shape, mnist.augmented) == ("mnist", (1, 28, 28), False)
    assert [len(split) for split in mnist.splits.values()] == [50_000, 10_000, 10_000]
    assert mnist.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    # The class counts of the 60,000 and the 10,000, as everyone counts them.
    every = torch.cat([mnist.train.labels, mnist.valid.labels])
    assert every.bincount().tolist() == [
        *(5923, 6742, 5958, 6131, 5842),
        *(5421, 5918, 6265, 5851, 5949),
    ]
    assert mnist.test.labels.bincount().tolist() == [
        *(980, 1135, 1032, 1010, 982),
        *(892, 958, 1028, 974, 1009),
    ]
    inputs = mnist.inputs(mnist.train.images)
    assert inputs.mean().abs() < 1e-4
    assert abs(inputs.std() - 1) < 1e-4
    assert len(mnist.mean) == len(mnist.std) == 1


def test_seed_decides_the_split(real_data):
    first, again, other = (load("mnist", real_data, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.valid.images, again.valid.images)
    assert torch.equal(first.train.labels, again.train.labels)
    assert not torch.equal(first.valid.labels, other.valid.labels)
    assert torch.equal(first.test.images, other.test.images)
    # Another split of the same images.
    assert first.train.images.sum() + first.valid.images.sum() == (
        other.train.images.sum() + other.valid.images.sum()
    )


def test_plain_files_are_read_as_gzipped_ones_are(folder, real_data):
    for name in NAMES:
        packed = folder / "MNIST" / "raw" / f"{name}.gz"
        (folder / "MNIST" / "raw" / name).write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    plain, packed = load("mnist", folder, seed=1), load("mnist", real_data, seed=1)
    assert torch.equal(plain.train.images, packed.train.images)
    assert torch.equal(plain.test.labels, packed.test.labels)


def test_missing_files_are_downloaded_however_they_are_compressed(folder, server, tmp_path):
    raw = folder / "MNIST" / "raw"
    labels = gzip.decompress((raw / "t10k-labels-idx1-ubyte.gz").read_bytes())
    server.files["/t10k-labels-idx1-ubyte.gz"] = gzip.compress(labels, compresslevel=1)
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    mnist = load("mnist", folder, seed=1, mirror=server.url)
    assert mnist.test.labels[:3].tolist() == [7, 2, 1]
    assert server.requests == [("/t10k-labels-idx1-ubyte.gz", None)]
    assert (raw / "t10k-labels-idx1-ubyte.gz").exists()


def test_a_download_that_is_something_else_is_not_kept(folder, server):
    raw = folder / "MNIST" / "raw"
    server.files["/t10k-labels-idx1-ubyte.gz"] = gzip.compress(b"other labels")
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(OSError, match=r"t10k-labels.*the SHA-256 of its contents is .*, not ff7b"):
        load("mnist", folder, seed=1, mirror=server.url)
    left = {path.name for path in raw.iterdir() if path.suffix != ".lock"}
    assert left == {f"{name}.gz" for name in NAMES[:3]}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw: raw[:-100], "it cannot be decompressed"),
        (lambda _: b"not gzip at all", "it cannot be decompressed"),
        (lambda _: gzip.compress(b"\0\0\x08\x01\0\0\0\x01\x05"), "the SHA-256 of its contents is"),
    ],
)
def test_a_damaged_file_is_named_refused_and_left_alone(folder, damage, reason):
    file = folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    damaged = damage(file.read_bytes())
    file.unlink()
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"^{file} is not MNIST's: {reason}"):
        load("mnist", folder, seed=1)
    assert file.read_bytes() == damaged


def test_a_flipped_bit_in_a_plain_file_is_noticed(folder):
    raw = folder / "MNIST" / "raw"
    content = bytearray(gzip.decompress((raw / "t10k-labels-idx1-ubyte.gz").read_bytes()))
    content[5000] ^= 1
    (raw / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte is not MNIST's: the SHA-256"):
        load("mnist", folder, seed=1)


def test_the_global_random_state_is_left_as_found(real_data):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load("mnist", real_data, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_written_where_nothing_is_missing(folder):
    raw = folder / "MNIST" / "raw"
    load("mnist", folder, seed=1)
    assert {path.name for path in raw.iterdir()} == {f"{name}.gz" for name in NAMES}
