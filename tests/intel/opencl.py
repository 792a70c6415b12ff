"""Intel's OpenCL for CPUs as a device: what Intel's compilers make for a GPU as SPIR-V runs on CPU tensors.

Two things stand in for hardware: the CPU's own instructions, and `dpas.cl` for the matrix engine, which no CPU has. The
rest is what a GPU would be given, but for hints of how to launch it. This shows what the code computes, not how fast.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

from intel import toolchain
from torch import Tensor

# Numbers of SPIR-V: instructions, and in them what this OpenCL refuses to read, all of it hints.
OP_EXTENSION, OP_IMPORT, OP_IMPORTED, OP_EXECUTION_MODE, OP_CAPABILITY = 10, 11, 12, 16, 17
CAPABILITIES = {5892: "KernelAttributesINTEL", 5619: "VectorAnyINTEL"}
MODES = {5893: "MaxWorkgroupSizeINTEL"}
EXTENSIONS = (b"SPV_INTEL_kernel_attributes", b"SPV_INTEL_vector_compute")
# Functions of OpenCL.
FMA, MAD = 26, 42
# Numbers of OpenCL.
CPU, PLATFORM_NAME, BUILD_LOG, BINARY_SIZES, BINARIES, READS_ANY_MEMORY = 2, 0x0902, 0x1183, 0x1165, 0x1166, 0x11B7

SCALARS: dict[str, Any] = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float, "f32": ctypes.c_float, "fp64": ctypes.c_double, "f64": ctypes.c_double,
}  # fmt: skip


class Local(int):
    """An argument of a kernel: this many bytes of a work group's own memory."""


# Of a kernel: memory, a number or a structure by value, or local memory.
Argument: TypeAlias = "Tensor | ctypes._SimpleCData[Any] | ctypes.Structure | Local | None"


def instructions(words: Sequence[int]) -> Iterator[Sequence[int]]:
    """Each instruction of a module of SPIR-V, which has a header of five words."""
    at = 5
    while at < len(words):
        yield words[at : at + (words[at] >> 16)]
        at += words[at] >> 16


def words_of(code: bytes) -> tuple[int, ...]:
    """SPIR-V as numbers."""
    return struct.unpack(f"<{len(code) // 4}I", code)


def text_of(words: Sequence[int]) -> bytes:
    """A text that starts with these words; a zero ends it."""
    return struct.pack(f"<{len(words)}I", *words).split(b"\0")[0]


def for_cpu(code: bytes) -> bytes:
    """SPIR-V less the hints that this OpenCL refuses to read; and `mad`, which may round once or twice, as `fma`.

    Intel's compiler for GPUs makes one instruction of a `mad`, the one for CPUs sometimes two.
    """
    words, functions = words_of(code), 0
    kept = list(words[:5])
    for instruction in instructions(words):
        op, operands = instruction[0] & 0xFFFF, instruction[1:]
        if op == OP_IMPORT and text_of(operands[1:]) == b"OpenCL.std":
            functions = operands[0]
        if op == OP_IMPORTED and operands[2:4] == (functions, MAD):
            kept += [*instruction[:4], FMA, *instruction[5:]]
        elif not (
            (op == OP_CAPABILITY and operands[0] in CAPABILITIES)
            or (op == OP_EXECUTION_MODE and operands[1] in MODES)
            or (op == OP_EXTENSION and text_of(operands) in EXTENSIONS)
        ):
            kept += instruction
    return struct.pack(f"<{len(kept)}I", *kept)


