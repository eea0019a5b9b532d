"""Ways to compute a network, tried on an example: built, compared with the masked one, and timed.

What does not work, or gives something else, is left out with a note: the masked network does.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import nn

from lossprune.channels.calls import Call, same_outputs
from lossprune.deployment.race import Budget, race
from lossprune.deployment.timing import clock
from lossprune.pruning.errors import PruningError

T = TypeVar("T")

_ALIKE = 1.5  # times: of first calls of the masked and the compacted network


class Candidates:
    """Networks that give what the masked one gives on the example.

    Attributes:
        call: what the example means.
        networks: by name; the first is the masked one.
        notes: what was left out, and why.
        budget: what comparisons may still take.
    """

    def __init__(self, masked: nn.Module, example: Any, seconds: float) -> None:
        """Take the masked network, an example of what it is called with, and the budget.

        Raises:
            PruningError: it does not run on the example.
        """
        self.budget = Budget(seconds)
        self._now = clock()
        begin = self._now()
        self.call, self._expected = understood(masked, example)
        self._first = {"masked": self._now() - begin}
        self.networks: dict[str, nn.Module] = {"masked": masked}
        self.notes: list[str] = []

    def attempt(self, name: str, make: Callable[[], T]) -> T | None:
        """Return what ``make`` makes for the candidate of this name; None where it raises."""
        try:
            return make()
        # Candidates run the network's own code in ways that its author has not thought of, so they
        # may raise anything; and none is needed, as there is always the masked network.
        except Exception as error:
            self.notes.append(f"{name} was left out: {_said(error)}")
            return None

    def add(self, name: str, network: nn.Module, *, ready: bool = False) -> bool:
        """Take a network if it gives what the masked one gives; say whether it does.

        What the call takes counts where the network is ``ready``: others lay themselves out in it.
        """
        begin = self._now()
        outputs = self.attempt(name, lambda: [self.call(network)])
        taken = self._now() - begin
        if outputs is None:
            return False
        same = self.attempt(name, lambda: same_outputs(outputs[0], self._expected))
        if same:
            self.networks[name], self._first[name] = network, taken if ready else 0.0
        elif same is not None:
            self.notes.append(
                f"{name} was left out: on the example it differs from the masked network"
            )
        return bool(same)

    def seconds(self) -> dict[str, float]:
        """Return the shortest time of each on the example."""
        call = self.call.copied()
        calls = [partial(network, *call.inputs, **call.named) for network in self.networks.values()]
        first = dict(self._first)
        if first["masked"] > _ALIKE * first.get("compacted", 0.0):
            first["masked"] = 0.0  # the process's first call of torch may wait for much
        times = race(calls, self.budget, list(first.values()))
        return dict(zip(self.networks, times, strict=True))


def understood(masked: nn.Module, example: Any) -> tuple[Call, Any]:
    """Return the first reading of ``example`` that the network takes, and what it gives then.

    Raises:
        PruningError: it takes none of them.
    """
    first: Exception | None = None
    for call in _readings(masked, example):
        try:
            return call, call(masked)
        except Exception as error:  # whatever the network's own code raises
            first = first or error
    assert first is not None
    raise PruningError(
        f"{type(masked).__name__} does not run on example: {_said(first)}"
    ) from first


def _readings(model: nn.Module, example: Any) -> list[Call]:
    """Return the calls that ``example`` may stand for, the likeliest first."""
    whole = Call((example,), {})
    if isinstance(example, Mapping):
        parameters = inspect.signature(type(model).forward).parameters
        named = Call((), dict(example))
        return [named, whole] if all(key in parameters for key in example) else [whole, named]
    if isinstance(example, (tuple, list)):
        return [Call(tuple(example), {}), whole]
    return [whole]


def _said(error: Exception) -> str:
    """Return an error's message in one line, and its type where that tells more."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]}…"
    known = isinstance(error, PruningError) or type(error).__module__.startswith("lossprune.")
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")
