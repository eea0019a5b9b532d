"""The forms of a pruned network: made, counted, tested and timed side by side."""

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.channels.compaction import compact
from lossprune.channels.costs import multiply_adds
from lossprune.commands.deployable import Deployable
from lossprune.commands.output import NETWORK, ONNX
from lossprune.deployment.deployed import Deployed
from lossprune.deployment.fastest import deploy
from lossprune.deployment.onnx import OnnxNetwork, export_onnx
from lossprune.deployment.sparse_file import load_sparse, save_sparse
from lossprune.deployment.timing import Timing, interleaved
from lossprune.experiment.folder import RunFolder
from lossprune.progress import Progress
from lossprune.pruning import PruningError

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
        accuracy: on the test data; None where there are none.
    """

    name: str
    network: nn.Module
    parameters: int
    nonzeros: int
    multiply_adds: int
    file: str
    size: int
    accuracy: float | None


@dataclass(frozen=True)
class MadeForms:
    """The forms that could be made here.

    Attributes:
        forms: as the table has them, the dense network first.
        left_out: why another was not made, by its name.
    """

    forms: Sequence[Form]
    left_out: Mapping[str, str]


def make_forms(
    source: Deployable,
    folder: RunFolder,
    batches: Sequence[int],
    progress: Progress,
    *,
    remeasure: bool = False,
) -> MadeForms:
    """Make every form that can be made here, and write the ONNX file.

    Args:
        source: the pruned network, as it is in the file.
        folder: with that file, to write into.
        batches: the batch sizes to deploy for.
        progress: is told of each form.
        remeasure: whether to find anew what is fastest, though it is known.
    """
    masked, mask = source.masked, source.mask
    one = source.inputs(1).example
    compacted = compact(masked, mask, one).model
    progress.note("masked and compacted")
    forms, file = [_dense(source, multiply_adds(source.dense, one))], folder.path / NETWORK
    for name, network in (("masked", masked), ("compacted", compacted)):
        adds = multiply_adds(network, one)
        forms.append(_form(source, name, network, network.parameters(), adds, file))
    for batch in batches:
        progress.note(f"deployed for batches of {batch}")
        deployed = deploy(masked, mask, source.inputs(batch).example, remeasure=remeasure)
        tensors = (*deployed.parameters(), *deployed.buffers())
        adds, name = _multiply_adds(deployed, batch), f"deployed for {batch}"
        forms.append(_form(source, name, deployed, tensors, adds, file))
    progress.note("ONNX")
    try:
        exported = _exported(source, compacted, folder)
        tensors, adds = compacted.parameters(), forms[2].multiply_adds
        form = _form(source, "ONNX", exported, tensors, adds, folder.path / ONNX)
    except (ImportError, PruningError) as error:
        return MadeForms(forms, {"ONNX": " ".join(str(error).split())})
    return MadeForms([*forms, form], {})


def write_network(source: Deployable, folder: RunFolder, values: str) -> list[str]:
    """Write the network, which becomes what is in the file, and return what that rounds away.

    Args:
        source: the pruned network.
        folder: to write into.
        values: of kept weights in the file, ``exact`` or ``float16``.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        folder.save(
            NETWORK, lambda path: save_sparse(source.masked, source.mask, path, values=values)
        )
    load_sparse(folder.path / NETWORK, source.masked)
    return [str(warning.message) for warning in warned]


def _exported(source: Deployable, compacted: nn.Module, folder: RunFolder) -> OnnxNetwork:
    match source.inputs(_EXAMPLES).example:
        case (Tensor() as example,):
            folder.save(ONNX, lambda path: export_onnx(compacted, path, example))
            return OnnxNetwork(folder.path / ONNX)
    raise PruningError("the network takes something else than one tensor")


def _dense(source: Deployable, adds: int) -> Form:
    count, _ = _numbers(source.dense.parameters())
    size = state_bytes(source.dense)
    return Form("dense", source.dense, count, count, adds, "state dict", size, source.before)


def state_bytes(network: nn.Module) -> int:
    """The bytes of a network's state dict as a file."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return len(buffer.getvalue())


def _form(
    source: Deployable,
    name: str,
    network: nn.Module,
    tensors: Iterable[Tensor],
    adds: int,
    file: Path,
) -> Form:
    accuracy = None if source.accuracy is None else source.accuracy(network)
    numbers = _numbers(tensors)
    return Form(name, network, *numbers, adds, file.name, file.stat().st_size, accuracy)


def described(form: Form, timings: Mapping[int, Timing]) -> dict[str, Any]:
    """What a record says of a form."""
    names = ("name", "parameters", "nonzeros", "multiply_adds", "file", "size", "accuracy")
    latency = {str(batch): asdict(timing) for batch, timing in timings.items()}
    return {**{name: getattr(form, name) for name in names}, "latency": latency}


def _numbers(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """How many numbers there are, and how many of them are not zero."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return sum(t.numel() for t in floats), sum(int(t.count_nonzero()) for t in floats)


def _multiply_adds(deployed: Deployed, images: int) -> int:
    """For one image: kept weights where a layer is sparse, all of them where it is dense."""
    total = 0
    for layer in deployed.layers:
        dense = layer.kind == "dense" and layer.kept
        total += layer.multiply_adds * layer.total // layer.kept if dense else layer.multiply_adds
    return total // images


def time_forms(
    forms: Sequence[Form],
    source: Deployable,
    batches: Sequence[int],
    seconds: float,
    progress: Progress,
) -> dict[str, dict[int, Timing]]:
    """Time every form at every batch size, in turn: by the form's name, then by the size."""
    timings: dict[str, dict[int, Timing]] = {form.name: {} for form in forms}
    with torch.inference_mode():
        for batch in batches:
            progress.note(f"timing batches of {batch}")
            call = source.inputs(batch)
            calls = [
                lambda form=form: form.network(*call.inputs, **call.named)  # noqa: B023
                for form in forms
            ]
            for form, timing in zip(
                forms, interleaved(calls, seconds=seconds, least=20), strict=True
            ):
                timings[form.name][batch] = timing
    return timings
