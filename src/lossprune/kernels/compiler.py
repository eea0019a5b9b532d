"""C files, compiled on the machine that runs them and loaded with ctypes.

A compiler that sees the machine may use all of its vector instructions, which no wheel could.  The
candidates are, in this order: the command in the environment variable ``CC``, ``cc``, ``gcc``,
``clang``, and the compiler in the package ``ziglang`` (the extra ``deploy``), for machines without
any.  What is built lies in the folder that ``LOSSPRUNE_CACHE`` names, else in the user's cache
folder (``~/.cache/lossprune``), under a name that hashes the source, the flags and the processor,
and which compilers there are.  It is found again without a call of any of them; a machine that has
none takes what another compiler built there.  All of it may be deleted at any time.

>>> compiler_available() in (True, False)
True
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from lossprune.files import cache_folder, write_whole
from lossprune.kernels.interface import HEADER, Structures, check_mirrors, fields, macros, texts

_ZIG = ("-m", "ziglang", "cc")
_INCLUDED = ("In file included from", "  ")


class NoCompiler(RuntimeError):  # noqa: N818, as StopIteration: it says what is the case
    """There is no C compiler, or none that can build the file."""


def load(
    source: Path,
    *,
    flags: Sequence[str] = (),
    constants: Mapping[str, int] = MappingProxyType({}),
    structures: Structures = MappingProxyType({}),
) -> ctypes.CDLL:
    """Return the library built from one C file, from the cache if it was built before.

    One from the cache needs no compiler.

    Built with ``-O3 -march=native -shared -fPIC`` and ``flags``; calls through ctypes release the
    GIL.  Several processes may ask at once: each builds into a file of its own and renames it.

    Args:
        source: a C file, which includes the system's headers, ``lossprune.h`` and its neighbours.
        flags: more flags for the compiler, such as ``("-DWIDTH=4", "-lm")``; libraries go last.
        constants: macros of the file, and their values.
        structures: the mirrors of those that the file says are ``MIRRORED``.

    Raises:
        NoCompiler: there is none, or the compiler rejects the file.
        RuntimeError: a structure and its mirror differ in size, or in where a field begins.
        FileNotFoundError: ``source`` does not exist.
    """
    given = {**macros(constants, structures), **fields(structures)}
    used = (*_flags(), *(f"-D{name}={value}" for name, value in given.items()), *flags)
    text = tuple(texts(source).values())
    chosen = os.environ.get("CC")
    what = f"{source.stem}-{_hashed(text, used, shlex.split(chosen or '')[1:], _processor())}"
    library = cache_folder() / f"{what}-{_hashed(_known(chosen))[:8]}.so"
    if not library.is_file():
        library = _built(what, used, source, library)
    return ctypes.CDLL(str(library))


def _built(what: str, flags: Sequence[str], source: Path, library: Path) -> Path:
    """Build ``library``; without a compiler, return what another one built of the same here."""
    if compiler := _compiler(os.environ.get("CC")):
        return _build(compiler, flags, source, library)
    if found := sorted(library.parent.glob(f"{what}-*.so")):
        return found[0]
    raise NoCompiler(
        'no C compiler: set CC to one, install cc, gcc or clang, or pip install "lossprune[deploy]"'
    )


def _hashed(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def compiler_available() -> bool:
    """Say whether :func:`load` finds a compiler on this machine."""
    return _compiler(os.environ.get("CC")) is not None


def _flags() -> tuple[str, ...]:
    # Compilers built on LLVM otherwise use half of the widest registers.
    wide = platform.machine() in ("x86_64", "AMD64")
    return (
        "-O3", "-march=native", *(["-mprefer-vector-width=512"] if wide else []),
        "-std=gnu11", "-shared", "-fPIC",
    )  # fmt: skip


@functools.cache
def _compiler(chosen: str | None) -> tuple[str, ...] | None:
    """Return the command of the first candidate that answers."""
    for command in _candidates(chosen):
        try:
            subprocess.run([*command, "--version"], capture_output=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return command
    return None


def _known(chosen: str | None) -> list[tuple[object, ...]]:
    """Return what tells the candidates from others, and from other versions, without a call."""
    found: list[tuple[object, ...]] = []
    for command in _candidates(chosen):
        package = importlib.util.find_spec("ziglang") if command[1:] == _ZIG else None
        program = package.origin if package else shutil.which(command[0])
        if program:
            file = Path(program).resolve()
            found.append((*command, str(file), file.stat().st_size, int(file.stat().st_mtime)))
    return found


def _candidates(chosen: str | None) -> Iterator[tuple[str, ...]]:
    if words := shlex.split(chosen or ""):
        yield tuple(words)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            yield (found,)
    if importlib.util.find_spec("ziglang"):
        yield (sys.executable, *_ZIG)


@functools.cache
def _processor() -> str:
    """What ``-march=native`` depends on: the processor's model and its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "CPU part", "Features", "isa")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _build(command: Sequence[str], flags: Sequence[str], source: Path, library: Path) -> Path:
    """Compile ``source``, and return where it lies.

    Where the cache cannot be written, that is a folder of this process's own.
    """
    with contextlib.suppress(OSError):  # which writing finds too
        library.parent.mkdir(parents=True, exist_ok=True)
    libraries = [flag for flag in flags if flag.startswith("-l")]
    others = [flag for flag in flags if not flag.startswith("-l")]
    with tempfile.TemporaryDirectory(prefix="lossprune-") as folder:
        built = Path(folder, library.name)
        done = subprocess.run(
            [*command, *others, f"-I{HEADER.parent}", str(source), "-o", str(built), *libraries],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            check_mirrors(source, done.stderr)
            lines = done.stderr.strip().splitlines()
            # Before what is wrong in a header stands who includes it.
            said = next((line for line in lines if not line.startswith(_INCLUDED)), "no message")
            raise NoCompiler(f"{shlex.join(command)} cannot build {source.name}: {said}")
        contents = built.read_bytes()
    try:
        write_whole(library, contents)
    except OSError:
        library = Path(tempfile.mkdtemp(prefix="lossprune-")) / library.name
        library.write_bytes(contents)
    return library
