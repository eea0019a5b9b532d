"""How networks were found to be fastest on this machine, kept in the user's cache folder.

A plan is found again by what its times depend on: the machine and the kernels built on it, torch
and its threads, the network's code, layers and densities, and the shapes of the example.  A file
that is damaged or no plan is ignored and replaced; all may be deleted at any time.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lossprune.channels.calls import Call
from lossprune.deployment.sparse.network import Tuning
from lossprune.deployment.sparse.plan import library
from lossprune.files import cache_folder, write_whole
from lossprune.json_text import parse_digested, with_digest
from lossprune.kernels.compiler import NoCompiler

_FORMAT = "lossprune plan 2"  # another number where plans are made in another way
_MOST = 256  # files, of which each takes a few kilobytes
_PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class DeploymentPlan:
    """Which way a network is fastest, and what was measured to find it.

    Attributes:
        budget: seconds that the comparisons could take.
        chosen: the way that is fastest.
        dense: layers that it leaves to torch.
        tunings: of its sparse parts, in order.
        seconds: of each way that was tried.
        sparse_seconds: of each sparse layer.
        dense_seconds: of each of torch's layers.
        outputs: numbers that each layer gives.
        notes: what was left out, and why.
    """

    budget: float
    chosen: str
    dense: Sequence[str]
    tunings: Sequence[Tuning]
    seconds: Mapping[str, float]
    sparse_seconds: Mapping[str, float]
    dense_seconds: Mapping[str, float]
    outputs: Mapping[str, int]
    notes: Sequence[str]


def plan_key(network: nn.Module, call: Call) -> str | None:
    """Return what a plan for a network and an example is kept under; None: it cannot be kept.

    Densities count to two digits: masks of one sparsity share a plan.
    """
    try:
        kernels = Path(library()._name).name
    except NoCompiler:
        return None
    parts = [_FORMAT, torch.__version__, torch.get_num_threads(), kernels, _called(call)]
    parts += [_described(name, module) for name, module in network.named_modules()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _called(call: Call) -> str:
    leaves, structure = tree_flatten((call.inputs, dict(call.named)))
    shapes = [
        (leaf.dtype, tuple(leaf.shape)) if isinstance(leaf, Tensor)
        else leaf if isinstance(leaf, _PLAIN) else type(leaf).__name__
        for leaf in leaves
    ]  # fmt: skip
    return f"{shapes} {structure}"


def _described(name: str, module: nn.Module) -> str:
    """Return what tells a module from others that may be faster in another way."""
    kind = type(module)
    code = getattr(kind.forward, "__code__", None)
    steps = code and (code.co_code, code.co_names, [c for c in code.co_consts if type(c) in _PLAIN])
    plain = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
    tensors = [
        (key, tuple(tensor.shape), tensor.dtype, _density(tensor))
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    ]
    return f"{name} {kind.__module__}.{kind.__qualname__} {steps} {plain} {module} {tensors}"


def _density(tensor: Tensor) -> str:
    return f"{int(torch.count_nonzero(tensor)) / max(tensor.numel(), 1):.2g}"


def recalled(key: str | None, budget: float) -> DeploymentPlan | None:
    """Return the plan that was kept, unless it was found with a smaller budget."""
    if key is None:
        return None
    try:
        text = (_folder() / f"{key}.json").read_bytes()
        plan = _plan(parse_digested(text)) if b'"sha256"' in text else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not there, or no plan
        return None
    return plan if plan and plan.budget >= budget else None


def keep(key: str | None, plan: DeploymentPlan) -> None:
    """Keep a plan in place of an earlier one, and delete the oldest where there are too many.

    Where the folder cannot be written, nothing is kept.
    """
    if key is None:
        return
    text = json.dumps(with_digest({"format": _FORMAT, **asdict(plan)}))
    with contextlib.suppress(OSError):
        _folder().mkdir(parents=True, exist_ok=True)
        write_whole(_folder() / f"{key}.json", text.encode())
        files = [(file.stat().st_mtime, file) for file in _folder().iterdir()]
        for _, file in sorted(files)[:-_MOST]:
            file.unlink(missing_ok=True)


def _folder() -> Path:
    return cache_folder() / "plans"


def _plan(values: Mapping[str, Any]) -> DeploymentPlan:
    """Return the plan of an object in JSON.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is none.
    """
    if values["format"] != _FORMAT:
        raise ValueError("another format")
    tunings = [
        Tuning(
            {str(target): (int(rows), int(columns)) for target, (rows, columns) in tiles.items()},
            int(few), int(shared),
        )
        for tiles, few, shared in (
            (tuning["tiles"], tuning["few"], tuning["shared"]) for tuning in values["tunings"]
        )
    ]  # fmt: skip
    return DeploymentPlan(
        float(values["budget"]), str(values["chosen"]), [*map(str, values["dense"])], tunings,
        _numbers(values["seconds"]), _numbers(values["sparse_seconds"]),
        _numbers(values["dense_seconds"]),
        {str(name): int(count) for name, count in values["outputs"].items()},
        [*map(str, values["notes"])],
    )  # fmt: skip


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}
