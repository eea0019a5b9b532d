"""``write_c``: the folder of a C library."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lossprune.channels.calls import Call
from lossprune.channels.tracing import UntraceableError
from lossprune.deployment.c_library.data import arrays_of, operations_of
from lossprune.deployment.c_library.texts import (
    EXPECTED,
    PlanText,
    Signature,
    cmake,
    header,
    kernel_files,
    source,
)
from lossprune.deployment.c_library.texts import (
    example as example_text,
)
from lossprune.deployment.race import Budget
from lossprune.deployment.sparse.network import SparseNetwork
from lossprune.deployment.sparse.parts import NetworkInParts, sparse_networks
from lossprune.deployment.sparse.plan import CONSTANTS, SparsePlan
from lossprune.deployment.sparse.plan import lanes as own_lanes
from lossprune.deployment.sparse.tuning import tune_
from lossprune.deployment.traced import TracedNetwork
from lossprune.deployment.whole import all_sparse
from lossprune.files import write_whole
from lossprune.kernels.interface import macros
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask

LANES = (4, 8, 16)
_TAKEN = {"lossprune", "sparse_network", "example", "main", "string", "stddef", "stdint"}
_FIRST = "/* The plan of a network"  # how the file of the plan begins


def write_c(
    model: nn.Module,
    mask: Mask,
    example: Any,
    folder: str | Path,
    *,
    lanes: int | None = None,
    seconds: float = 1.0,
    overwrite: bool = False,
) -> None:
    """Write the pruned network as a C library that needs nothing but C's own.

    The folder's name is that of the library: ``vgg11`` gets ``vgg11.h`` with
    ``vgg11_context_bytes``, ``vgg11_start`` and ``vgg11_run``; and ``vgg11.c``, its weights, the
    kernels, ``CMakeLists.txt``, and ``example.c`` with what it prints, ``expected.txt``.  The
    functions allocate nothing and keep nothing: the caller gives each thread a context.  Batches
    may be of any size; the example's decides how the work is laid out.

    Args:
        model: a network of which the kernels compute all.
        mask: which weights are kept.
        example: a batch as it will come.
        folder: new or empty.
        lanes: numbers of a vector, 4 (for ARM and SSE), 8 (AVX) or 16 (AVX-512): each runs
            everywhere, and as fast as can be where vectors are so wide.  If not given, those here.
        seconds: how long tiles may be tuned here.
        overwrite: replace the library that an earlier call wrote there.

    Raises:
        PruningError: an operation that the kernels do not have, which is named; or the mask does
            not fit the model, or the model does not run on ``example``.
        ValueError: the folder holds something else, or its name cannot be one of C's; other lanes.
        NoCompiler: the kernels cannot be built here, to compare what they give with the network.

    >>> import tempfile, lossprune
    >>> network = lossprune.networks.NETWORKS["MLP"](shape=(1, 8, 8), hidden=(32,))
    >>> mask = lossprune.Mask({"fc1.weight": torch.rand(32, 64) < 0.05})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_c(network, mask, torch.randn(4, 1, 8, 8), Path(folder) / "mlp", seconds=0.01)
    ...     sorted(file.name for file in Path(folder, "mlp").iterdir())
    ['CMakeLists.txt', 'activations.h', 'example.c', 'expected.txt', 'lossprune.h', 'mlp.c', ...]
    """
    folder = Path(folder)
    if lanes not in (None, *LANES):
        raise ValueError(f"lanes must be one of {', '.join(map(str, LANES))}, got {lanes!r}")
    name = library_name(folder, overwrite)
    network, call = whole_network(model, mask, example)
    (part,) = sparse_networks(network)
    tune_(network, call, Budget(seconds))
    values = list(network.arguments(call.inputs, call.named))
    _write(folder, _files(name, type(model).__name__, part, values, lanes or own_lanes()))


def whole_network(model: nn.Module, mask: Mask, example: Any) -> tuple[TracedNetwork, Call]:
    """Return the pruned network as the kernels compute all of it, and the call of the example.

    Raises:
        PruningError: they do not have an operation, which is named.
    """
    try:
        network, call = all_sparse(model, mask, example)
    except UntraceableError as error:
        raise PruningError(f"a C library needs the network's graph: {error}") from None
    inner = network.network
    if isinstance(inner, SparseNetwork):
        return network, call
    parts = list(inner.parts) if isinstance(inner, NetworkInParts) else [inner]
    others = [part for part in parts if not isinstance(part, SparseNetwork)]
    reason = "its output is not one value that they compute"
    if others:
        reason = f"{_operation(others[0])} is none of them"
    raise PruningError(
        f"a C library holds the sparse kernels' operations alone, and {reason}: "
        "lossprune.export_onnx writes the network for other runtimes"
    )


def _operation(part: nn.Module) -> str:
    """Return the first operation of a part, in words."""
    assert isinstance(part, fx.GraphModule)
    node = next(node for node in part.graph.nodes if node.op not in ("placeholder", "output"))
    if node.op == "call_module":
        return f"{str(node.target)!r} ({type(part.get_submodule(str(node.target))).__name__})"
    return f"{getattr(node.target, '__name__', node.target)!r}"


def library_name(folder: Path, overwrite: bool) -> str:
    """Return the name of the library that is to be written into ``folder``.

    Raises:
        ValueError: none can be written there, or its name cannot be one of C's.
    """
    name = re.sub(r"\W", "_", folder.resolve().name)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in _TAKEN:
        raise ValueError(
            f"the folder's name is the library's: {folder.name!r} cannot be one in C; "
            "give a folder such as pruned_network"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return name
    own = folder / f"{name}.c"
    if not own.is_file() or not own.read_text(errors="replace").startswith(_FIRST):
        raise ValueError(f"{folder} holds other files: give a new or empty folder")
    if not overwrite:
        raise ValueError(f"{folder} holds a C library: overwrite it, or give another folder")
    return name


def _files(
    name: str, title: str, part: SparseNetwork, values: Sequence[Tensor], lanes: int
) -> dict[str, bytes]:
    """Return the contents of every file by its name."""
    _, values = part.aligned(values)
    images = values[0].shape[0]
    shapes = part.shapes(values)
    plan = part.planned(shapes, many=part.tokens or images >= part.tuning.few, lanes=lanes)
    plans = [plan]
    if plan.vectors == 1 and part.tuning.few > 1:
        plans.append(part.planned(shapes, many=False, lanes=lanes))
    tokens = plan.count(values)
    inputs, outputs = shapes, plan.outputs
    if part.tokens:
        inputs, outputs = [value.shape[1:] for value in values], _of_tokens(part, plan, tokens)
    signature = Signature(name, images, lanes, _named("input", inputs), _named("output", outputs))
    arrays, names = arrays_of(plans)
    own, *rest = (
        PlanText(
            operations_of(one, names), one.vectors, one.room, one.extent(tokens), part.tuning.few
        )
        for one in plans
    )
    texts = {
        f"{name}.h": header(signature, f"{title}, {plan.work:,} multiply-adds an image."),
        f"{name}.c": source(signature, macros(CONSTANTS, {}), own, rest[0] if rest else None),
        f"{name}_weights.h": arrays,
        "example.c": example_text(signature),
        EXPECTED: _expected(part, values),
        "CMakeLists.txt": cmake(signature),
    }
    return {**kernel_files(), **{file: content.encode() for file, content in texts.items()}}


def _of_tokens(part: SparseNetwork, plan: SparsePlan, tokens: int) -> list[tuple[int, ...]]:
    """Return the shapes of one example's outputs."""
    made = zip([name for name, _ in part.outputs], plan.outputs, strict=True)
    return [
        (features,) if name in plan.single else (tokens, features)
        for name, (features, _, _) in made
    ]


def _named(word: str, shapes: Sequence[Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return shapes by the names of their arguments: numbered where there are several."""
    several = len(shapes) > 1
    return {f"{word}_{k}" if several else word: tuple(shape) for k, shape in enumerate(shapes)}


def _expected(part: SparseNetwork, values: Sequence[Tensor]) -> str:
    """Return what the example prints."""
    filled = [
        ((torch.arange(one.numel()) % 1009).float() / 1009 - 0.5).view(one.shape) for one in values
    ]
    made = part(*[one.transpose(0, 1) for one in filled] if part.first else filled)
    outputs = made if isinstance(made, tuple) else (made,)
    outputs = [one.transpose(0, 1) for one in outputs] if part.first else outputs
    return "".join(f"{value:.4g}\n" for one in outputs for value in one[0].flatten().tolist())


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files, or none where one of them cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    try:
        for name, content in files.items():
            write_whole(folder / name, content)
            written.append(folder / name)
    except OSError:
        for path in written:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
