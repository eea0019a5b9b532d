"""``lossprune deploy``: the small and fast forms of a pruned network, side by side."""

import io
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.channels.compaction import compact
from lossprune.channels.costs import multiply_adds
from lossprune.commands.config import DeployConfig
from lossprune.commands.deployable import Deployable, deployable
from lossprune.commands.output import check_out, json_bytes, markdown_table, open_out, print_table
from lossprune.commands.user_code import blaming_users_code
from lossprune.deployment.deployed import Deployed, deploy
from lossprune.deployment.onnx import OnnxNetwork, export_onnx
from lossprune.deployment.sparse_file import save_sparse
from lossprune.deployment.sparse_load import load_sparse
from lossprune.deployment.timing import Timing, interleaved
from lossprune.experiment.folder import MASK, RECORD, RunFolder
from lossprune.experiment.progress import Progress, shown_progress
from lossprune.pruning import PruningError
from lossprune.torch_state import using_threads

FORMAT = "lossprune deployment 1"
NETWORK, ONNX, TABLE = "network.safetensors", "network.onnx", "table.md"
_EXAMPLES = 16


@dataclass(frozen=True)
class Form:
    """One form of the network, and what is known of it.

    Attributes:
        name: what the table calls it.
        network: takes what the pruned network takes.
        parameters: numbers that it holds, zeros included.
        nonzeros: those that are not zero.
        multiply_adds: that it computes for one image.
        file: what it is loaded from.
        size: bytes of that file.
        accuracy: on the run's test images; None for a network of one's own.
    """

    name: str
    network: nn.Module
    parameters: int
    nonzeros: int
    multiply_adds: int
    file: str
    size: int
    accuracy: float | None


def deploy_run(config: DeployConfig, run: Path) -> None:
    """Write the forms of the run's network, measure them and print the table.

    Raises:
        ValueError, FileNotFoundError: the folder is neither of a finished pruning nor written by
            ``lossprune prune``, its files do not fit each other, or the output folder will not do.
    """
    check_out(config.out, FORMAT, config.overwrite)
    with (
        using_threads(config.threads),
        blaming_users_code(),
        deployable(run, config) as source,
        shown_progress() as progress,
    ):
        folder = open_out(config.out)
        folder.remove(RECORD)
        forms, left_out, rounding = _forms(config, source, folder, progress)
        timings = _time(forms, source, config, progress)
        folder.save(MASK, source.mask.save)
        columns, rows = _columns(config, source), _rows(forms, timings)
        notes = [*_notes(config, source, timings, left_out), *rounding]
        table = markdown_table(columns, rows) + "".join(f"\n{note}\n" for note in notes)
        folder.write(TABLE, table.encode())
        values = {
            "format": FORMAT,
            "run": dict(source.made_from),
            "environment": dict(source.environment),
            "values": config.values,
            "forms": [_described(form, timings[form.name]) for form in forms],
            "left_out": left_out,
            "rounding": rounding,
        }
        folder.write(RECORD, json_bytes(values))
    print_table(source.title, columns, rows)
    for note in notes:
        print(note)
    written = [NETWORK, *([] if "ONNX" in left_out else [ONNX]), MASK, RECORD, TABLE]
    print(f"written: {', '.join(written)} in {config.out}")


def _forms(
    config: DeployConfig, source: Deployable, folder: RunFolder, progress: Progress
) -> tuple[list[Form], dict[str, str], list[str]]:
    """Make all forms that can be made here; say of the others why not, and what is rounded away."""
    dense, masked, mask = source.dense, source.masked, source.mask
    size = _state_size(dense)
    with warnings.catch_warnings(record=True) as told:  # of weights that float16 rounds to 0
        warnings.simplefilter("always")
        folder.save(NETWORK, lambda path: save_sparse(masked, mask, path, values=config.values))
    rounding = [str(it.message) for it in told]
    load_sparse(folder.path / NETWORK, masked)  # what is deployed is what is in the file
    small = (folder.path / NETWORK).stat().st_size
    one = source.inputs(1).example
    compaction = compact(masked, mask, one)
    accuracy = source.accuracy or (lambda _: None)
    forms = []
    progress.note("masked and compacted")
    for name, network, file, stored, correct in (
        ("dense", dense, "state dict", size, source.before),
        ("masked", masked, NETWORK, small, accuracy(masked)),
        ("compacted", compaction.model, NETWORK, small, accuracy(compaction.model)),
    ):
        counts = _numbers(network.parameters())
        if network is dense:
            counts = counts[0], counts[0]
        forms.append(
            Form(name, network, *counts, multiply_adds(network, one), file, stored, correct)
        )
    left_out: dict[str, str] = {}
    for batch in config.batch_sizes:
        progress.note(f"deployed for batches of {batch}")
        deployed = deploy(masked, mask, source.inputs(batch).example)
        forms.append(
            Form(
                f"deployed for {batch}",
                deployed,
                *_numbers((*deployed.parameters(), *deployed.buffers())),
                _multiply_adds(deployed, batch),
                NETWORK,
                small,
                accuracy(deployed),
            )
        )
    progress.note("ONNX")
    try:
        example = _only_tensor(source.inputs(_EXAMPLES).example)
        folder.save(ONNX, lambda path: _keep(export_onnx(compaction.model, path, example)))
        exported = OnnxNetwork(folder.path / ONNX)
    except (ImportError, PruningError) as error:
        left_out["ONNX"] = " ".join(str(error).split())
    else:
        like = forms[2]
        forms.append(
            Form(
                "ONNX",
                exported,
                like.parameters,
                like.nonzeros,
                like.multiply_adds,
                ONNX,
                (folder.path / ONNX).stat().st_size,
                accuracy(exported),
            )
        )
    return forms, left_out, rounding


