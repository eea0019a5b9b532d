"""CIFAR-10's batches: its exact format, later Pythons' pickles, damage, and code in a pickle."""

import hashlib
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch

from lossprune.data import cifar10, load

TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
NAMES = [*TRAIN, "test_batch"]
COUNT = 20  # images in a batch


def text(value):
    return b"U" + bytes([len(value)]) + value


def number(value):
    return b"M" + struct.pack("<H", value) if value > 255 else b"K" + bytes([value])


def python2_pickle(data, labels):
    """The bytes that Python 2 wrote: protocol 2, with str where Python 3 has bytes."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + number(data.shape[0])
        + number(data.shape[1])
        + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", data.nbytes)
        + data.tobytes()
        + b"tb"
    )
    return (
        b"\x80\x02}("
        + (text(b"batch_label") + text(b"training batch 1 of 5"))
        + (text(b"labels") + b"](" + b"".join(map(number, labels)) + b"e")
        + (text(b"data") + array)
        + (text(b"filenames") + b"](" + text(b"a_s_000001.png") * len(labels) + b"e")
        + b"u."
    )


def python3_pickle(data, labels, protocol=pickle.DEFAULT_PROTOCOL):
    return pickle.dumps({b"data": data, b"labels": labels}, protocol=protocol)


def batch(seed, count=COUNT):
    rng = np.random.default_rng(seed)
    data = rng.integers(256, size=(count, 3072), dtype=np.uint8)
    return data, [int(label) for label in rng.permutation(np.arange(count) % 10)]


@pytest.fixture
def batches():
    return {name: batch(seed) for seed, name in enumerate(NAMES)}


@pytest.fixture
def folder(tmp_path, batches):
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    for name, content in batches.items():
        (place / name).write_bytes(python2_pickle(*content))
    return tmp_path


def archive_of(folder):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
    return stream.getvalue()


def test_what_is_written_here_is_what_numpy_reads(batches):
    data, labels = batches["test_batch"]
    read = pickle.loads(python2_pickle(data, labels), encoding="bytes")
    assert np.array_equal(read[b"data"], data)
    assert read[b"labels"] == labels
    assert read[b"batch_label"] == b"training batch 1 of 5"


def test_planes_labels_split_and_the_published_normalisation(folder, batches):
    cifar = load("cifar10", folder, seed=1)
    assert (cifar.name, cifar.shape, cifar.augmented) == ("cifar10", (3, 32, 32), True)
    assert cifar.mean == (0.4914, 0.4822, 0.4465)
    assert cifar.std == (0.247, 0.243, 0.261)
    assert cifar.classes[:2] == ("airplane", "automobile")
    assert [len(split) for split in cifar.splits.values()] == [90, 10, 20]
    every = np.concatenate([batches[name][0] for name in TRAIN])
    labels = [label for name in TRAIN for label in batches[name][1]]
    assert torch.cat([cifar.train.labels, cifar.valid.labels]).tolist() == labels
    # Red, green and blue planes of 1024, each of 32 rows.
    assert cifar.train.images[41, 2, 5, 7] == every[41, 2 * 1024 + 5 * 32 + 7]
    assert np.array_equal(cifar.valid.images.reshape(10, 3072).numpy(), every[90:])
    assert np.array_equal(cifar.test.images.reshape(20, 3072).numpy(), batches["test_batch"][0])


def test_fifty_thousand_are_split_into_45000_and_5000(tmp_path):
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    raw = python2_pickle(*batch(0, count=10_000))
    for name in NAMES:
        (place / name).write_bytes(raw)
    cifar = load("cifar10", tmp_path, seed=1)
    assert [len(split) for split in cifar.splits.values()] == [45_000, 5_000, 10_000]


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_python_3_are_read(folder, batches, protocol):
    for name, (data, labels) in batches.items():
        file = folder / "cifar-10-batches-py" / name
        file.write_bytes(python3_pickle(data, labels, protocol))
    cifar = load("cifar10", folder, seed=1)
    assert np.array_equal(cifar.test.images.reshape(20, 3072).numpy(), batches["test_batch"][0])
    assert cifar.test.labels.tolist() == batches["test_batch"][1]


def test_the_archive_is_read_without_being_unpacked(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "cifar-10-python.tar.gz").write_bytes(archive_of(folder))
    packed, plain = load("cifar10", other, seed=1), load("cifar10", folder, seed=1)
    assert torch.equal(packed.train.images, plain.train.images)
    assert torch.equal(packed.test.labels, plain.test.labels)
    assert [path.name for path in other.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("cut", [0.5, 0.999])
def test_a_truncated_archive_is_named_and_left(folder, tmp_path, cut):
    other = tmp_path / "other"
    other.mkdir()
    file = other / "cifar-10-python.tar.gz"
    whole = archive_of(folder)
    file.write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(ValueError, match=f"^{file} is not an archive that can be read"):
        load("cifar10", other, seed=1)
    assert file.exists()


def test_a_flipped_bit_in_the_archive_is_noticed(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    damaged = bytearray(archive_of(folder))
    damaged[len(damaged) // 2] ^= 1
    (other / "cifar-10-python.tar.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz"):
        load("cifar10", other, seed=1)


def test_a_download_that_is_not_the_published_archive_is_not_kept(folder, server, tmp_path):
    other = tmp_path / "other"
    server.files["/cifar-10-python.tar.gz"] = archive_of(folder)
    with pytest.raises(OSError, match=r"its MD5 is .*, not c58f30108f718f92721af3b95e74349a"):
        load("cifar10", other, seed=1, mirror=server.url)
    assert not other.exists()


def test_a_missing_batch_is_named(folder):
    (folder / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py lacks data_batch_3"):
        load("cifar10", folder, seed=1)


def md5(raw):
    return hashlib.md5(raw).hexdigest()


def test_the_published_archive_is_downloaded_and_kept(folder, server, tmp_path, monkeypatch):
    # The real one is not at hand, so the one made here counts as published.
    other = tmp_path / "other"
    server.files["/cifar-10-python.tar.gz"] = archive_of(folder)
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", md5(server.files["/cifar-10-python.tar.gz"]))
    for _ in range(2):
        cifar = load("cifar10", other, seed=1, mirror=server.url)
        assert torch.equal(cifar.test.images, load("cifar10", folder, seed=1).test.images)
    assert server.requests == [("/cifar-10-python.tar.gz", None)]


def test_a_damaged_batch_among_published_ones_is_named(folder, monkeypatch):
    place = folder / "cifar-10-batches-py"
    for name in NAMES:
        monkeypatch.setitem(cifar10.MD5, name, md5((place / name).read_bytes()))
    load("cifar10", folder, seed=1)
    damaged = bytearray((place / "data_batch_4").read_bytes())
    damaged[9000] ^= 1  # one pixel
    (place / "data_batch_4").write_bytes(damaged)
    with pytest.raises(ValueError, match=f"^{place / 'data_batch_4'} is corrupt: its MD5 is"):
        load("cifar10", folder, seed=1)


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, exec, np.fromfile])
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("key", [b"data", b"labels", b"extra"])
def test_code_in_a_pickle_is_refused_and_not_run(folder, function, protocol, key):
    trace = folder / "trace"
    argument = {
        os.system: f"touch {trace}",
        exec: f"open({str(trace)!r}, 'w')",
        np.fromfile: str(trace),
    }[function]
    data, labels = batch(0)
    content = {b"data": data, b"labels": labels, key: Malicious(function, argument)}
    file = folder / "cifar-10-batches-py" / "data_batch_2"
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    name = function.__name__
    with pytest.raises(ValueError, match=rf"^{file} is not a batch.*: it names [\w.]+\.{name},"):
        load("cifar10", folder, seed=1)
    assert not trace.exists()


GOOD_DATA, GOOD_LABELS = batch(0)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "it is not a readable pickle"),
        (b"\x89PNG\r\n", "it is not a readable pickle"),
        (python2_pickle(GOOD_DATA, GOOD_LABELS)[:5000], "it is not a readable pickle"),
        (pickle.dumps([1, 2]), "it holds a list, not a dict"),
        (pickle.dumps({b"data": 1}), "its dict lacks labels"),
        (pickle.dumps({b"data": 1, b"labels": []}), r"its data must be uint8 of .*, got int$"),
        (
            python3_pickle(GOOD_DATA[:, :784], GOOD_LABELS),
            r"its data must be uint8 of shape \(n, 3072\), got uint8 of shape \(20, 784\)",
        ),
        (python3_pickle(GOOD_DATA.astype("i4"), GOOD_LABELS), "got int32 of shape"),
        (python3_pickle(GOOD_DATA.astype("f4"), GOOD_LABELS), "an array of the type 'f4'"),
        (python3_pickle(GOOD_DATA, GOOD_LABELS[1:]), "it holds 20 images but 19 labels"),
        (
            python3_pickle(GOOD_DATA, [*GOOD_LABELS[1:], 10]),
            r"label 10 of example 19 is outside the 10 classes \(0 to 9\)",
        ),
        (python3_pickle(GOOD_DATA, ["cat"] * 20), "its labels must be a list of whole numbers"),
        (python3_pickle(GOOD_DATA[:0], []), "images must not be empty"),
    ],
)
def test_a_batch_made_otherwise_is_named(folder, raw, reason):
    file = folder / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=f"^{file} is not a batch of CIFAR-10: .*{reason}"):
        load("cifar10", folder, seed=1)


def test_a_class_missing_from_training_is_named(folder):
    for name in TRAIN:
        data, labels = batch(0)
        labels = [label % 9 for label in labels]
        (folder / "cifar-10-batches-py" / name).write_bytes(python3_pickle(data, labels))
    with pytest.raises(ValueError, match=r"class 'truck' \(label 9\) has no training example"):
        load("cifar10", folder, seed=1)
