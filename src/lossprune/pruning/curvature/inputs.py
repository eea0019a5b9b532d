"""What the entries of a weight are multiplied by: the squares of a layer's inputs."""

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from lossprune.pruning.curvature.geometry import Geometry, Linear
from lossprune.pruning.curvature.layers import Seen, WeightCalls
from lossprune.pruning.errors import PruningError


class InputSquares(WeightCalls):
    """While entered, adds up |x|² over examples, positions and uses.

    Attributes:
        totals: by parameter name, of the weight's shape: Σ |x_j|² in every row; added to in place.
    """

    def __init__(self, weights: Mapping[str, Tensor], totals: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self.totals = totals
        self._seen: set[str] = set()
        self._new: list[tuple[str, Tensor, Geometry]] = []
        self._depth = 0  # of functions that are written out in linear ones

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._depth += 1
        try:
            result = super().__torch_function__(func, types, args, kwargs)
        finally:
            self._depth -= 1
        if self._new and not self._depth:
            self._add(packed=func is F.multi_head_attention_forward)
        return result

    def _add(self, *, packed: bool) -> None:
        """Add what the calls of one function have seen."""
        # Queries, keys and values that are not the same are each given to all of a packed weight.
        thirds = packed and len(self._new) >= 3 and len({name for name, *_ in self._new[:3]}) == 1
        for place, (name, squares, geometry) in enumerate(self._new):
            total = geometry.grouped(self.totals[name])  # (g, o, i)
            if thirds and place < 3:
                total = total.chunk(3, dim=1)[place]
            total += squares[:, None]
            self._seen.add(name)
        self._new.clear()

    def _called(self, name: str, seen: Seen, func: Any, args: Any, kwargs: Any) -> Any:
        inputs, _, geometry = seen
        self._new.append((name, geometry.squares(inputs.detach()), geometry))
        return func(*args, **kwargs)

    def norms(self) -> dict[str, Tensor]:
        """Return ‖x_j‖₂, by parameter name, of the weight's shape."""
        return {name: total.abs().sqrt() for name, total in self.totals.items()}

    def check(self, used: Collection[str]) -> None:
        """Raise unless each of the weights that outputs depend on has been seen with its inputs."""
        check_seen(set(used) - self._seen)


class InputMoments(WeightCalls):
    """While entered, adds up the products of the inputs of linear functions with each other.

    Attributes:
        totals: by parameter name: X Xᵀ, (inputs, inputs), over examples, positions and uses; in
            float32, or wider as the weight is.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self.totals: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward and not args[0] is args[1] is args[2]:
            packed = (kwargs or {}).get("in_proj_weight", args[5] if len(args) > 5 else None)
            name = self._names.get(id(packed))
            if name is not None:
                _refuse(name, "is given queries, keys and values that are not the same")
        return super().__torch_function__(func, types, args, kwargs)

    def _called(self, name: str, seen: Seen, func: Any, args: Any, kwargs: Any) -> Any:
        inputs, weight, geometry = seen
        if not isinstance(geometry, Linear) or weight.ndim != 2 or weight.is_complex():
            _refuse(name, "is not that of a linear function of real numbers")
        # Queries, keys and values, say, are of the same tensor.
        if self._last is None or self._last[0] is not inputs:
            wide = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
            x = wide.reshape(-1, wide.shape[-1])
            self._last = inputs, x.T @ x
        product = self._last[1]
        self.totals[name] = (
            self.totals[name].add_(product) if name in self.totals else product.clone()
        )
        return func(*args, **kwargs)


def _refuse(name: str, why: str) -> NoReturn:
    raise PruningError(
        f"{name!r} {why}, so that it is not known how to move what is left of it: take another "
        f"criterion without compensate, or exclude={name!r}"
    )


def check_seen(unknown: Collection[str]) -> None:
    """Raise if the inputs of any weights are not known."""
    if unknown:
        raise PruningError(
            f"the inputs of {min(unknown)!r} are not known, as other functions than linear ones "
            "and convolutions of the weight as a whole use it: take another criterion, or "
            f"exclude={min(unknown)!r}"
        )
