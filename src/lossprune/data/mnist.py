"""MNIST: 28×28 handwritten digits, read from the four IDX files of Y. LeCun, C. Cortes, C. Burges.

They lie in ``<path>/MNIST/raw``, gzipped or not, and are downloaded if they are missing. Their
contents are checked by the SHA-256 of the uncompressed bytes, so it does not matter how they were
compressed.
"""

import gzip
import hashlib
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lossprune.data import Source
from lossprune.data.dataset import Dataset, Split, moments
from lossprune.data.download import fetch
from lossprune.data.transfer import RemoteFile

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
TRAIN = 50_000


def read_mnist(source: Source) -> Dataset:
    """Return MNIST: 60,000 images split at random by the seed into 50,000 and 10,000; 10,000 test.

    The inputs are normalised by the mean and standard deviation of all pixels of the 50,000.

    Raises:
        ValueError: a file that is there is not MNIST's.
        OSError: a missing file could not be downloaded.
    """
    folder = source.folder() / "MNIST" / "raw"
    parts = [_tensor(name, folder, source) for name in SHA256]
    every = Split(parts[0].unsqueeze(1), parts[1].to(torch.int64))
    test = Split(parts[2].unsqueeze(1), parts[3].to(torch.int64))
    generator = torch.Generator().manual_seed(source.seed)
    order = torch.randperm(len(every), generator=generator)
    train = every.take(order[:TRAIN])
    mean, std = moments(train.images, per_channel=False)
    return Dataset(
        name="mnist",
        train=train,
        valid=every.take(order[TRAIN:]),
        test=test,
        classes=tuple("0123456789"),
        mean=mean,
        std=std,
    )


def _tensor(name: str, folder: Path, source: Source) -> Tensor:
    """Read the IDX file ``name``, plain or gzipped, downloading it if it is neither."""
    path = folder / name
    if not path.exists():
        path = folder / f"{name}.gz"
        remote = RemoteFile(path.name, MIRRORS, partial(_content, name=path.name))
        fetch(remote, folder, mirror=source.mirror, progress=source.progress)
    try:
        return parse_idx(_content(path, path.name))
    except ValueError as error:
        raise ValueError(f"{path} is not MNIST's: {error}; remove it to use another") from None


def _content(path: Path, name: str) -> bytes:
    """Return the uncompressed bytes of MNIST's file ``name``, read from ``path`` and checked.

    Raises:
        ValueError: they are not those of MNIST.
    """
    raw = path.read_bytes()
    if name.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"it cannot be decompressed ({error})") from None
    digest = hashlib.sha256(raw).hexdigest()
    expected = SHA256[name.removesuffix(".gz")]
    if digest != expected:
        raise ValueError(f"the SHA-256 of its contents is {digest}, not {expected}")
    return raw


def parse_idx(raw: bytes) -> Tensor:
    """Return the uint8 array of an IDX file whose contents are known to be good.

    Its header is two zero bytes, the type (8: uint8), the number of dimensions, and the
    dimensions as 4-byte big-endian numbers.

    >>> parse_idx(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 2, 7, 9]))
    tensor([[7, 9]], dtype=torch.uint8)
    """
    ndim = raw[3]
    sizes = np.frombuffer(raw, ">u4", count=ndim, offset=4).tolist()
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim)
    return torch.from_numpy(values.reshape(sizes).copy())
