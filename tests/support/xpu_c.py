"""A double of `torch.ops._xpu_C`, the ops of vllm-xpu-kernels, on a CPU: the published schemas, checks and quirks.

It is stricter than the original in one thing: where that reads past the weights, an index of K or more in `bgmv_expand`
and its slice, this raises.
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
    stack = _checked(outputs, inputs, weights, indices)
    require(stack.shape[2] == inputs.shape[1], "lora_a_weights.size(-1) must match inputs.size(1)")
    require(stack.shape[1] == outputs.shape[1], "lora_a_weights.size(-2) must match outputs.size(1)")
    for t, i in enumerate(indices.tolist()):
        if 0 <= i < len(stack):
            outputs[t] = (outputs[t].float() + scale * (stack[i].float() @ inputs[t].float())).to(outputs.dtype)


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
    stack = _checked(outputs, inputs, weights, indices)
    require(stack.shape[2] == inputs.shape[1], "lora_b_weights.size(-1) must match inputs.size(1)")
    require(stack.shape[1] == slice_size, "lora_b_weights.size(-2) must match slice_size")
    require(slice_offset + slice_size <= outputs.shape[1], "slice_offset + slice_size must be <= outputs.size(1)")
    columns = outputs[:, slice_offset : slice_offset + slice_size]
    for t, i in enumerate(indices.tolist()):
        require(i < len(stack), "the double refuses an index >= K, of which the original reads past the weights")
        if i >= 0:
            value = stack[i].float() @ inputs[t].float()
            columns[t] = (value + columns[t].float() if add_to_output else value).to(outputs.dtype)


def lora_shrink(
    inputs: Tensor, lora_a_weights: Sequence[Tensor], output_tensor: Tensor, lora_indices: Tensor, scaling: float
) -> None:
    stacks = _checked_slices(inputs, lora_a_weights, output_tensor, lora_indices)
    require(output_tensor.shape[:2] == (len(stacks), len(inputs)), "output_tensor must be [slices, T, R]")
    output_tensor.zero_()
    for s, stack in enumerate(stacks):
        require(stack.shape[1:] == (output_tensor.shape[2], inputs.shape[1]), "lora_a_weights must be [K, R, D]")
        for t, i in enumerate(lora_indices.tolist()):
            if 0 <= i < len(stack):
                output_tensor[s, t] = (scaling * (stack[i].float() @ inputs[t].float())).to(output_tensor.dtype)


def lora_expand(
    inputs: Tensor,
    lora_b_weights: Sequence[Tensor],
    output_tensor: Tensor,
    lora_indices: Tensor,
    offset_start: int,
    add_inputs: bool,
) -> None:
    stacks = _checked_slices(inputs, lora_b_weights, output_tensor, lora_indices)
    require(inputs.shape[:2] == (len(stacks), len(output_tensor)), "inputs must be [slices, T, R]")
    require(all(stack.shape[2] == inputs.shape[2] for stack in stacks), "lora_b_weights must be [K, W, R]")
    width = sum(stack.shape[1] for stack in stacks)
    require(offset_start + width <= output_tensor.shape[1], "the slices must fit into output_tensor")
    offset = offset_start
    for s, stack in enumerate(stacks):
        columns = output_tensor[:, offset : offset + stack.shape[1]]
        offset += stack.shape[1]
        for t, i in enumerate(lora_indices.tolist()):
            if 0 <= i < len(stack):
                value = stack[i].float() @ inputs[s, t].float()
                columns[t] = (value + columns[t].float() if add_inputs else value).to(output_tensor.dtype)


def _checked(outputs: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The weights as [K, rows, columns]."""
    _check_common((outputs, inputs), (weights,), indices, torch.int64)
    require(weights.dtype == inputs.dtype or inputs.dtype == torch.float32, "weights must have the inputs' dtype")
    require(len(indices) == len(inputs) == len(outputs), "indices, inputs and outputs must have the same rows")
    return _stack(weights)


def _checked_slices(inputs: Tensor, weights: Sequence[Tensor], output: Tensor, indices: Tensor) -> list[Tensor]:
    require(1 <= len(weights) <= 8, "at most 8 slices")
    _check_common((output, inputs), weights, indices, torch.int32)
    return [_stack(one) for one in weights]


def _check_common(rows: Sequence[Tensor], weights: Sequence[Tensor], indices: Tensor, dtype: torch.dtype) -> None:
    require(indices.dtype == dtype and indices.dim() == 1, f"indices must be {dtype}, 1-D")
    require(indices.is_contiguous(), "indices must be contiguous")
    require(all(one.dtype in (*HALF, torch.float32) for one in rows), "unsupported dtype of inputs or outputs")
    require(all(one.dtype in HALF for one in weights), "unsupported dtype of weights")
    require(all(one.is_contiguous() for one in (*rows, *weights)), "tensors must be contiguous")
    require(all(one.numel() < 2**31 for one in (*rows, *weights)), "32-bit index arithmetic")


def _stack(weights: Tensor) -> Tensor:
    require(weights.dim() in (3, 4), "weights must be [K, rows, columns] or [K, 1, rows, columns]")
    require(weights.dim() == 3 or weights.shape[1] == 1, "weights must have 1 in second place")
    return weights.flatten(0, 1) if weights.dim() == 4 else weights
