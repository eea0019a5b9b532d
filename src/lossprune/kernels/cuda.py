"""CUDA files, compiled for the GPU that runs them with NVIDIA's NVRTC, and launched.

NVRTC comes with PyTorch's builds for CUDA, and so does ``cuda-bindings``, NVIDIA's package through
which it is called: no ``nvcc`` is needed.  A file takes about a second, once a process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lossprune.kernels.interface import HEADER, check_mirrors


class NoCudaCompiler(RuntimeError):  # noqa: N818, as NoCompiler
    """NVRTC cannot be called here, or rejects the file."""


class CudaFile:
    """The ``extern "C"`` kernels of a file, on the device that was current when it was loaded."""

    def __init__(self, driver: Any, library: Any) -> None:
        self._driver, self._library = driver, library
        self._kernels: dict[str, Any] = {}

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
    ) -> None:
        """Put a kernel on torch's current stream.

        Args:
            name: the kernel's.
            grid: blocks in x and y.
            threads: of a block.
            shared_bytes: dynamic shared memory of a block.
            arguments: ctypes values and structures, as the kernel declares them.

        Raises:
            RuntimeError: the driver refuses; the message holds its name for the reason.
        """
        kernel = self._kernel(name)
        driver = self._driver
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(kernel, attribute, shared_bytes))
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        stream = torch.cuda.current_stream().cuda_stream
        _check(
            driver.cuLaunchKernel(
                kernel, *grid, 1, threads, 1, 1, shared_bytes, stream,
                ctypes.addressof(addresses), 0,
            )
        )  # fmt: skip

    def _kernel(self, name: str) -> Any:
        if name not in self._kernels:
            self._kernels[name] = _check(
                self._driver.cuModuleGetFunction(self._library, name.encode())
            )
        return self._kernels[name]


def load(source: Path, *, defines: Sequence[tuple[str, int]] = ()) -> CudaFile:
    """Compile a file for the current GPU, or return it as compiled before.

    Args:
        source: a CUDA file that includes ``lossprune.h`` at most.
        defines: macros and their values.

    Raises:
        NoCudaCompiler: there is no GPU or no ``cuda-bindings``, or NVRTC rejects the file.
        RuntimeError: a structure that is ``MIRRORED`` and its mirror differ in size.
        FileNotFoundError: ``source`` does not exist.
    """
    if not torch.cuda.is_available():
        raise NoCudaCompiler("there is no GPU here")
    return _load(source, tuple(defines), torch.cuda.current_device())


@functools.cache
def _load(source: Path, defines: tuple[tuple[str, int], ...], device: int) -> CudaFile:
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    except ImportError:
        raise NoCudaCompiler(
            "cuda-bindings is not installed: pip install cuda-bindings, of torch's CUDA version"
        ) from None
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}"]
    options += [f"-D{name}={value}" for name, value in defines]
    try:
        binary, said = _compile(nvrtc, source, [option.encode() for option in options])
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        raise NoCudaCompiler(f"NVRTC cannot be called: {error}") from None
    if binary is None:
        check_mirrors(source, said)
        raise NoCudaCompiler(f"NVRTC cannot build {source.name}: {said}")
    torch.cuda.current_stream().synchronize()  # which makes torch's context current
    return CudaFile(driver, _check(driver.cuModuleLoadData(binary)))


def _compile(nvrtc: Any, source: Path, options: list[bytes]) -> tuple[bytes | None, str]:
    """Return what NVRTC makes of a file, or None and what it says."""
    program = _check(
        nvrtc.nvrtcCreateProgram(
            source.read_bytes(), source.name.encode(),
            1, [HEADER.read_bytes()], [HEADER.name.encode()],
        )
    )  # fmt: skip
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if failed != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        said = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, said))
        return None, said.decode(errors="replace").strip("\0 \n")
    binary = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, binary))
    return binary, ""


def _check(answer: tuple[Any, ...]) -> Any:
    """Return what a call of NVIDIA's gives beside its error code."""
    code, *values = answer
    if int(code):
        raise RuntimeError(f"CUDA answers {code!r}")
    return values[0] if values else None