class Kernel:
    """A kernel of a program that is built."""

    def __init__(self, platform: Platform, program: ctypes.c_void_p, name: str) -> None:
        self.platform, self.name = platform, name
        self.handle = platform.made("clCreateKernel", program, name.encode())
        anywhere = ctypes.byref(ctypes.c_uint(1))
        platform.call("clSetKernelExecInfo", self.handle, READS_ANY_MEMORY, ctypes.c_size_t(4), anywhere)

    def launch(self, groups: Sequence[int], threads: int, arguments: Sequence[Argument]) -> None:
        """Run it, and wait for its end.

        Args:
            groups: how many work groups there are, of one to three dimensions.
            threads: how many threads a group has, all along the first.
            arguments: all of the kernel's.
        """
        call = self.platform.call
        for at, argument in enumerate(arguments):
            if argument is None or isinstance(argument, Tensor):
                address = ctypes.c_void_p(0 if argument is None else argument.data_ptr())
                call("clSetKernelArgSVMPointer", self.handle, at, address)
            elif isinstance(argument, Local):
                call("clSetKernelArg", self.handle, at, ctypes.c_size_t(argument), None)
            else:
                size = ctypes.c_size_t(ctypes.sizeof(argument))
                call("clSetKernelArg", self.handle, at, size, ctypes.byref(argument))
        sizes = ctypes.c_size_t * len(groups)
        of_group = (threads,) + (1,) * (len(groups) - 1)
        of_all = sizes(*(count * size for count, size in zip(groups, of_group, strict=True)))
        queue = self.platform.queue
        call("clEnqueueNDRangeKernel", queue, self.handle, len(groups), None, of_all, sizes(*of_group), 0, None, None)
        call("clFinish", queue)


