"""What a table is, and what the captions of all of them say."""

from dataclasses import dataclass

import pandas as pd

RULE = (
    "The best λ of a criterion and π is the one with the lowest mean validation loss right after "
    "pruning, over seeds, among those λ measured on the most seeds; test data take no part in it."
)
SPREAD = (
    "n counts seeds; std has n − 1 in the denominator; the interval is the 95 % t-interval of the "
    "mean. What is not finite is counted as diverged and left out of the mean."
)


@dataclass(frozen=True)
class Column:
    """A column as it is shown.

    Attributes:
        key: of the frame.
        heading: above it.
        kind: ``text``, ``count``, ``reg`` (a λ), ``change`` (a signed number) or ``percent`` (a
            fraction, shown in percent).
    """

    key: str
    heading: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """A table to be written in any format.

    Attributes:
        name: of its files.
        title: one line.
        caption: what was measured, over what, and how λ was chosen.
        columns: shown, in order; rows are grouped by ``network``, which is not among them.
        frame: the numbers at full precision.
    """

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    frame: pd.DataFrame
