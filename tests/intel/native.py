"""SPIR-V to native code by Intel's offline compiler `ocloc`, and what that says of it: registers, spills, instructions.

Where `ocloc` and `iga64` (Intel's disassembler) are not installed, or know no Battlemage, Debian's packages of them are
unpacked into a folder, with a C library of their own: they come from the suite `testing` of the mirror that the
machine's own apt uses. That is 31 MB; nothing is installed.
"""

from __future__ import annotations

import fcntl
import re
import shlex
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGES = ("intel-ocloc", "libigc2", "libigc2-tools")
# What iga64 calls the instructions of a device.
_INSTRUCTIONS = {"pvc": "xehpc", "bmg": "xe2", "lnl": "xe2", "dg2": "xehpg"}


@dataclass(frozen=True)
class Tools:
    """The commands of `ocloc` and `iga64`, and the former's version."""

    ocloc: tuple[str, ...]
    iga64: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Native:
    """What the native code of a kernel is.

    Attributes:
        registers: for each thread; a thread of 128 has seven neighbours on its vector engine, one of 256 three.
        spilled: bytes a thread that did not fit its registers, and go to memory and back.
        simd: threads of a sub-group.
        size: bytes of code.
        dpas: instructions of the matrix engine.
        sends: messages to memory, of any kind; `blocks` of them load or store 2-D blocks, and `gathers` load or store
            global memory with an address of its own for each lane.
        shared: messages to shared local memory.
        repeated: of the messages those in loops.
    """

    registers: int
    spilled: int
    simd: int
    size: int
    dpas: int
    sends: int
    blocks: int
    gathers: int
    shared: int
    repeated: int


def found_tools(folder: Path) -> Tools | str:
    """The tools that are installed, or that were unpacked into a folder; or why there are none."""
    if shutil.which("ocloc") and shutil.which("iga64"):
        tools = _asked(("ocloc",), ("iga64",))
        if isinstance(tools, Tools):
            return tools
    folder.mkdir(parents=True, exist_ok=True)
    # Each process asks; the first unpacks.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "unpacked"
        if not done.exists():
            try:
                _unpack(folder)
            except (OSError, subprocess.SubprocessError) as error:
                said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                return f"ocloc is not installed, and apt offers none: {said[-1] if said else error!r}"
            done.touch()
    libraries = folder / "usr" / "lib" / "x86_64-linux-gnu"
    run = (str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries))
    programs = folder / "usr" / "bin"
    ocloc = next(iter(sorted(programs.glob("ocloc*"))), None)
    if ocloc is None:
        return f"Debian's {PACKAGES[0]} brought no ocloc"
    return _asked((*run, str(ocloc)), (*run, str(programs / "iga64")))


def _asked(ocloc: tuple[str, ...], iga64: tuple[str, ...]) -> Tools | str:
    """The tools, if `ocloc` knows Battlemage."""
    try:
        knows = subprocess.run([*ocloc, "ids", "bmg"], capture_output=True, text=True, check=True)  # noqa: S603
        version = subprocess.run([*ocloc, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        return f"ocloc does not run: {error}"
    if "20.1" not in knows.stdout:
        return f"ocloc knows no bmg: {knows.stdout}"
    return Tools(ocloc, iga64, version.stdout.strip())


def _unpack(folder: Path) -> None:
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
    mirrors = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.split()  # noqa: S603
    if not mirrors:
        raise OSError("apt knows no mirror of Debian's")
    apt = folder / "apt"
    for part in ("lists/partial", "cache/archives/partial", "state", "etc"):
        (apt / part).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    sources = apt / "etc" / "testing.list"
    signed = "[arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    sources.write_text(f"deb {signed} {mirrors[0]} testing main\n")
    settings = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "Dir::State": apt / "state",
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Debug::NoLocking": 1,
        "APT::Sandbox::User": "root",
        "Acquire::Retries": 2,
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    install = ["apt-get", "install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES]
    for command in (["apt-get", "update"], install):
        subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=300)  # noqa: S603
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(folder)], capture_output=True, text=True, check=True)  # noqa: S603, S607
    shutil.rmtree(apt)


def native(tools: Tools, spirv: bytes, device: str, options: str = "") -> Native:
    """Compile the one kernel of a module for a device.

    Args:
        tools: as found.
        spirv: the module.
        device: "pvc", "bmg", "lnl" or "dg2".
        options: of the compiler, such as -cl-intel-256-GRF-per-thread.

    Raises:
        ValueError: it cannot be compiled.
    """
    return _native(tools, spirv, device, options)


@cache
def _native(tools: Tools, spirv: bytes, device: str, options: str) -> Native:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernel.spv").write_bytes(spirv)
        command = [*tools.ocloc, "compile", "-file", "kernel.spv", "-spirv_input", "-device", device]
        command += ["-o", "kernel.bin", "-options", options]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
        made = folder / "kernel.bin"
        if ran.returncode or not made.exists():
            raise ValueError(f"{shlex.join(command)}: {ran.returncode}\n{ran.stdout}{ran.stderr}")
        sections = _sections(made.read_bytes())
        (code,) = [code for title, code in sections.items() if title.startswith(".text.") and "Intel" not in title]
        (folder / "code").write_bytes(code)
        command = [*tools.iga64, f"-p={_INSTRUCTIONS[device]}", "-d", "code"]
        text = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout  # noqa: S603
    # Of the kernel: another entry may stand for a function that it calls.
    about = sections[".ze_info"].decode().split("payload_arguments")[0]
    numbers = {name: int(number) for name, number in re.findall(r"^ +(\w+): +(\d+)$", about, re.MULTILINE)}
    sends = re.findall(r"^.*\bsends?[gc]*\..*$", text, re.MULTILINE)
    messages = [send.split("; ")[-1].strip() for send in sends]
    return Native(
        registers=numbers["grf_count"],
        spilled=numbers.get("spill_size", 0),
        simd=numbers["simd_size"],
        size=len(code),
        dpas=len(re.findall(r"\bdpas", text)),
        sends=len(sends),
        blocks=sum("block2d" in message for message in messages),
        gathers=sum(bool(re.match(r"(load|store)\.ugm\.d\d+(u32)?(x\d+)?\.a64", message)) for message in messages),
        shared=sum(bool(re.match(r"(load|store)\.slm", message)) for message in messages),
        repeated=_sends_in_loops(text.splitlines()),
    )


def _sends_in_loops(lines: list[str]) -> int:
    """How many messages lie between a label and a jump back to it."""
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if re.match(r"L\d+:", line)}
    looped: set[int] = set()
    for at, line in enumerate(lines):
        for label in re.findall(r"\b(?:jmpi|while|goto)\b.*?\b(L\d+)\b", line):
            looped.update(range(labels.get(label, at), at))
    return sum(bool(re.search(r"\bsends?[gc]*\.", lines[at])) for at in looped)


def _sections(elf: bytes) -> dict[str, bytes]:
    """The sections of an ELF file of 64 bits, by name."""
    start = struct.unpack_from("<Q", elf, 0x28)[0]
    size, count, names = struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<2I4Q2I2Q", elf, start + size * at) for at in range(count)]
    strings = headers[names][4]
    found = {}
    for header in headers:
        name = elf[strings + header[0] : elf.index(b"\0", strings + header[0])].decode()
        found[name] = elf[header[4] : header[4] + header[5]]
    return found
