"""``lossprune data``: what data sets there are, and what one of them holds."""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

from dataclasses import dataclass
from pathlib import Path

from lossprune.commands import EXIT_OK
from lossprune.data import DATA_PATH, DATA_PATH_HELP, DATASETS, MOST_IMAGE_SIZE
from lossprune.flags import check_seed, check_whole, flag


@dataclass(frozen=True)
class DataConfig:
    """Fetch, verify and describe a data set, or list those there are.

    Raises:
        ValueError: a value that its flag does not accept.
    """

    data_path: Path = flag(DATA_PATH, "data_path", DATA_PATH_HELP)
    mirror: str | None = flag(None, "mirror", "base URL to download missing files from")
    image_size: int = flag(0, "image_size", "height and width of inputs, for imagenet; 0: 224")
    seed: int = flag(1111, "seed", "seed of the split")
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_whole("image_size", self.image_size, 0, MOST_IMAGE_SIZE)
        check_seed("seed", self.seed)


def do(config: DataConfig, name: str | None = None) -> int:
    """List the data sets, or describe the one named, fetching it where it is not there."""
    if name is None:
        for known, entry in DATASETS.items():
            print(f"{known:<10} {entry.summary}")
        return EXIT_OK
    from lossprune.data import load
    from lossprune.pruning.names import listed

    dataset = load(
        name,
        config.data_path,
        seed=config.seed,
        mirror=config.mirror,
        image_size=config.image_size or None,
    )
    print(f"name       {dataset.name}")
    meant = " (channels × height × width)" if len(dataset.shape) == 3 else ""
    print(f"images     {' × '.join(map(str, dataset.shape))}{meant}")
    for split, examples in dataset.splits.items():
        print(f"{split:<10} {len(examples):,} examples")
    print(f"classes    {len(dataset.classes)}: {listed(dataset.classes, 20)}")
    print(f"mean       {', '.join(format(value, '.4f') for value in dataset.mean)}")
    print(f"std        {', '.join(format(value, '.4f') for value in dataset.std)}")
    print(f"training   {'random crop and flip' if dataset.augmented else 'no augmentation'}")
    return EXIT_OK
