"""Networks as ONNX files, checked against torch."""

import inspect
import logging
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.deployment.deployed import Deployed
from lossprune.files import check_folder_of, replacing
from lossprune.pruning.errors import PruningError
from lossprune.pruning.wholeness import check_whole, unwrapped
from lossprune.torch_state import in_mode

TOLERANCE = 1e-4

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    model: nn.Module, path: str | Path, example: Tensor, *, tolerance: float = TOLERANCE
) -> float:
    """Write ``model`` in evaluation mode as ONNX; return the largest difference from torch.

    The first dimension of input and output is the batch, of any size: give an ``example`` of at
    least two, a batch of one would fix it.  The file is then run by onnxruntime on ``example`` and
    on its first half, and each output y compared with torch's t: it is good where
    |y − t| ≤ tolerance · max(1, max |t|).

    A masked network (``mask.apply_(model)``) keeps its zeros in the file; a compacted one is as
    small there as it is in torch.  Weights are in the file itself.

    Args:
        model: takes one tensor and returns one; left as it is.
        path: of the file; one that is there is replaced as a whole.
        example: an input, (n, …) with n ≥ 2; on the model's device.
        tolerance: relative to the largest output, or absolute where that is below 1.

    Raises:
        ValueError: ``example`` is not one tensor, or a batch of one.
        ImportError: the extra ``onnx`` is not installed.
        FileNotFoundError: the folder to write into does not exist.
        PruningError: the model is a deployed one; torch cannot export it; onnxruntime cannot run
            it, or gives something else. Nothing is written then.
    """
    _check_installed()
    check_whole(model)
    model = unwrapped(model)
    if isinstance(model, Deployed):
        raise PruningError(
            "a deployed network runs kernels made for this machine, which ONNX has no words for: "
            "export the compacted one, by "
            "lossprune.export_onnx(lossprune.compact(network, mask).model, path, example)"
        )
    path = Path(path)
    check_folder_of(path)
    if not isinstance(example, Tensor):
        raise ValueError(
            f"example must be one tensor, as the network takes one, got {type(example).__name__}"
        )
    if example.ndim < 1 or len(example) < 2:
        raise ValueError(
            "example must be a batch of at least two inputs, so that the file takes any number, "
            f"got shape {tuple(example.shape)}"
        )
    _check_real(model, example)
    with replacing(path) as part, in_mode(model, training=False), torch.no_grad():
        _export(model, part, example)
        return _compare(model, part, example, tolerance)


class OnnxNetwork(nn.Module):
    """An ONNX file run by onnxruntime, with tensors in and out.

    Args:
        path: of the file.
        threads: of onnxruntime; as many as torch has if not given.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        super().__init__()
        _check_installed()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the network's output."""
        (output,) = self.session.run(["output"], {"input": inputs.detach().cpu().numpy()})
        return torch.from_numpy(output)


def _check_installed() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX export needs {', '.join(missing)}, which is not installed: "
            'pip install "lossprune[onnx]"'
        )


def _export(model: nn.Module, path: Path, example: Tensor) -> None:
    try:
        with _silent():
            program = torch.onnx.export(
                model,
                (example,),
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=_batch_of_any_size(model),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.save(path, external_data=False)
    except Exception as error:  # torch's exporter raises kinds of its own; the cause is kept
        raise PruningError(
            f"torch cannot export this {type(model).__name__} as ONNX: {_said(error)}"
        ) from error


def _batch_of_any_size(model: nn.Module) -> tuple[Any, ...]:
    """The shape of the input, where ``forward`` has it: by itself, or the first of ``*args``."""
    shape = {0: torch.export.Dim("batch")}
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    return ((shape,),) if first and first.kind is first.VAR_POSITIONAL else (shape,)


def _said(error: BaseException) -> str:
    """What is behind an error, in one line: torch's exporter puts steps to take before it."""
    while error.__cause__ is not None and not isinstance(error, PruningError):
        error = error.__cause__
    lines = _COLOURS.sub("", str(error)).strip().splitlines()
    first = textwrap.shorten(lines[0] if lines else "", 300, placeholder=" ...")
    return first if isinstance(error, PruningError) else f"{type(error).__name__}: {first}"


def _check_real(model: nn.Module, example: Tensor) -> None:
    tensors = {"example": example, **dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise PruningError(
                f"ONNX export needs real numbers, {name!r} of this {type(model).__name__} is "
                f"{str(tensor.dtype).removeprefix('torch.')}"
            )


def _compare(model: nn.Module, path: Path, example: Tensor, tolerance: float) -> float:
    worst = 0.0
    try:
        exported = OnnxNetwork(path)
    except Exception as error:  # onnxruntime has a kind for each of its codes
        raise PruningError(
            f"onnxruntime cannot load the exported {type(model).__name__}: {_said(error)}"
        ) from error
    for inputs in (example, example[: len(example) // 2]):
        expected = model(inputs)
        if not isinstance(expected, Tensor) or expected.is_complex():
            raise PruningError(
                f"ONNX export needs a network that returns one real tensor, this "
                f"{type(model).__name__} returns "
                + (str(expected.dtype) if isinstance(expected, Tensor) else type(expected).__name__)
            )
        expected = expected.cpu()
        try:
            given = exported(inputs)
        except Exception as error:
            raise PruningError(
                f"onnxruntime cannot run the exported {type(model).__name__} on a batch of "
                f"{len(inputs)}: {_said(error)}"
            ) from error
        if given.shape != expected.shape:
            raise PruningError(
                f"onnxruntime gives shape {tuple(given.shape)}, torch {tuple(expected.shape)}"
            )
        scale = max(1.0, float(expected.abs().max()))
        difference = float((given.double() - expected.double()).abs().max()) / scale
        if not difference <= tolerance:  # NaN is not
            raise PruningError(
                f"onnxruntime's output differs from torch's by {difference:.2g} of the largest, "
                f"more than {tolerance:g}"
            )
        worst = max(worst, difference)
    return worst


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the exporter says of packages that it could also have used."""
    logger: Any = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
