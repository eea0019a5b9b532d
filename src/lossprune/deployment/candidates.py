"""Ways to compute a network, tried on an example: built, compared with the masked one, and timed.

What does not work, or gives something else, is left out with a note: the masked network does.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from lossprune.channels.agreement import same_outputs
from lossprune.deployment.example import said, understood
from lossprune.deployment.timing import interleaved

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
            self.notes.append(f"{name} was left out: {said(error)}")
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
        calls: list[Callable[[], object]] = [
            (lambda network=network: network(*call.inputs, **call.named))
            for network in self.networks.values()
        ]
        timings = interleaved(calls, seconds=seconds * len(calls))
        return {name: it.best for name, it in zip(self.networks, timings, strict=True)}