def _keep(_: object) -> None:
    """Take no notice of a result."""


def _only_tensor(example: Any) -> Tensor:
    match example:
        case (Tensor() as tensor,):
            return tensor
    raise PruningError("the network takes something else than one tensor")


def _numbers(tensors: Any) -> tuple[int, int]:
    """How many numbers there are, and how many of them are not zero."""
    held = [tensor for tensor in tensors if tensor.is_floating_point()]
    return sum(t.numel() for t in held), sum(int(t.count_nonzero()) for t in held)


def _state_size(network: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return len(buffer.getvalue())


def _multiply_adds(deployed: Deployed, images: int) -> int:
    """For one image: kept weights where a layer is sparse, all of them where it is dense."""
    total = 0
    for layer in deployed.layers:
        dense = layer.kind == "dense" and layer.kept
        total += layer.multiply_adds * layer.total // layer.kept if dense else layer.multiply_adds
    return total // images


def _time(
    forms: list[Form], source: Deployable, config: DeployConfig, progress: Progress
) -> dict[str, dict[int, Timing]]:
    """Time every form at every batch size, in turn."""
    timings: dict[str, dict[int, Timing]] = {form.name: {} for form in forms}
    with torch.inference_mode():
        for batch in config.batch_sizes:
            progress.note(f"timing batches of {batch}")
            its = source.inputs(batch)
            calls = [
                lambda form=form: form.network(*its.inputs, **its.named)  # noqa: B023
                for form in forms
            ]
            measured = interleaved(calls, seconds=config.seconds, least=20)
            for form, timing in zip(forms, measured, strict=True):
                timings[form.name][batch] = timing
    return timings


def _columns(config: DeployConfig, source: Deployable) -> list[str]:
    latencies = [f"ms at {batch}" for batch in config.batch_sizes]
    accuracy = [] if source.accuracy is None else ["accuracy"]
    return ["form", "parameters", "non-zeros", "bytes", "multiply-adds", *latencies, *accuracy]


def _rows(forms: list[Form], timings: Mapping[str, Mapping[int, Timing]]) -> list[list[str]]:
    return [
        [
            form.name,
            f"{form.parameters:,}",
            f"{form.nonzeros:,}",
            f"{form.size:,}",
            f"{form.multiply_adds:,}",
            *(_latency(timing) for timing in timings[form.name].values()),
            *([] if form.accuracy is None else [f"{form.accuracy:.2%}"]),
        ]
        for form in forms
    ]


def _latency(timing: Timing) -> str:
    low, median, high = (f"{1e3 * value:.3g}" for value in (timing.low, timing.median, timing.high))
    return f"{median} ({low} to {high})"


def _notes(
    config: DeployConfig,
    source: Deployable,
    timings: Mapping[str, Mapping[int, Timing]],
    left_out: Mapping[str, str],
) -> list[str]:
    rounds = statistics.median(
        timing.count for measured in timings.values() for timing in measured.values()
    )
    threads = torch.get_num_threads()
    return [
        f"milliseconds a batch: median (quartiles) of {rounds:.0f} interleaved rounds, "
        f"{threads} thread{'s' if threads > 1 else ''}",
        f"bytes: dense, the state dict; masked, compacted and deployed, {NETWORK}, "
        f"with {config.values} values",
        "dense: a new network, for its size and times"
        if source.accuracy is None
        else "accuracy: on the run's test images; dense, before pruning, from the record",
        *(f"left out: {name}: {reason}" for name, reason in left_out.items()),
    ]


def _described(form: Form, timings: Mapping[int, Timing]) -> dict[str, Any]:
    names = ("name", "parameters", "nonzeros", "multiply_adds", "file", "size", "accuracy")
    latency = {str(batch): asdict(timing) for batch, timing in timings.items()}
    return {**{name: getattr(form, name) for name in names}, "latency": latency}
