"""Hold removed weights at exactly zero through an optimizer's steps, whoever calls them."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossprune.pruning.errors import PruningError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes a weight


class Enforcement:
    """A running :meth:`Mask.enforce`; ``remove()`` or leaving a ``with`` block ends it.

    >>> from lossprune.pruning.mask import Mask
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.AdamW(layer.parameters())
    >>> with Mask({"weight": torch.tensor([[True, False]])}).enforce(layer, optimizer):
    ...     layer(torch.ones(3, 2)).sum().backward()
    ...     optimizer.step()
    ...     (layer.weight != 0).tolist()
    [[True, False]]
    """

    def __init__(self, removed: list[tuple[Tensor, Tensor]], optimizer: Optimizer) -> None:
        """Hold each parameter at 0 where its bool tensor is True, from now on.

        Raises:
            PruningError: the optimizer holds none of the parameters that have removed weights.
        """
        optimizer = innermost(optimizer)
        removed = [(parameter, where) for parameter, where in removed if where.any()]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if removed and not any(id(parameter) in held for parameter, _ in removed):
            raise PruningError(
                "optimizer must hold parameters of the model whose mask is enforced, "
                f"this {type(optimizer).__name__} holds none of the {len(removed)} masked ones"
            )
        parts = [_Held(parameter, where) for parameter, where in removed]

        def zero_(*_: Any) -> None:
            for part in parts:
                part.zero_()

        zero_()
        self._hook = optimizer.register_step_post_hook(zero_)

    def remove(self) -> None:
        """Let the removed weights train again."""
        self._hook.remove()

    def __enter__(self) -> "Enforcement":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer of torch that Lightning's or Accelerate's wrapper hands its steps to."""
    inner = getattr(optimizer, "optimizer", None)
    return innermost(inner) if isinstance(inner, Optimizer) else optimizer


class _Held:
    """One parameter held at zero where it is removed.

    The bits of the weights, read as integers, are and-ed with all ones where a weight is kept and
    with zeros elsewhere: +0.0 whatever was there, NaN included, and every other bit as it was.
    torch does this with vector instructions, ``masked_fill_`` one weight at a time.
    """

    def __init__(self, parameter: Tensor, removed: Tensor) -> None:
        self.parameter = parameter
        self.removed = removed
        self.address = -1
        self._look_()

    def zero_(self) -> None:
        # ``model.to(device)`` and ``parameter.data = …`` put other memory under the same parameter.
        if self.parameter.data_ptr() != self.address:
            self._look_()
        if self.kept_bits is None:
            self.parameter.detach().masked_fill_(self.removed, 0.0)
        else:
            self.bits.bitwise_and_(self.kept_bits)

    def _look_(self) -> None:
        """Look at the parameter's memory as integers, with a mask of them on its device."""
        parameter = self.parameter.detach()
        self.address = self.parameter.data_ptr()
        self.removed = self.removed.to(parameter.device)
        integers = _INTEGERS.get(parameter.element_size())
        self.kept_bits: Tensor | None = None
        if integers is None:
            return
        self.bits = parameter.view(integers)
        # In the memory order of the weights, channels last included, so that both are read in turn.
        self.kept_bits = torch.empty_like(self.bits).copy_(~self.removed).neg_()
