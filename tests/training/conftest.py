"""The digits, and the kernels of sparse stacks on the CPU, by ``tests/kernels/cuda_on_cpu.h``."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from lossprune.data import Dataset, Split, load
from lossprune.kernels.interface import HEADER
from lossprune.training.perceptron.stack_kernel import SOURCE, StackMachine

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Werror")
CUDA_WAYS = ("-Wno-unknown-pragmas", "-fno-strict-aliasing")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", seed=1111)


@pytest.fixture(scope="module")
def few(digits) -> Dataset:
    """150 examples to train on: a whole batch and a smaller one."""
    train = Split(digits.train.images[:150], digits.train.labels[:150])
    return Dataset("few", train, digits.valid, digits.test, digits.classes, digits.mean, digits.std)


class EmulatedFile:
    """Runs a launch at once, block after block."""

    def __init__(self, library):
        self._library = library

    def launch(self, name, grid, threads, shared_bytes, arguments):
        assert shared_bytes <= 227 * 1024
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        getattr(self._library, f"run_{name}")(*grid, threads, addresses)


@functools.cache
def compiled(defines):
    """Compile the kernels for the CPU."""
    folder = tempfile.mkdtemp(prefix="lossprune-test-")
    built = f"{folder}/kernels.so"
    macros = [f"-D{name}={value}" for name, value in defines]
    folders = [f"-I{folder}" for folder in (HERE.parent / "kernels", SOURCE.parent, HEADER.parent)]
    source = str(HERE / "sparse_stack_on_cpu.cc")
    subprocess.run(["g++", *FLAGS, *CUDA_WAYS, *macros, *folders, source, "-o", built], check=True)
    return EmulatedFile(ctypes.CDLL(built))


@pytest.fixture(scope="session")
def emulated_gpu():
    """Return a machine for sparse stacks that needs no GPU; skip where there is no C++ compiler."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to run CUDA code on the CPU with")
    return StackMachine(compiled, shared_bytes=227 * 1024, blocks=2, threads=128)
