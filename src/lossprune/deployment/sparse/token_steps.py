"""Steps on rows that know of each other: norms over features, and tokens of examples.

Values are rows of features, (..., features).  Where one of the steps here but a norm is among the
steps of a part, its values are tokens, (n, tokens, features), or one row an example, (n, features).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lossprune.pruning.errors import PruningError

_LOADED = 1.5  # vectors of rows whose products take as long as loading the weights


@dataclass(frozen=True)
class RowNorm:
    """scale · (x - mean(x)) / √(variance(x) + ``epsilon``) + shift, over a row's features.

    Attributes:
        features: how many.
        epsilon: above 0.
        centred: a layer norm; else there is no mean: the norm is by the root of the mean square.
    """

    features: int
    epsilon: float
    centred: bool = True


@dataclass(frozen=True)
class TokenShift:
    """x + shift, a number for each of so many tokens and features, which all examples share."""

    tokens: int
    features: int


@dataclass(frozen=True)
class TokenAttention:
    """softmax(scale · q kᵀ + bias) v for each head, over the tokens of an example.

    It reads queries, keys, values, and the bias where there is one: a number for each key.

    Attributes:
        heads: of the queries.
        key_heads: of keys and values; each serves as many heads of the queries.
        size, value_size: numbers of a query, and of a value.
        query, key, values: the first channels of these in what is read.
        scale: above 0.
        causal: whether a token sees none after it.
        first: whether the network has its tokens at the first dimension, (tokens, n, features).
    """

    heads: int
    key_heads: int
    size: int
    value_size: int
    query: int
    key: int
    values: int
    scale: float
    causal: bool = False
    first: bool = False


@dataclass(frozen=True)
class TokenMean:
    """The mean over the tokens of an example."""


@dataclass(frozen=True)
class TokenPick:
    """One token of each example, ``place`` from the first, or ``back`` from the last."""

    place: int
    back: bool = False


@dataclass(frozen=True)
class TokenPatches:
    """The numbers of patches of an image, channel by channel, row by row: a token is a patch.

    It reads an input, (n, channels, height, width), which nothing else reads.

    Attributes:
        channels, height, width: of an image.
        size: (vertical, horizontal) of a patch.
        leading: tokens of zeros before those of the patches.
    """

    channels: int
    height: int
    width: int
    size: tuple[int, int]
    leading: int = 0

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.leading + self.height // self.size[0] * (self.width // self.size[1])


TokenOperation = RowNorm | TokenShift | TokenAttention | TokenMean | TokenPick | TokenPatches
OF_TOKENS = (TokenShift, TokenAttention, TokenMean, TokenPick, TokenPatches)


def token_channels(name: str, operation: TokenOperation, channels: Sequence[int]) -> int:
    """Return the channels of what a step gives, of those of what it reads.

    Raises:
        PruningError: they do not fit it.
    """
    match operation:
        case RowNorm(features=features) | TokenShift(features=features):
            if features != channels[0]:
                raise PruningError(f"{name} takes {features} features, its input has {channels[0]}")
        case TokenAttention(heads=heads, key_heads=fewer, size=size, value_size=value) as one:
            ends = one.query + heads * size, one.key + fewer * size, one.values + fewer * value
            biases = channels[3:]
            if any(end > own for end, own in zip(ends, channels, strict=False)) or sum(biases) > 1:
                raise PruningError(f"{name}: its heads need {ends} channels, there are {channels}")
            return heads * value
        case TokenPatches(channels=own, size=(height, width)):
            return own * height * width
    return channels[0]


def images_among(steps: Sequence[Any]) -> dict[str, TokenPatches]:
    """Return the inputs that are images, by name, and how they are cut into patches."""
    return {
        step.reads[0]: step.operation for step in steps if isinstance(step.operation, TokenPatches)
    }


def single_values(steps: Sequence[Any], inputs: Mapping[str, bool]) -> set[str]:
    """Return the values that have one row an example, not one a token.

    Args:
        steps: those of a part.
        inputs: whether what it reads has one.

    Raises:
        PruningError: a step reads values of both kinds, or tokens of what has none.
    """
    single = {name for name, one in inputs.items() if one}
    for step in steps:
        kinds = {name in single for name in step.reads}
        takes = isinstance(step.operation, OF_TOKENS)
        if len(kinds) > 1 or (takes and True in kinds):
            raise PruningError(f"{step.name} reads both tokens and examples as rows")
        if True in kinds or isinstance(step.operation, TokenMean | TokenPick):
            single.add(step.target)
    return single


def misfit(steps: Sequence[Any], inputs: Sequence[str]) -> str | None:
    """Return the first step that takes values for tokens of the same examples which may not be.

    Values are of the same tokens if they come of one input, or of inputs that are added.  Where
    tokens are at the first dimension, attention is all that knows of it.
    """
    of_tokens = [step for step in steps if isinstance(step.operation, OF_TOKENS)]
    first = [getattr(step.operation, "first", False) for step in of_tokens]
    if any(first) and not all(first):
        return of_tokens[first.index(False)].target
    images = images_among(steps)
    for step in steps:
        patches = isinstance(step.operation, TokenPatches)
        if images.keys() & {*step.reads} and not (patches and {*step.reads} <= {*inputs}):
            return step.target
    kin = {name: name for name in inputs}
    for step in steps:
        kin[step.target] = kin[step.reads[0]]
        attention = isinstance(step.operation, TokenAttention)
        for one, other in (step.reads[1::2],) if attention and step.reads[3:] else ():
            kin = _joined(kin, one, other)  # a key and its bias
        for other in () if attention else step.reads[1:]:
            kin = _joined(kin, step.target, other)
    for step in of_tokens:
        if len({kin[name] for name in step.reads}) > 1:
            return step.target
    return of_tokens[0].target if of_tokens and len({kin[name] for name in inputs}) > 1 else None


def _joined(kin: Mapping[str, str], one: str, other: str) -> dict[str, str]:
    return {name: kin[one] if found == kin[other] else found for name, found in kin.items()}


def check_tokens(steps: Sequence[Any], tokens: int) -> None:
    """Refuse examples of a number of tokens that steps do not take.

    Raises:
        PruningError: they are of another number.
    """
    for step in steps:
        match step.operation:
            case TokenShift(tokens=own) if own != tokens:
                raise PruningError(
                    f"{step.name} adds numbers for {own} tokens, the input has {tokens}"
                )
            case TokenPick(place=place, back=back) if tokens < place + (not back):
                raise PruningError(
                    f"{step.name} takes a token by its place, which {tokens} tokens do not have"
                )


@functools.lru_cache
def together(tokens: int, rows: int) -> int:
    """Return how many examples of so many tokens are a block, whose pieces are of so many rows.

    Vectors and their weights are to serve as many tokens as can be.

    >>> together(1, 128), together(50, 128), together(64, 128), together(197, 128)
    (128, 5, 2, 1)
    """
    if tokens >= rows:
        return 1
    choices = [pieces * rows // tokens for pieces in (1, 2)]
    return min(choices, key=lambda count: _cost(count * tokens, rows) / count)


def _cost(rows: int, piece: int) -> float:
    """Return the vectors of so many rows, and the weights that they load, in eighths of a piece."""
    whole, rest = divmod(rows, piece)
    return whole * (8 + _LOADED) + (-(-8 * rest // piece) + _LOADED if rest else 0)
