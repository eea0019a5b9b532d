"""Keeping the library's use of random numbers to itself."""

from typing import Any

import torch


class PrivateRandomness:
    """Random states of our own, which start as torch's global ones are and then go their own way.

    The CPU's may start from a ``state`` that is given instead.

    Entered, they are in force; left, the global ones are back as they were.  Entered again, they
    go on where they were left: a shuffling loader draws fresh examples at every stage, yet the
    caller's generators never move.
    """

    def __init__(self, state: torch.Tensor | None = None) -> None:
        self._states = _states()
        if state is not None:
            self._states[0] = state

    def __enter__(self) -> "PrivateRandomness":
        self._outer = _states()
        _set(self._states)
        return self

    def __exit__(self, *_: Any) -> None:
        self._states = _states()
        _set(self._outer)


def _states() -> list[torch.Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _set(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
