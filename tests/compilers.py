"""A machine without a C compiler."""

import sys

import pytest

from lossprune.training.convolution import kernel


def hide_compilers(machine: pytest.MonkeyPatch) -> None:
    """Let no compiler be found, nor what was built, nor what is loaded of sparse convolutions."""
    machine.setenv("LOSSPRUNE_CACHE", "/no/such/cache")
    machine.setenv("CC", "/no/such/compiler")
    machine.setenv("PATH", "")
    machine.setitem(sys.modules, "ziglang", None)
    kernel.library.cache_clear()
