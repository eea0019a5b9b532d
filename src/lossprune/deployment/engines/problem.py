"""What engines of other packages read: a network as ONNX, its inputs and its outputs."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lossprune.pruning.errors import PruningError

OPSET = 13  # which every engine reads


def write_problem(folder: Path, network: nn.Module, inputs: Tensor) -> int:
    """Write what the engines read into a new folder and return the bytes of the ONNX file.

    Args:
        folder: made here.
        network: takes one tensor and returns one, in evaluation mode.
        inputs: of the batch size that it is exported for.

    Raises:
        PruningError: torch cannot export it.
        ImportError: the extra ``onnx`` is not installed.
    """
    import onnx  # noqa: F401  # torch's exporter says less clearly that it is missing

    folder.mkdir()
    model = folder / "model.onnx"
    with torch.no_grad():
        expected = network(inputs)
    if not isinstance(expected, Tensor):
        raise PruningError(f"it returns a {type(expected).__name__}, not one tensor")
    np.save(folder / "inputs.npy", inputs.numpy())
    np.save(folder / "expected.npy", expected.numpy())
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the older exporter, whose files DeepSparse reads
            torch.onnx.export(
                network, (inputs,), model, dynamo=False, opset_version=OPSET,
                input_names=["input"], output_names=["output"],
            )  # fmt: skip
    except Exception as error:  # torch's exporter raises kinds of its own
        said = (str(error).strip().splitlines() or [""])[0]
        raise PruningError(f"torch cannot export it as ONNX: {said[:200]}") from error
    return model.stat().st_size
