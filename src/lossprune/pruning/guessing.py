"""Whether a network knows more than who guesses."""

import math

# A loss of this share of that of guessing has learned no more than noise may be.
_KNOWS_NOTHING = 0.95


def told_guess(loss: float, chance: float | None) -> str | None:
    """Return what to tell of a network whose cross-entropy is that of guessing; None of others.

    Args:
        loss: before pruning.
        chance: that of guessing; None of other losses.

    >>> told_guess(2.29, math.log(10))
    "the network's loss before pruning is 2.29, and that of guessing among 10 classes 2.303: is it \
trained, and are its weights loaded?"
    """
    if chance is None or loss < _KNOWS_NOTHING * chance:
        return None
    return (
        f"the network's loss before pruning is {loss:.4g}, and that of guessing among "
        f"{math.exp(chance):,.0f} classes {chance:.4g}: is it trained, and are its weights loaded?"
    )
