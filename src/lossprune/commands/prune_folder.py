"""``lossprune prune FOLDER``: a network that ``save_pretrained`` wrote, pruned block by block."""

from pathlib import Path

from lossprune.commands import EXIT_OK
from lossprune.commands.output import told_files
from lossprune.commands.prune_flags import PruneConfig
from lossprune.flags import declared_flags, listed_names
from lossprune.text_table import print_lines, print_table

# What such a pruning goes by, and what says nothing of the result.
_FLAGS = frozenset(
    {
        *("data", "examples", "criterion", "sparsity", "pattern", "scope", "parameters", "exclude"),
        *("compensate", "forward", "device", "seed", "threads", "out", "debug"),
    }
)
_COLUMNS = ("weight", "shape", "weights", "kept", "removed", "sparsity")
_FILES = {
    "model-*.safetensors": "pruned weights, for from_pretrained; with configuration and tokenizer",
    "mask-*.safetensors": "what is kept of each: lossprune.Mask.load(path)",
    "record.json": "settings and the counts of every layer",
}


def is_checkpoint(named: str) -> bool:
    """Whether what is to be pruned is such a folder, and no MODULE:BUILD."""
    return (Path(named) / "config.json").is_file()


def do(config: PruneConfig, source: Path) -> int:
    """Prune it into the folder ``--out``, and print the table.

    Raises:
        ValueError: whatever is wrong with the flags, the folders, the data or the network, in one
            sentence.
    """
    for name, flag in declared_flags(type(config)).items():
        if name not in _FLAGS and getattr(config, flag.field) != flag.default:
            raise ValueError(
                f"--{name} is not for a folder, whose network is pruned block by block: give "
                "MODULE:BUILD and --weights, or leave it out"
            )
    from lossprune.checkpoints.pruning import prune_checkpoint
    from lossprune.commands.user_data import batches_of
    from lossprune.commands.user_network import users_forward
    from lossprune.experiment.environment import choose_device
    from lossprune.torch_state import seeded, using_threads
    from lossprune.user_code import blaming_users_code

    with seeded(config.seed), using_threads(config.threads), blaming_users_code():
        found = prune_checkpoint(
            source,
            config.out.absolute(),
            config.criterion,
            sparsity=config.sparsity,
            data=batches_of(config.data, "--data"),
            examples=config.examples,
            pattern=config.pattern,
            scope=config.scope,
            compensate=config.compensate,
            parameters=None if config.parameters is None else listed_names(config.parameters),
            exclude=None if config.exclude is None else listed_names(config.exclude),
            forward=users_forward(config.forward),
            device=choose_device(config.device, None),
        )
    rows = [
        [
            layer.name,
            " × ".join(map(str, layer.shape)),
            *(f"{number:,}" for number in (layer.total, layer.kept, layer.removed)),
            f"{layer.sparsity:.5f}",
        ]
        for layer in found.layers
    ]
    counts = (found.total, found.total - found.removed, found.removed)
    rows.append(["all", "", *(f"{number:,}" for number in counts), f"{found.sparsity:.5f}"])
    print_table(f"{source}, {found.criterion}, block by block", _COLUMNS, rows, spare=("shape",))
    print_lines(told_files(config.out, _FILES))
    return EXIT_OK
