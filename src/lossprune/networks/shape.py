"""What every network asks of the inputs and outputs it is built for."""

from collections.abc import Sequence


def checked_shape(network: str, shape: Sequence[int], classes: int) -> tuple[int, int, int]:
    """Return ``shape`` as (channels, height, width).

    Raises:
        ValueError: ``shape`` is not three whole numbers of at least 1, or ``classes`` is not a
            whole number of at least 1.

    >>> checked_shape("MLP", [1, 28, 28], classes=10)
    (1, 28, 28)
    >>> checked_shape("MLP", (28, 28), classes=10)
    Traceback (most recent call last):
    ValueError: MLP: shape must be (channels, height, width), each at least 1, got (28, 28)
    """
    if len(shape) != 3 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(
            f"{network}: shape must be (channels, height, width), each at least 1, "
            f"got {tuple(shape)}"
        )
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(f"{network}: classes must be a whole number of at least 1, got {classes}")
    channels, height, width = shape
    return channels, height, width
