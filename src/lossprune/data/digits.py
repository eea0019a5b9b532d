"""The digits of the UCI repository: small enough to be bundled, so that all runs offline.

1,797 handwritten digits of 8×8 pixels with values from 0 to 16: the test part of "Optical
Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (1998), UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49, licensed CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). ``digits.npz`` holds scikit-learn's copy with the
values as uint8, otherwise unchanged.
"""

from importlib.resources import files

import numpy as np
import torch

from lossprune.data import Source
from lossprune.data.dataset import Dataset, Split, moments

SCALE = 16.0
TRAIN, VALID = 1297, 250


def read_digits(source: Source) -> Dataset:
    """Return the digits, split at random by ``source.seed`` into 1,297, 250 and 250.

    >>> read_digits(Source(path=None, seed=1111)).shape
    (1, 8, 8)
    """
    with (files("lossprune.data") / "digits.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        images = torch.from_numpy(arrays["images"])
        labels = torch.from_numpy(arrays["labels"]).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(source.seed))
    every = Split(images, labels)
    train = every.take(order[:TRAIN])
    mean, std = moments(train.images, SCALE, per_channel=False)
    return Dataset(
        name="digits",
        train=train,
        valid=every.take(order[TRAIN : TRAIN + VALID]),
        test=every.take(order[TRAIN + VALID :]),
        classes=tuple("0123456789"),
        mean=mean,
        std=std,
        scale=SCALE,
    )
