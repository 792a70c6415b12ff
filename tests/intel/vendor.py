"""The ops of vllm-xpu-kernels as released, on CPU tensors: the wheel's device code, run by Intel's OpenCL for CPUs.

The library that registers the ops cannot be loaded without torch's build for xpu. Its kernels lie in it as SPIR-V; they
are taken out while a test runs. This file does again what the library's host code does before a launch: it chooses a
kernel and sizes of groups, and lays out the arguments. What that code checks is only read, as the text of its messages.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import torch
from intel.opencl import Argument, Kernel, instructions, kernel_of, text_of, words_of
from torch import Tensor

MAGIC = b"\x03\x02\x23\x07"
OP_ENTRY_POINT, OP_EXECUTION_MODE, HIGHEST_OP = 15, 16, 7000
MOST_SLICES = 8

I32, F32, BOOL = ctypes.c_uint32, ctypes.c_float, ctypes.c_uint8


@cache
def library() -> bytes:
    """The library that registers the ops."""
    found = find_spec("vllm_xpu_kernels")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).with_name("_xpu_C.abi3.so").read_bytes()


def problem() -> str:
    """Why there is no such library; empty where it is."""
    return "" if find_spec("vllm_xpu_kernels") else "vllm-xpu-kernels 0.1.16.2 is not installed"


@cache
def entries() -> dict[str, bytes]:
    """The kernels with LoRA in their names, and of each the module of SPIR-V that it lies in."""
    found: dict[str, bytes] = {}
    start = library().find(MAGIC)
    while start >= 0:
        module = _module_at(start)
        for words in instructions(words_of(module)):
            if words[0] & 0xFFFF == OP_ENTRY_POINT and b"N4vllm4lora" in (name := text_of(words[3:])):
                found[name.decode()] = module
        start = library().find(MAGIC, start + 4)
    return found


def _module_at(start: int) -> bytes:
    """The module of SPIR-V that starts there: its instructions, up to what is none."""
    end = start + 20
    while end + 4 <= len(library()):
        (first,) = struct.unpack_from("<I", library(), end)
        if first >> 16 == 0 or first & 0xFFFF > HIGHEST_OP:
            break
        end += 4 * (first >> 16)
    return library()[start:end]


def _only(name: str) -> bytes:
    """The module of a kernel without its other kernels, of which it has up to 168: they are then not compiled."""
    words = words_of(entries()[name])
    kept, mine = list(words[:5]), 0
    for instruction in instructions(words):
        op = instruction[0] & 0xFFFF
        if op == OP_ENTRY_POINT:
            if text_of(instruction[3:]).decode() != name:
                continue
            mine = instruction[2]
        if op == OP_EXECUTION_MODE and instruction[1] != mine:
            continue
        kept += instruction
    return struct.pack(f"<{len(kept)}I", *kept)


def symbol(kernel: str, dtypes: Sequence[torch.dtype], vector: int, *flags: bool) -> str:
    """The name of an instance of a kernel's template, as compilers write it.

    Args:
        kernel: the template's name.
        dtypes: of output, inputs and weights.
        vector: how many numbers are read at once.
        flags: further arguments.
    """
    names: dict[torch.dtype, str] = {torch.float32: "f"}
    halves = {torch.bfloat16: "3ext6oneapi8bfloat16E", torch.float16: "6detail9half_impl4halfE"}
    spelled = ""
    for dtype in dtypes:
        if dtype in names:
            spelled += names[dtype]
        else:
            # A name that was spelled out before is a number later.
            is_first = len(names) == 1
            spelled += ("N4sycl3_V1" if is_first else "NS3_") + halves[dtype]
            names[dtype] = "S6_" if is_first else "S9_"
    more = "".join(f"Lb{int(flag)}E" for flag in flags)
    return f"_ZTSN4vllm4lora{len(kernel)}{kernel}I{spelled}Lj{vector}E{more}EE"


@cache
def _kernel(name: str) -> Kernel:
    return kernel_of(_only(name), name)


def _vector(*operands: Tensor) -> int:
    """How many numbers are read at once: up to 16 bytes of each operand, if all of its rows are aligned to them."""

    def fits(operand: Tensor, count: int) -> bool:
        size = count * operand.element_size()
        return size <= 16 and operand.shape[-1] % count == 0 and operand.data_ptr() % size == 0

    return next(count for count in (8, 4, 2, 1) if all(fits(operand, count) for operand in operands))


def bgmv_shrink(outputs: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, scale: float) -> None:
    rows, features = inputs.shape
    rank = outputs.shape[1]
    vector = _vector(inputs, weights)
    threads = 64
    while threads < 256 and -(-features // vector) >= 8:
        threads *= 2
    name = symbol("bgmv_shrink_kernel", (outputs.dtype, inputs.dtype, weights.dtype), vector)
    numbers: list[Argument] = [I32(features), I32(rank), F32(scale), I32(len(weights))]
    _kernel(name).launch((rows * rank,), threads, [outputs, inputs, weights, indices, *numbers])


def bgmv_expand(outputs: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, add_to_output: bool) -> None:
    bgmv_expand_slice(outputs, inputs, weights, indices, 0, outputs.shape[1], add_to_output)


def bgmv_expand_slice(
    outputs: Tensor,
    inputs: Tensor,
    weights: Tensor,
    indices: Tensor,
    slice_offset: int,
    slice_size: int,
    add_to_output: bool,
) -> None:
    rows, rank = inputs.shape
    name = symbol("bgmv_expand_slice_kernel", (outputs.dtype, inputs.dtype, weights.dtype), _vector(inputs, weights))
    sizes: list[Argument] = [I32(outputs.shape[1]), I32(rank), I32(slice_offset), I32(slice_size)]
    arguments = [outputs, inputs, weights, indices, *sizes, BOOL(add_to_output), I32(rows)]
    _kernel(name).launch(*_groups(rows * slice_size, 64), arguments)


def lora_shrink(
    inputs: Tensor, lora_a_weights: Sequence[Tensor], output_tensor: Tensor, lora_indices: Tensor, scaling: float
) -> None:
    rows, features = inputs.shape
    rank = output_tensor.shape[2]
    vector = _vector(inputs, *lora_a_weights)
    threads = 32
    while threads < 256 and -(-features // vector) >= 2 * threads:
        threads *= 2
    # The host does it before the launch.
    output_tensor.zero_()
    name = symbol("lora_shrink_kernel", (output_tensor.dtype, inputs.dtype, lora_a_weights[0].dtype), vector)
    numbers: list[Argument] = [I32(rows), I32(features), I32(rank), F32(scaling), I32(len(lora_a_weights[0]))]
    arguments = [output_tensor, inputs, lora_indices, *numbers, *_stacks(lora_a_weights)]
    _kernel(name).launch((len(lora_a_weights) * rows * rank,), threads, arguments)


def lora_expand(
    inputs: Tensor,
    lora_b_weights: Sequence[Tensor],
    output_tensor: Tensor,
    lora_indices: Tensor,
    offset_start: int,
    add_inputs: bool,
) -> None:
    slices, rows, rank = inputs.shape
    ends = list(accumulate(stack.shape[-2] for stack in lora_b_weights))
    dtypes = output_tensor.dtype, inputs.dtype, lora_b_weights[0].dtype
    name = symbol("lora_expand_kernel", dtypes, _vector(inputs, *lora_b_weights), add_inputs)
    starts = (I32 * MOST_SLICES)(*(offset_start + first for first in (0, *ends[:-1])))
    sizes = (output_tensor.shape[1], rank, len(lora_b_weights[0]), slices, ends[-1])
    numbers: list[Argument] = [I32(rows), *map(I32, sizes)]
    structures: list[Argument] = [*_stacks(lora_b_weights), starts, (I32 * (MOST_SLICES + 1))(0, *ends)]
    arguments = [output_tensor, inputs, lora_indices, *numbers, *structures]
    _kernel(name).launch(*_groups(rows * ends[-1], 256), arguments)


def _groups(elements: int, threads: int) -> tuple[tuple[int], int]:
    """How many work groups there are, and how many threads each has, where a thread computes one element."""
    return ((1,), elements) if elements < threads else ((-(-elements // threads),), threads)


def _stacks(weights: Sequence[Tensor]) -> list[Argument]:
    """Where the stacks of the slices are, and how far their slots are from each other."""
    return [
        (ctypes.c_void_p * MOST_SLICES)(*(stack.data_ptr() for stack in weights)),
        (ctypes.c_uint64 * MOST_SLICES)(*(stack.stride(0) for stack in weights)),
    ]
