"""Running a network as it is written, whatever was put around it to run it otherwise."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


@contextmanager
def running_plainly(model: nn.Module) -> Iterator[None]:
    """Let what is compiled run as it was written, and data parallel call the network in it.

    A compiled network computes with graphs of its own weights, and data parallel runs copies on
    other devices, or keeps the processes in step, which measure different numbers of times.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes long to import
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            if isinstance(module, (DataParallel, DistributedDataParallel)):
                attributes = vars(module)
                if "forward" in attributes:
                    stack.callback(attributes.update, forward=attributes["forward"])
                else:
                    stack.callback(attributes.pop, "forward")
                attributes["forward"] = partial(_inside, module)
        yield


def _inside(wrapper: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return wrapper.get_submodule("module")(*args, **kwargs)


@contextmanager
def outside_inference() -> Iterator[None]:
    """Leave ``torch.inference_mode`` for a while, whose tensors can have no gradient."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def ordinary(tensor: Tensor) -> Tensor:
    """Return the tensor, of one made in inference mode a copy: no backward pass can save that."""
    return tensor.clone() if tensor.is_inference() else tensor
