"""Hold removed weights at exactly zero through an optimizer's steps, whoever calls them."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossprune.pruning.errors import PruningError
from lossprune.pruning.shards import local

# Wrappers that hand each step to the optimizer inside: Lightning's and Accelerate's.
_HANDS_ON = {"LightningOptimizer", "AcceleratedOptimizer"}
# What optimizers call, in their state, other weights than the current ones that may come back: of
# schedule-free optimizers, slow weights, averages.
_COPIES = {"z", "x", "y", "slow_params", "slow_buffer", "lookahead_params", "backup_params"}
_COPIES |= {"ema", "ax", "mov_avg_param"}
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
            PruningError: the optimizer holds none of the parameters that have removed weights, or
                it cannot be followed.
        """
        levels = _levels(optimizer)
        removed = [(parameter, where) for parameter, where in removed if where.any()]
        held = {id(p) for level in levels for group in level.param_groups for p in group["params"]}
        if removed and not any(id(parameter) in held for parameter, _ in removed):
            frozen = not any(parameter.requires_grad for parameter, _ in removed)
            instead = ", which are frozen: call mask.apply_(model) instead" if frozen else ""
            raise PruningError(
                "optimizer must hold parameters of the model whose mask is enforced, this "
                f"{type(levels[-1]).__name__} holds none of the {len(removed)} masked ones{instead}"
            )
        parts = [_ZeroedWeight(parameter, where) for parameter, where in removed]

        def zero_(level: Optimizer, *_: Any) -> None:
            for part in parts:
                part.zero_()
                _zero_copies_(level, part)

        self._hooks: list[Any] = []
        for level in levels:
            zero_(level)
            self._hooks.append(level.register_step_post_hook(zero_))
            if hasattr(level, "_optimizer_load_state_dict_post_hooks"):
                self._hooks.append(level.register_load_state_dict_post_hook(zero_))

    def remove(self) -> None:
        """Let the removed weights train again."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> "Enforcement":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def _levels(optimizer: Any) -> list[Optimizer]:
    """The optimizer and those inside it, each of which may move weights after the one within.

    Raises:
        PruningError: one of them gives no notice of its steps.
    """
    inside = [
        found
        for value in vars(optimizer).values()
        for part in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(part, Optimizer) and part is not optimizer
        for found in _levels(part)
    ]
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if inside and kinds & _HANDS_ON:
        return inside
    hooked = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    known = hasattr(optimizer, "_optimizer_step_post_hooks")
    if not (hooked and known) or hasattr(optimizer, "fused_backward"):
        raise PruningError(
            "optimizer must be a torch.optim.Optimizer that gives notice of its steps, this "
            f"{type(optimizer).__name__} does not: call mask.apply_(model) after each of its steps "
            "and after it changes the weights for evaluation or training"
        )
    return [optimizer, *inside]


def _zero_copies_(level: Optimizer, part: "_ZeroedWeight") -> None:
    """Hold at zero what the optimizer keeps of the weights beside them.

    Raises:
        PruningError: it puts other weights in for evaluation, and keeps them where is not known.
    """
    state = level.state.get(part.parameter, {})
    copies = _COPIES & state.keys()
    for key in copies:
        copy = local(state[key]) if isinstance(state[key], Tensor) else None
        if copy is not None and copy.shape == part.removed.shape:
            copy.masked_fill_(part.removed.to(copy.device), 0.0)
    if state and not copies and hasattr(level, "eval") and hasattr(level, "train"):
        raise PruningError(
            f"optimizer puts other weights in for evaluation, and this {type(level).__name__} does "
            f"not say which of its state they are ({', '.join(map(str, state))}): call "
            "mask.apply_(model) after each of its steps and after its eval() and train() instead"
        )


class _ZeroedWeight:
    """One parameter held at zero where it is removed; of a sharded one this process's part.

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
        if local(self.parameter).data_ptr() != self.address:
            self._look_()
        if self.kept_bits is None:
            local(self.parameter).masked_fill_(self.removed, 0.0)
        else:
            self.bits.bitwise_and_(self.kept_bits)

    def _look_(self) -> None:
        """Look at the parameter's memory as integers, with a mask of them on its device."""
        parameter = local(self.parameter)
        self.address = parameter.data_ptr()
        self.removed = self.removed.to(parameter.device)
        integers = _INTEGERS.get(parameter.element_size())
        self.kept_bits: Tensor | None = None
        if integers is None:
            return
        self.bits = parameter.view(integers)
        # In the memory order of the weights, channels last included, so that both are read in turn.
        self.kept_bits = torch.empty_like(self.bits).copy_(~self.removed).neg_()