class Platform:
    """Intel's OpenCL, with the CPU as its device, from the wheels `intel-opencl-rt` and `intel-cmplr-lib-rt`."""

    def __init__(self) -> None:
        folder = Path(sys.prefix, "lib")
        os.environ["OCL_ICD_FILENAMES"] = str(folder / "libintelocl.so")
        # It needs them, and does not say where they are.
        for name in ("libintlc.so.5", "libirng.so", "libimf.so", "libsvml.so", "libtbb.so.12", "libtbbmalloc.so.2"):
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(folder / "libOpenCL.so.1"))
        platforms, count = (ctypes.c_void_p * 8)(), ctypes.c_uint()
        self.call("clGetPlatformIDs", 8, platforms, ctypes.byref(count))
        mine = [platform for platform in platforms[: count.value] if self._name_of(platform).startswith(b"Intel")]
        if not mine:
            raise RuntimeError(f"no OpenCL of Intel's among {count.value} platforms: reinstall intel-opencl-rt")
        self.device = ctypes.c_void_p()
        device = ctypes.byref(self.device)
        self.call("clGetDeviceIDs", ctypes.c_void_p(mine[0]), ctypes.c_uint64(CPU), 1, device, None)
        self.context = self.made("clCreateContext", None, 1, device, None, None)
        self.queue = self.made("clCreateCommandQueue", self.context, self.device, ctypes.c_uint64(0))

    def _name_of(self, platform: int) -> bytes:
        name = ctypes.create_string_buffer(256)
        self.call("clGetPlatformInfo", ctypes.c_void_p(platform), PLATFORM_NAME, ctypes.c_size_t(256), name, None)
        return name.value

    def call(self, function: str, *arguments: Any, program: ctypes.c_void_p | None = None) -> None:
        """Call a function that returns an error's number; what a compiler says about a program goes with the error."""
        code = getattr(self.library, function)(*arguments)
        if code:
            raise RuntimeError(f"{function}: OpenCL error {code}. {self._log(program) if program else ''}")

    def made(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function that returns what it makes, and puts an error's number behind its arguments."""
        make = getattr(self.library, function)
        make.restype = ctypes.c_void_p
        error = ctypes.c_int()
        made = ctypes.c_void_p(make(*arguments, ctypes.byref(error)))
        if error.value:
            is_program = made and function == "clLinkProgram"
            raise RuntimeError(f"{function}: OpenCL error {error.value}. {self._log(made) if is_program else ''}")
        return made

    def _log(self, program: ctypes.c_void_p) -> str:
        log = ctypes.create_string_buffer(1 << 16)
        self.library.clGetProgramBuildInfo(program, self.device, BUILD_LOG, ctypes.c_size_t(1 << 16), log, None)
        return log.value.decode(errors="replace")

    def build(self, code: bytes) -> ctypes.c_void_p:
        """Build SPIR-V, with the matrix engine where it wants one; or take what another process has built."""
        engine = Path(__file__).with_name("dpas.cl").read_bytes() if b"_matrix_mad_" in code else b""
        kept = Path(os.environ["TRITON_CACHE_DIR"], "opencl", hashlib.sha256(code + engine).hexdigest())
        if kept.exists():
            return self._loaded(kept.read_bytes())
        known = for_cpu(code)
        program = self.made("clCreateProgramWithIL", self.context, known, ctypes.c_size_t(len(known)))
        if engine:
            text = ctypes.byref(ctypes.c_char_p(engine))
            library = self.made("clCreateProgramWithSource", self.context, 1, text, None)
            parts = (ctypes.c_void_p * 2)(program, library)
            for part in (program, library):
                device = ctypes.byref(self.device)
                self.call(
                    "clCompileProgram", part, 1, device, b"-cl-std=CL3.0", 0, None, None, None, None, program=part
                )
            program = self.made("clLinkProgram", self.context, 1, ctypes.byref(self.device), b"", 2, parts, None, None)
        else:
            self.call("clBuildProgram", program, 1, ctypes.byref(self.device), b"", None, None, program=program)
        kept.parent.mkdir(parents=True, exist_ok=True)
        whole = kept.with_suffix(f".{os.getpid()}")
        whole.write_bytes(self._binary(program))
        whole.replace(kept)
        return program

    def _binary(self, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self.call("clGetProgramInfo", program, BINARY_SIZES, ctypes.c_size_t(8), ctypes.byref(size), None)
        binary = ctypes.create_string_buffer(size.value)
        address = ctypes.c_void_p(ctypes.addressof(binary))
        self.call("clGetProgramInfo", program, BINARIES, ctypes.c_size_t(8), ctypes.byref(address), None)
        return binary.raw

    def _loaded(self, binary: bytes) -> ctypes.c_void_p:
        size, text = ctypes.c_size_t(len(binary)), ctypes.c_char_p(binary)
        device, state = ctypes.byref(self.device), ctypes.c_int()
        given = (device, ctypes.byref(size), ctypes.byref(text), ctypes.byref(state))
        program = self.made("clCreateProgramWithBinary", self.context, 1, *given)
        self.call("clBuildProgram", program, 1, device, b"", None, None, program=program)
        return program


@cache
def platform() -> Platform:
    """The one of this process."""
    return Platform()


def kernel_of(code: bytes, name: str) -> Kernel:
    """Build SPIR-V, and return the kernel of this name."""
    return Kernel(platform(), platform().build(code), name)


# What Triton compiles, launched.


def _given(types: Sequence[Any], values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The arguments that a kernel takes as it runs, with their types: no constants, and tuples one by one."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, (tuple, list)):
            yield from _given(kind, value)
        elif kind != "constexpr":
            yield kind, value


class Launcher:
    """What Triton calls to launch a kernel that it has compiled."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types, self.metadata = list(source.signature.values()), metadata

    def __call__(self, x: int, y: int, z: int, _stream: Any, kernel: Kernel, *rest: Any) -> None:
        """Launch; the kernel's arguments come behind four values of Triton's own."""
        arguments: list[Argument] = []
        for kind, value in _given(self.types, rest[4:]):
            arguments.append(value if kind.startswith("*") else SCALARS[kind](value))
        if self.metadata.shared:
            arguments.append(Local(self.metadata.shared))
        kernel.launch((x, y, z), self.metadata.num_warps * self.metadata.threads_per_warp, arguments)
        launched.append(self.metadata.name)


# The kernels that Triton has launched, by name.
launched: list[str] = []


class Driver(toolchain.Driver):
    """A driver of Triton that compiles for an Intel GPU and runs on the CPU: `compiling_for("pvc", driver=Driver)`."""

    launcher_cls = Launcher

    def __init__(self, properties: dict[str, Any]) -> None:
        super().__init__(properties)
        limits = {"max_shared_mem": 131072, "multiprocessor_count": properties["gpu_subslice_count"]}
        self.utils = SimpleNamespace(load_binary=self.load_binary, get_device_properties=lambda _device: limits)

    def load_binary(self, name: str, code: bytes, *_: Any) -> tuple[Any, Kernel, int, int]:
        """Build a kernel; Triton also wants to know how many registers it takes and spills, which no CPU says."""
        return None, kernel_of(code, name), 0, 0
