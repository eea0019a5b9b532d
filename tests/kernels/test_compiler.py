import ctypes
import importlib.util
import os
import subprocess
import sys

import pytest

from lossprune.deployment.sparse.plan import library
from lossprune.kernels import interface
from lossprune.kernels.compiler import NoCompiler, compiler_available, load
from lossprune.kernels.interface import Activation

needs_compiler = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSSPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "sum.c"
    file.write_text("int sum(int a, int b) { return a + b + EXTRA; }\n")
    return file


@needs_compiler
def test_a_function_can_be_called(cache, source):
    library = load(source, flags=("-DEXTRA=0",))
    assert library.sum(ctypes.c_int(2), ctypes.c_int(3)) == 5


@needs_compiler
def test_built_once_for_the_same_source_and_flags(cache, source):
    load(source, flags=("-DEXTRA=0",))
    first = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    load(source, flags=("-DEXTRA=0",))
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == first
    assert load(source, flags=("-DEXTRA=7",)).sum(2, 3) == 12
    source.write_text(source.read_text().replace("a + b", "a - b"))
    assert load(source, flags=("-DEXTRA=0",)).sum(2, 3) == -1
    assert len(list(cache.iterdir())) == 3


@needs_compiler
def test_what_was_built_needs_no_compiler_and_calls_none(cache, source, monkeypatch):
    load(source, flags=("-DEXTRA=0",))
    monkeypatch.setattr(subprocess, "run", None)  # any call is an error
    assert load(source, flags=("-DEXTRA=0",)).sum(2, 3) == 5
    monkeypatch.undo()
    monkeypatch.setenv("LOSSPRUNE_CACHE", str(cache))
    monkeypatch.setenv("CC", "/no/such/compiler")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "ziglang", None)
    assert load(source, flags=("-DEXTRA=0",)).sum(2, 3) == 5
    with pytest.raises(NoCompiler):
        load(source, flags=("-DEXTRA=1",))


@needs_compiler
@pytest.mark.full("kernels that networks deployed in other tests have")
def test_the_kernels_of_deployed_networks_build(cache):
    """Where they did not, networks would be deployed densely, and only a note would say so."""
    library.cache_clear()
    try:
        assert library().run
    finally:
        library.cache_clear()


@needs_compiler
def test_processes_may_build_at_once(cache, source):
    code = (
        "import sys; from pathlib import Path; from lossprune.kernels.compiler import load; "
        "print(load(Path(sys.argv[1]), flags=('-DEXTRA=1',)).sum(1, 1))"
    )
    command = [sys.executable, "-c", code, str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0].strip() for process in running] == ["3"] * 4
    assert len(list(cache.iterdir())) == 1, "one library and nothing left over"


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no ziglang here")
def test_the_compiler_of_the_extra_builds_it(cache, source):
    code = (
        "import os, sys; from pathlib import Path; from lossprune.kernels.compiler import load\n"
        "print(load(Path(sys.argv[1]), flags=('-DEXTRA=1',)).sum(1, 1))"
    )
    kept = {name: os.environ[name] for name in ("HOME", "LOSSPRUNE_CACHE") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", code, str(source)],
        env={**kept, "PATH": "/nowhere"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "3", done.stderr


@needs_compiler
def test_a_file_that_is_wrong_is_named(cache, tmp_path):
    file = tmp_path / "wrong.c"
    file.write_text("int f( {\n")
    with pytest.raises(NoCompiler, match=r"cannot build wrong\.c"):
        load(file)
    assert not list(cache.iterdir()), "nothing half-built is left"


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, source):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOSSPRUNE_CACHE", str(tmp_path / "file" / "folder"))
    assert load(source, flags=("-DEXTRA=0",)).sum(2, 3) == 5


def test_without_a_compiler_one_sentence_says_so(cache, source):
    code = (
        "import sys; sys.modules['ziglang'] = None; from pathlib import Path\n"
        "from lossprune.kernels.compiler import NoCompiler, compiler_available, load\n"
        "import importlib.util; importlib.util.find_spec = lambda name: None\n"
        "assert not compiler_available()\n"
        "try: load(Path(sys.argv[1]))\n"
        "except NoCompiler as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source)],
        env={"PATH": "/nowhere"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == (
        "no C compiler: set CC to one, install cc, gcc or clang, "
        'or pip install "lossprune[deploy]"\n'
    )


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_int32), ("b", ctypes.c_int32))


@pytest.fixture
def mirrored(tmp_path):
    file = tmp_path / "pair.c"
    file.write_text(
        '#include "lossprune.h"\n'
        "typedef struct { int32_t a, b; } Pair;\n"
        "MIRRORED(Pair)\n"
        "int difference(Pair p) { return p.a - p.b + RELU * WIDTH; }\n"
    )
    return file


@needs_compiler
def test_constants_come_from_python_and_a_structure_that_is_alike_is_accepted(cache, mirrored):
    built = load(mirrored, constants={"WIDTH": 5}, structures={"Pair": Pair})
    assert built.difference(Pair(4, 1)) == 3 + Activation.RELU * 5


@needs_compiler
@pytest.mark.parametrize(
    "fields",
    [
        (("b", ctypes.c_int32), ("a", ctypes.c_int32)),
        (("a", ctypes.c_int32), ("b", ctypes.c_int64)),
    ],
    ids=["order", "size"],
)
def test_a_structure_that_differs_from_its_mirror_is_refused(cache, mirrored, fields):
    other = type("Other", (ctypes.Structure,), {"_fields_": fields})
    with pytest.raises(
        RuntimeError, match=r"pair\.c and its mirror .* the structure Pair$"
    ) as told:
        load(mirrored, constants={"WIDTH": 5}, structures={"Pair": other})
    assert not isinstance(told.value, NoCompiler)


@needs_compiler
def test_another_header_is_another_library(cache, source, monkeypatch, tmp_path):
    header = source.with_name("own.h")
    source.write_text('#include "own.h"\n#include "lossprune.h"\n' + source.read_text())
    for text in ("", "/* changed */"):
        header.write_text(text)
        load(source, flags=("-DEXTRA=0",))
    assert len(list(cache.iterdir())) == 2
    changed = tmp_path / "lossprune.h"
    changed.write_text(interface.HEADER.read_text() + "\n")
    monkeypatch.setattr(interface, "HEADER", changed)
    load(source, flags=("-DEXTRA=0",))
    assert len(list(cache.iterdir())) == 3
