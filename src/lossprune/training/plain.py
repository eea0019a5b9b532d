"""What training outside of torch's own loop asks of networks, optimizers and batches."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer


def hooked_module(network: nn.Module) -> str | None:
    """Return the name of a module with hooks, which such training would not run; None: none has."""
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return name
    return None


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError unless it is a whole number of at least 1."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")


def plain_settings(network: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the learning rate, momentum and weight decay of plain SGD, as its group of parameters.

    Raises:
        ValueError: it is not SGD, has several groups, holds other parameters than the network's, or
            uses nesterov, dampening or maximize.
    """
    if type(optimizer) is not SGD or len(optimizer.param_groups) != 1:
        raise ValueError(
            f"optimizer must be torch.optim.SGD with one group of parameters, got {optimizer!r}"
        )
    group = optimizer.param_groups[0]
    if group["nesterov"] or group["dampening"] or group["maximize"]:
        raise ValueError(
            "optimizer must be SGD without nesterov, dampening and maximize, got " + repr(optimizer)
        )
    own = {id(parameter) for parameter in network.parameters()}
    if {id(parameter) for parameter in group["params"]} != own:
        raise ValueError("optimizer must hold exactly the parameters of the network")
    return group


def common_settings(
    networks: Sequence[nn.Module], optimizers: Sequence[Optimizer], members: Sequence[int]
) -> tuple[dict[int, dict[str, Any]], float]:
    """Return :func:`plain_settings` of these networks, by their position, and their one momentum.

    Raises:
        ValueError: an optimizer is not plain, or their momenta differ.
    """
    settings = {member: plain_settings(networks[member], optimizers[member]) for member in members}
    found = sorted({float(group["momentum"]) for group in settings.values()})
    if len(found) > 1:
        raise ValueError(f"optimizers must have the same momentum, got {found}")
    return settings, found[0]


def step_without_gradients(optimizer: Optimizer) -> None:
    """Let hooks and schedules of the optimizer see a step, which changes no parameter."""
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
