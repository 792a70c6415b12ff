"""A double of `torch.ops._xpu_C`, the ops of vllm-xpu-kernels 0.1.16.2, on a CPU: schemas, checks and quirks.

`tests/intel/test_vendor.py` compares it with the original: numbers to the bit, schemas and messages word by word.
It is stricter in two things, and then says that it is the double that refuses: an index of K or more where the original
reads past the weights (`bgmv_expand` and its slice), and tensors that 32 bits cannot count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

BGMV = {
    "bgmv_shrink": "(Tensor! outputs, Tensor inputs, Tensor weights, Tensor indices, float scale) -> ()",
    "bgmv_expand": "(Tensor! outputs, Tensor inputs, Tensor weights, Tensor indices, bool add_to_output) -> ()",
    "bgmv_expand_slice": "(Tensor! outputs, Tensor inputs, Tensor weights, Tensor indices, int slice_offset, "
    "int slice_size, bool add_to_output) -> ()",
}
LORA = {
    "lora_shrink": "(Tensor inputs, Tensor[] lora_a_weights, Tensor! output_tensor, Tensor lora_indices, "
    "float scaling) -> ()",
    "lora_expand": "(Tensor inputs, Tensor[] lora_b_weights, Tensor! output_tensor, Tensor lora_indices, "
    "int offset_start, bool add_inputs) -> ()",
}
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)


@contextmanager
def installed(*groups: dict[str, str], calls: list[str] | None = None) -> Iterator[None]:
    """Have these ops be there in the block; `calls` gets the name of each that runs."""
    kernels = {
        "bgmv_shrink": bgmv_shrink,
        "bgmv_expand": bgmv_expand,
        "bgmv_expand_slice": bgmv_expand_slice,
        "lora_shrink": lora_shrink,
        "lora_expand": lora_expand,
    }
    with torch.library._scoped_library("_xpu_C", "FRAGMENT") as library:
        for name, schema in [item for group in groups for item in group.items()]:

            def run(*args: object, name: str = name) -> None:
                if calls is not None:
                    calls.append(name)
                kernels[name](*args)

            library.define(name + schema)
            library.impl(name, run, "CPU")
        yield
    torch._dynamo.reset()


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def bgmv_shrink(outputs: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, scale: float) -> None:
    stack = _checked(outputs, inputs, weights, indices, "lora_a_weights", SHRINKING)
    require(stack.shape[1] == outputs.shape[1], "output_tensor.size(1) must match lora_a_weights.size(-2)")
    _check_rows(outputs, inputs, indices)
    for t, i in enumerate(indices.tolist()):
        if 0 <= i < len(stack):
            _add(outputs[t], scale * (stack[i].float() @ inputs[t].float()))


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
    stack = _checked(outputs, inputs, weights, indices, "lora_b_weights", EXPANDING)
    require(stack.shape[1] == slice_size, "lora_b_weights.size(-2) must match slice_size")
    _check_rows(outputs, inputs, indices)
    end, width = slice_offset + slice_size, outputs.shape[1]
    require(end <= width, f"slice [{slice_offset}:{end}) is out of bounds for output dimension {width}")
    columns = outputs[:, slice_offset:end]
    for t, i in enumerate(indices.tolist()):
        require(i < len(stack), "the double refuses an index >= K, of which the original reads past the weights")
        if i >= 0:
            value = stack[i].float() @ inputs[t].float()
            _add(columns[t], value) if add_to_output else columns[t].copy_(value)


def lora_shrink(
    inputs: Tensor, lora_a_weights: Sequence[Tensor], output_tensor: Tensor, lora_indices: Tensor, scaling: float
) -> None:
    _check_list(lora_a_weights, "lora_a_weights")
    _check_tensor(inputs, "inputs", 2, "[batch_size, hidden_size]")
    _check_tensor(output_tensor, "output_tensor", 3, "[num_slices, batch_size, rank]")
    slices, rows, rank = output_tensor.shape
    require(slices == len(lora_a_weights), "output_tensor.size(0) must match number of weight slices")
    _check_indices(lora_indices, len(inputs))
    stacks = _stacks(lora_a_weights, "lora_a_weights")
    _check_count((inputs, output_tensor, *stacks))
    for s, stack in enumerate(stacks):
        require(stack.shape[2] == inputs.shape[1], f"weight hidden dim mismatch at slice {s}")
        expected, found = stacks[0].shape[1], stack.shape[1]
        require(found == expected, f"lora_a_weights[{s}] rank mismatch: expected {expected} but got {found}")
        require(stack.dtype == stacks[0].dtype, f"lora_a_weights[{s}] dtype mismatches slice 0")
    _check_slots(stacks, "lora_a_weights")
    require(rows == len(inputs), "output_tensor batch dim mismatch")
    require(rank == stacks[0].shape[1], "output_tensor rank dim mismatch")
    require(inputs.dtype in FLOATS, f""""lora_shrink_input" not implemented for {inputs.dtype}""")
    require(stacks[0].dtype in HALF, f"Unsupported weight type: {stacks[0].dtype}")
    require(output_tensor.dtype in FLOATS, f""""lora_shrink_output" not implemented for {output_tensor.dtype}""")
    output_tensor.zero_()
    for s, stack in enumerate(stacks):
        for t, i in enumerate(lora_indices.tolist()):
            if 0 <= i < len(stack):
                output_tensor[s, t] = scaling * (stack[i].float() @ inputs[t].float())


def lora_expand(
    inputs: Tensor,
    lora_b_weights: Sequence[Tensor],
    output_tensor: Tensor,
    lora_indices: Tensor,
    offset_start: int,
    add_inputs: bool,
) -> None:
    _check_list(lora_b_weights, "lora_b_weights")
    _check_tensor(inputs, "inputs", 3, "[num_slices, batch_size, rank]")
    require(len(inputs) == len(lora_b_weights), "inputs.size(0) must match num_slices")
    _check_tensor(output_tensor, "output_tensor", 2, "[batch_size, total_output_dim]")
    _check_indices(lora_indices, inputs.shape[1])
    rows, width = output_tensor.shape
    require(rows == inputs.shape[1], f"output_tensor.size(0) ({rows}) must equal batch_size ({inputs.shape[1]})")
    require(0 <= offset_start <= width, f"offset_start ({offset_start}) out of range [0, {width}]")
    stacks = _stacks(lora_b_weights, "lora_b_weights")
    _check_count((inputs, output_tensor, *stacks))
    for s, stack in enumerate(stacks):
        require(stack.shape[2] == inputs.shape[2], f"weight rank dim mismatch at slice {s}")
    _check_slots(stacks, "lora_b_weights")
    end = offset_start + sum(stack.shape[1] for stack in stacks)
    require(
        end <= width,
        f"offset_start ({offset_start}) + sum(slice_sizes) ({end}) exceeds output_tensor.size(1) ({width})",
    )
    require(inputs.dtype in FLOATS, f""""lora_expand_input" not implemented for {inputs.dtype}""")
    require(stacks[0].dtype in HALF, f"Unsupported weight type: {stacks[0].dtype}")
    require(output_tensor.dtype in FLOATS, f"Unsupported output type: {output_tensor.dtype}")
    for stack in stacks:
        require(stack.dtype == stacks[0].dtype, f"expected scalar type {stacks[0].dtype} but found {stack.dtype}")
    offset = offset_start
    for s, stack in enumerate(stacks):
        columns = output_tensor[:, offset : offset + stack.shape[1]]
        offset += stack.shape[1]
        for t, i in enumerate(lora_indices.tolist()):
            if 0 <= i < len(stack):
                value = stack[i].float() @ inputs[s, t].float()
                _add(columns[t], value) if add_inputs else columns[t].copy_(value)


def _add(there: Tensor, value: Tensor) -> None:
    """Add fp32 to what is there: in its dtype, so that a half is rounded twice."""
    there += value.to(there.dtype)


# How the family that takes one slice calls the dimensions of inputs, output and weights.
SHRINKING = ("[batch_size, hidden_size]", "[batch_size, rank]", "[lora_num, rank, hidden_size]")
EXPANDING = ("[batch_size, rank]", "[batch_size, hidden_size]", "[lora_num, slice_size, rank]")


def _checked(
    outputs: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, name: str, shapes: tuple[str, str, str]
) -> Tensor:
    """The weights as [K, rows, columns], after the checks of the family that takes one slice, up to its sizes."""
    named = {"inputs": inputs, name: weights, "output_tensor": outputs, "lora_indices_tensor": indices}
    for called, tensor in named.items():
        require(tensor.is_contiguous(), f"{called} must be contiguous")
    require(inputs.dtype in FLOATS, "inputs must be float16, bfloat16, or float32")
    require(weights.dtype in HALF, f"{name} must be float16 or bfloat16")
    require(
        inputs.dtype in (torch.float32, weights.dtype),
        f"inputs dtype must match {name} dtype when inputs is not float32",
    )
    require(outputs.dtype in FLOATS, "output_tensor must be float16, bfloat16, or float32")
    require(indices.dtype == torch.int64, "lora_indices_tensor must be int64")
    require(inputs.dim() == 2, f"inputs must be 2D {shapes[0]}")
    require(outputs.dim() == 2, f"output_tensor must be 2D {shapes[1]}")
    require(indices.dim() == 1, "lora_indices_tensor must be 1D [batch_size]")
    if weights.dim() == 4:
        require(weights.shape[1] == 1, f"{name}.size(1) must be 1")
    else:
        require(weights.dim() == 3, f"{name} must be 3D {shapes[2]}")
    _check_count((inputs, outputs, weights))
    require(inputs.shape[1] == weights.shape[-1], f"inputs.size(1) must match {name}.size(-1)")
    return weights.flatten(0, 1) if weights.dim() == 4 else weights


def _check_rows(outputs: Tensor, inputs: Tensor, indices: Tensor) -> None:
    require(len(inputs) == len(outputs), "inputs.size(0) must match output_tensor.size(0)")
    require(len(inputs) == len(indices), "inputs.size(0) must match lora_indices_tensor.size(0)")


def _check_list(weights: Sequence[Tensor], name: str) -> None:
    require(len(weights) > 0, f"{name} must be non-empty")
    require(len(weights) <= 8, f"Too many slices ({len(weights)}), max is 8")


def _check_tensor(tensor: Tensor, name: str, dimensions: int, shape: str) -> None:
    require(tensor.is_contiguous(), f"{name} must be contiguous XPU tensor")
    require(tensor.dim() == dimensions, f"{name} must be {dimensions}D {shape}")


def _check_indices(indices: Tensor, rows: int) -> None:
    require(indices.is_contiguous(), "lora_indices must be contiguous XPU tensor")
    require(indices.dtype == torch.int32, "lora_indices must be int32")
    require(indices.numel() == rows, f"lora_indices.numel() ({indices.numel()}) must equal batch_size ({rows})")


def _stacks(weights: Sequence[Tensor], name: str) -> list[Tensor]:
    """Each slice's weights as [K, rows, columns]."""
    for s, stack in enumerate(weights):
        require(stack.is_contiguous(), f"{name}[{s}] must be contiguous XPU tensor")
        require(stack.dim() != 4 or stack.shape[1] == 1, f"{name}[{s}].size(1) must be 1")
        require(stack.dim() in (3, 4), f"{name}[{s}] must be 3D after squeeze")
    return [stack.flatten(0, 1) if stack.dim() == 4 else stack for stack in weights]


def _check_slots(stacks: Sequence[Tensor], name: str) -> None:
    expected = len(stacks[0])
    for s, stack in enumerate(stacks):
        found = len(stack)
        require(found == expected, f"{name}[{s}] num_loras mismatch: expected {expected} but got {found}")


def _check_count(tensors: Sequence[Tensor]) -> None:
    most = max(tensor.numel() for tensor in tensors)
    require(most < 2**31, f"the double refuses {most} elements, which indices of 32 bits cannot count")
