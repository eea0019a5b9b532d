"""What one process has of a sharded network: its part of each weight (``DTensor``).

``fully_shard`` (FSDP2) and tensor parallel networks have such parameters.
"""

from typing import Any

from torch import Tensor, nn

from lossprune.pruning.errors import PruningError

_PLACEMENTS = {"Shard", "Replicate"}  # of which every process can tell its part by itself


def reshard_(model: nn.Module) -> None:
    """Free the whole weights that ``fully_shard`` has gathered for a pass; its shards are left.

    What is written into gathered weights is lost with them.
    """
    for module in model.modules():
        if hasattr(module, "unshard") and hasattr(module, "reshard"):
            module.reshard()  # pyright: ignore[reportCallIssue]


def local(tensor: Tensor) -> Tensor:
    """Return this process's part, which shares its memory; a whole tensor itself; detached."""
    part: Any = tensor.detach()
    return part.to_local() if hasattr(part, "placements") else part


def part_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a whole tensor that is where :func:`local` of a parameter is.

    Processes need not talk for that: each has ``whole``.

    Raises:
        PruningError: the parameter is divided in a way that is not known.
    """
    whole = whole.to(parameter.device)
    placements: Any = getattr(parameter, "placements", None)
    if placements is None:
        return whole
    unknown = [p for p in placements if type(p).__name__ not in _PLACEMENTS]
    if unknown:
        raise PruningError(
            f"a parameter of shape {tuple(parameter.shape)} is divided by {unknown[0]}, as "
            "by fully_shard over tensor parallel layers: a mask is divided by Shard and Replicate"
        )
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = getattr(parameter, "device_mesh")  # noqa: B009 - of DTensors alone
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
