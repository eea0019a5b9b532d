"""The folder that ``lossprune prune`` leaves: its files and what each is for, and its table."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossprune.commands.output import NETWORK, TABLE, json_bytes, open_out
from lossprune.experiment.folder import MASK, RECORD
from lossprune.experiment.log import told_compensation
from lossprune.text_table import markdown_table

if TYPE_CHECKING:
    from torch import nn

    from lossprune.channels.connectivity import Connectivity
    from lossprune.pruning import Cost, Mask
    from lossprune.pruning.stages import Stages

FORMAT = "lossprune pruning 1"
STATE_DICT = "state_dict.safetensors"
COLUMNS = ("weight", "shape", "weights", "kept", "removed", "sparsity", "unreachable units")
SPARE = ("shape", "removed")  # where there is no room for them

# What each file is, and what loads it.
FILES = {
    NETWORK: "pruned weights: lossprune.load_sparse(path, network)",
    STATE_DICT: "plain state dict: safetensors.torch.load_file(path)",
    MASK: "what is kept: lossprune.Mask.load(path)",
    RECORD: "settings, versions, every stage, every layer",
    TABLE: "this table",
}


def write_folder(
    out: Path, network: "nn.Module", mask: "Mask", record: Mapping[str, Any], table: str
) -> None:
    """Write all files, the record last: a folder with one is whole."""
    from lossprune.deployment.sparse_file import save_sparse

    folder = open_out(out)
    folder.remove(RECORD)
    folder.save(MASK, mask.save)
    folder.save(NETWORK, lambda path: save_sparse(network, mask, path))
    folder.save(STATE_DICT, lambda path: _save_state_dict(network, path))
    folder.write(TABLE, table.encode())
    folder.write(RECORD, json_bytes(record))


def _save_state_dict(network: "nn.Module", path: Path) -> None:
    """Write the state dict as safetensors, which hold no two names of one tensor: each its own."""
    from safetensors.torch import save

    tensors = network.state_dict().items()
    path.write_bytes(save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors}))


def table_of(rows: Sequence[Sequence[str]], notes: Iterable[str]) -> str:
    """Return the table as Markdown, with the notes and what each file is below it."""
    files = [f"`{name}`: {what}" for name, what in FILES.items()]
    return markdown_table(COLUMNS, rows) + "".join(f"\n{line}\n" for line in [*notes, *files])


def rows_of(found: "Connectivity", unused: Collection[str]) -> list[list[str]]:
    """Return the rows of the table; weights that are ``unused`` are marked."""
    rows = [
        [
            layer.name + (" (unused)" if layer.name in unused else ""),
            " × ".join(map(str, layer.shape)),
            f"{layer.total:,}",
            f"{layer.kept:,}",
            f"{layer.removed:,}",
            f"{layer.removed / max(layer.total, 1):.5f}",
            f"{layer.dead_units:,} of {layer.units:,}",
        ]
        for layer in found.layers
    ]
    total, kept, dead, units = (
        sum(getattr(layer, name) for layer in found.layers)
        for name in ("total", "kept", "dead_units", "units")
    )
    last = ["all", "", f"{total:,}", f"{kept:,}", f"{total - kept:,}"]
    return [*rows, [*last, f"{found.nominal_sparsity:.5f}", f"{dead:,} of {units:,}"]]


def notes_of(found: "Connectivity", pruning: "Stages", outcome: Mapping[str, Any]) -> list[str]:
    """Return what is to be said below the table."""
    notes = [
        f"effective sparsity {found.effective_sparsity:.5f}",
        f"of all {outcome['model_parameters']:,} parameters of the network: "
        f"{outcome['model_sparsity']:.1%} removed",
    ]
    if pruning.left_out:
        names = ",".join(["*", *pruning.left_out])
        notes.append(f"note: {pruning.told_left_out()}; --parameters '{names}' takes them in")
    if pruning.unused:
        names = ",".join(pruning.unused_modules)
        notes.append(f"note: {pruning.told_unused()}; --exclude {names} leaves them out")
    if guess := pruning.told_guess():
        notes.append(f"note: {guess} (--weights FILE)")
    return [*notes, *(f"note: {note}" for note in found.notes)]


def moves_of(
    network: "nn.Module",
    stages: Sequence[Mapping[str, Any]],
    recalibrate: str,
    examples: int | None,
) -> list[str]:
    """Return what is to be said of what moved beside the mask, and on how many examples a stage."""
    from lossprune.pruning.norms import tracking_norms

    told = []
    if (moves := told_compensation(stages)) is not None:
        read = "all examples of --data were read at each stage"
        if examples is not None:
            in_all = examples * len(stages)
            read = f"{examples:,} examples were read at each stage, {in_all:,} in all"
        told += [moves, read]
    if recalibrate != "no":
        at = "after each stage" if recalibrate == "stages" else "at the final mask"
        told.append(
            f"running statistics of batch normalisation were estimated anew {at}"
            if tracking_norms(network)
            else f"--recalibrate {recalibrate}: the network has no running statistics"
        )
    return told


def outcome_of(
    network: "nn.Module",
    origin: Mapping[str, str],
    mask: "Mask",
    found: "Connectivity",
    cost: "Cost | None",
) -> dict[str, Any]:
    """Return what the record tells of the network as it was and of what is left of it."""
    from lossprune.experiment.environment import environment_of
    from lossprune.pruning.skipped import numbers_in

    numbers = numbers_in(network)
    return {
        "environment": environment_of(next(network.parameters()).device),
        "network": origin,
        "removed": mask.removed,
        "prunable": mask.total,
        "sparsity": mask.sparsity,
        "model_parameters": numbers,
        "model_sparsity": mask.removed / max(numbers, 1),
        **({} if cost is None else {"cost": {**asdict(cost), "share": cost.share}}),
        "effective_sparsity": found.effective_sparsity,
        "layers": [
            {
                **asdict(layer),
                "removed": layer.removed,
                "sparsity": layer.removed / max(layer.total, 1),
            }
            for layer in found.layers
        ],
    }
