"""What torch's layers take in a network, noted while it runs."""

from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from lossprune.channels.calls import Call
from lossprune.channels.costs import weighted_layers
from lossprune.deployment.race import LONG, Budget
from lossprune.deployment.timing import clock

_ROUNDS = 10


class LayerWatch:
    """Seconds of a network's linear layers and convolutions, by name, in their shortest calls.

    ``with watch:`` is one call of the network, whoever makes it.

    Attributes:
        seconds: of all uses of a layer in one call.
        outputs: how many numbers it gives in one call.
    """

    def __init__(self, network: nn.Module) -> None:
        """Take the network; one of its graph runs the same layers."""
        self.seconds: dict[str, float] = {}
        self.outputs: Counter[str] = Counter()
        self._network, self._now = network, clock()
        self._taken: Counter[str] = Counter()
        self._began: dict[str, float] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> "LayerWatch":
        self._taken.clear()
        self.outputs.clear()
        for name, layer in weighted_layers(self._network).items():
            self._hooks.enter_context(layer.register_forward_pre_hook(partial(self._begin, name)))
            self._hooks.enter_context(layer.register_forward_hook(partial(self._end, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        for name, taken in self._taken.items():
            self.seconds[name] = min(taken, self.seconds.get(name, taken))

    def run(self, call: Call, budget: Budget) -> None:
        """Watch calls until they tell enough: more where they are short, one at least."""
        for _ in range(_ROUNDS):
            begin = self._now()
            with self:
                call(self._network)
            taken = self._now() - begin
            budget.spend(taken)
            if taken > LONG or budget.left <= 0:
                break

    def _begin(self, name: str, *_: Any) -> None:
        self._began[name] = self._now()

    def _end(self, name: str, _: nn.Module, __: object, output: Tensor) -> None:
        self._taken[name] += self._now() - self._began[name]  # type: ignore[assignment]
        self.outputs[name] += output.numel()
