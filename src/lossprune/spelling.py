"""Which of the words there are was meant by one that is not among them."""

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most like this one, in large or small letters, if any is.

    Of the letters of both together a quarter may be in one alone, or two, as where one is wrong.

    >>> nearest("qm", ["MP", "LM", "QM"]), nearest("expnential", ["linear", "exponential"])
    ('QM', 'exponential')
    >>> nearest("hello", ["MP", "LM", "QM"])
    """
    likeness, near = 0.0, None
    matcher = SequenceMatcher()
    matcher.set_seq2(word.lower())
    for choice in known:
        matcher.set_seq1(choice.lower())
        total = len(word) + len(choice)
        least = 1 - max(2, total / 4) / max(total, 1)
        if matcher.real_quick_ratio() >= least and matcher.ratio() > max(likeness, least - 1e-9):
            likeness, near = matcher.ratio(), choice
    return near
