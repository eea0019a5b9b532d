"""Ways to compute a network, tried on an example: built, compared with the masked one, and timed.

What does not work, or gives something else, is left out with a note: the masked network does.
"""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn

from lossprune.channels.calls import Call, same_outputs
from lossprune.channels.costs import Caller, inputs_of, weighted_layers
from lossprune.pruning.errors import PruningError

T = TypeVar("T")


class Candidates:
    """Networks that give what the masked one gives on the example.

    Attributes:
        call: what the example means.
        networks: by name; the first is the masked one.
        notes: what was left out, and why.
    """

    def __init__(self, masked: nn.Module, example: Any) -> None:
        """Take the masked network and an example of what it is called with.

        Raises:
            PruningError: it does not run on the example.
        """
        self.call, self._expected = understood(masked, example)
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

    def add(self, name: str, network: nn.Module) -> None:
        """Take a network if it gives what the masked one gives."""
        same = self.attempt(name, lambda: same_outputs(self.call(network), self._expected))
        if same:
            self.networks[name] = network
        elif same is not None:
            self.notes.append(
                f"{name} was left out: on the example it differs from the masked network"
            )

    def seconds(self, seconds: float) -> dict[str, float]:
        """Return the shortest time of each on the example; ``seconds`` may be spent on each."""
        call = self.call.copied()
        calls = [partial(network, *call.inputs, **call.named) for network in self.networks.values()]
        timings = interleaved(calls, seconds=seconds * len(calls))
        return {name: timing.best for name, timing in zip(self.networks, timings, strict=True)}


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


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over many: the median, the quartiles, and the shortest.

    Whatever else a machine does only makes calls longer, so the shortest is what choices rest on.

    >>> Timing.of([3.0, 1.0, 2.0, 5.0, 4.0])
    Timing(best=1.0, median=3.0, low=2.0, high=4.0, count=5)
    """

    best: float
    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Return the quartiles of ``seconds``."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        low, median, high = (ordered[round(last * share)] for share in (0.25, 0.5, 0.75))
        return cls(ordered[0], median, low, high, len(ordered))


def interleaved(
    calls: Sequence[Callable[[], object]], *, seconds: float = 0.3, least: int = 10
) -> list[Timing]:
    """Time ``calls`` in turn, round after round, so that a busy machine slows all alike.

    Each is called once more right before it is timed: none pays for what the one before it left in
    the caches, or gains by it.

    Args:
        calls: what is timed.
        seconds: how long all of it may take, ...
        least: but at least so many rounds.
    """
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(taken[0]) < least or (time.perf_counter() < end and len(taken[0]) < 10_000):
        for call, times in zip(calls, taken, strict=True):
            call()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [Timing.of(times) for times in taken]


def dense_seconds(network: nn.Module, call: Caller, seconds: float) -> dict[str, float]:
    """Return the shortest time of each of torch's linear layers and convolutions, by name."""
    names = {layer: name for name, layer in weighted_layers(network).items()}
    seen = inputs_of(network, call, list(names))
    calls = [partial(layer, *own.inputs, **own.named) for layer, own in seen.items()]
    timings = interleaved(calls, seconds=seconds, least=5) if calls else []
    return {names[layer]: timing.best for layer, timing in zip(seen, timings, strict=True)}
