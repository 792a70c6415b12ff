"""Compiles this package's C++, once a machine, with its own compiler, when first needed.

Libraries are kept in `$XDG_CACHE_HOME/xpu-lora-compile`, under a name made from sources, compiler, torch, CPU and their
own content: one that was damaged is made anew, since loading it could end the process.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

_TORCH = Path(torch.__file__).parent
FLAGS = ("-std=c++20", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
_AGAINST_TORCH = ("-isystem", str(_TORCH / "include"), f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10")
# As an argument of `-l`: the one C++ library of the process, by the name under which torch has loaded it.
SHARED_CXX_LIBRARY = ":libstdc++.so.6"

_LOADING = threading.Lock()


class Loaded(NamedTuple):
    """A library that is loaded, or why there is none."""

    path: Path | None
    problem: str


def load(name: str, sources: Sequence[Path], flags: Sequence[str], compiler: str | None) -> Loaded:
    """Load a library of ops, compiled if it is not there yet.

    Args:
        name: of the library.
        sources: the file to compile, then those that it includes.
        flags: of the compiler, besides those that every library gets.
        compiler: a command; None for the one that is found. One that is named is not replaced by another.
    """
    with _LOADING:
        return _load(name, tuple(sources), tuple(flags), compiler)


@cache
def _load(kind: str, sources: tuple[Path, ...], flags: tuple[str, ...], named: str | None) -> Loaded:
    compiler: list[str] = []
    try:
        compiler = found_compiler() if named is None else shlex.split(named)
        if not compiler:
            return Loaded(None, "there is no C++ compiler: install g++ or clang++, or set CXX")
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout  # noqa: S603
        texts = [source.read_bytes() for source in sources]
        command = shlex.join((*compiler, *flags, *FLAGS)).encode()
        parts = (*texts, command, version, torch.__version__.encode(), _cpu())
        name, folder = f"{kind}-{content_hash(b'|'.join(parts))}", _own_folder()
        made = [
            library
            for library in folder.glob(f"{name}-*.so")
            if library.stem == f"{name}-{content_hash(library.read_bytes())}"
        ]
        path = made[0] if made else _compiled(folder, name, sources, flags, compiler)
        torch.ops.load_library(path)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        why = f"{shlex.join(compiler) or named} could not make it: {said.splitlines()[0] if said else error}"
        return Loaded(None, why)
    return Loaded(path, "")


def _compiled(folder: Path, name: str, sources: Sequence[Path], flags: Sequence[str], compiler: Sequence[str]) -> Path:
    # Aside, so that another process never loads half a file.
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = build(Path(aside) / "library.so", sources, flags, compiler)
        return made.replace(folder / f"{name}-{content_hash(made.read_bytes())}.so")


def build(library: Path, sources: Sequence[Path], flags: Sequence[str], compiler: Sequence[str]) -> Path:
    """Compile a library of ops to a file."""
    command = [*compiler, *flags, *FLAGS, "-o", str(library), str(sources[0]), *_AGAINST_TORCH]
    subprocess.run(command, capture_output=True, check=True, timeout=600)  # noqa: S603
    return library


def content_hash(content: bytes) -> str:
    """Return what tells one content from another in a file's name."""
    return hashlib.sha256(content).hexdigest()[:24]


def found_compiler() -> list[str]:
    """Return the compiler that is taken where none is named, or nothing."""
    found = next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    return [found] if found else []


def cxx_library(compiler: Sequence[str]) -> list[str]:
    """Return what has a compiler link the C++ library of this process; nothing where it does so of its own accord."""
    return [f"-l{SHARED_CXX_LIBRARY}"] if links_its_own_cxx_library(tuple(compiler)) else []


@cache
def links_its_own_cxx_library(compiler: tuple[str, ...]) -> bool:
    """Return whether a compiler puts a copy of the C++ library into what it makes, since it has no shared one.

    Two copies in one process share some of their variables. The code of AOTInductor reads its device by a regular
    expression, and ends the process when the copy in it takes a locale for its own (GCC 13 with libstdc++.a alone).
    """
    asked = subprocess.run([*compiler, "-print-file-name=libstdc++.so"], capture_output=True, text=True, check=False)  # noqa: S603
    # The name alone, without a folder, is the answer to what it does not find.
    return asked.stdout.strip() == "libstdc++.so"


def _own_folder() -> Path:
    """Where libraries are kept: never a folder in which others could leave one for us."""
    with suppress(OSError, RuntimeError, AttributeError):  # Nowhere to write, no home, no owners.
        cached = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(cached) if cached else Path.home() / ".cache") / "xpu-lora-compile"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        if os.access(folder, os.W_OK) and about.st_uid == os.geteuid() and not about.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="xpu-lora-compile-"))


def _cpu() -> bytes:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    kinds = (b"vendor_id", b"cpu family", b"model", b"flags", b"Features", b"CPU part")
    return b"\n".join(itertools.islice((line for line in lines if line.startswith(kinds)), 8))
