"""What training outside of torch's optimizer asks of that optimizer."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer


def step_without_gradients(optimizer: Optimizer) -> None:
    """Let hooks and schedules of the optimizer see a step, which changes no parameter."""
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()


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
    if {id(it) for it in group["params"]} != {id(it) for it in network.parameters()}:
        raise ValueError("optimizer must hold exactly the parameters of the network")
    return group


def common_momentum(settings: Mapping[int, Mapping[str, Any]]) -> float:
    """Return the momentum of several optimizers' groups of parameters.

    Raises:
        ValueError: they differ.
    """
    found = sorted({float(it["momentum"]) for it in settings.values()})
    if len(found) > 1:
        raise ValueError(f"optimizers must have the same momentum, got {found}")
    return found[0]
