"""Plain PyTorch for every device: no shape known only to the device, no weight read into a row that does not use it.

Three forms of the same product, picked by `choose`. In all of them, what a row without an adapter computes is dropped
by `torch.where`, never multiplied by zero, so that NaN in a slot stays in that slot.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from xpu_lora_compile.kernels.choose import choose
from xpu_lora_compile.kernels.routing import Routing


def shrink(output: Tensor, inputs: Tensor, weights: Tensor, routing: Routing, scaling: float) -> None:
    """Write `scaling * A[i] @ inputs[t]` into the first R columns of `output`, zero where `i` is no slot."""
    hidden = slot_products(inputs.to(accumulator(output, inputs, weights)), weights, routing)
    output[:, : weights.shape[1]].copy_(torch.where(routing.has_adapter, hidden * scaling, 0.0))


def expand(output: Tensor, inputs: Tensor, weights: Tensor, routing: Routing, add: bool) -> None:
    """Write or add `B[i] @ inputs[t]` into `output`, `[T, W]`; rows whose `i` is no slot keep their value."""
    value = slot_products(inputs.to(accumulator(output, inputs, weights)), weights, routing)
    if add:
        value += output
    output.copy_(torch.where(routing.has_adapter, value, output.to(value.dtype)))


def add_lora(
    outputs: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    routing: Routing,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float,
) -> None:
    """Add every slice's `B[i] @ (scaling * A[i] @ inputs[t])` into the columns of its output, rounding once.

    Args:
        outputs: `[T, H]` each, changed in place.
        inputs: `[T, D]`.
        lora_a: for each slice, A `[K, R, D]`.
        lora_b: for each slice, B `[K, W, R]`.
        routing: of the T rows among K slots.
        slice_outputs: for each slice, its output's position in `outputs`.
        slice_offsets: for each slice, its first column there.
        scaling: factor on what is added.
    """
    dtype = accumulator(*outputs, inputs, *lora_a, *lora_b)
    inputs = inputs.to(dtype)
    for position, output in enumerate(outputs):
        slices = [
            (a, b, offset)
            for a, b, mine, offset in zip(lora_a, lora_b, slice_outputs, slice_offsets, strict=True)
            if mine == position
        ]
        ends = sorted((offset, offset + b.shape[1]) for _, b, offset in slices)
        overlap = any(end > start for (_, end), (start, _) in itertools.pairwise(ends))
        # Columns of two slices are rounded once, after both.
        target = output.to(dtype) if overlap else output
        for a, b, offset in slices:
            hidden = torch.where(routing.has_adapter, slot_products(inputs, a, routing) * scaling, 0.0)
            expand(target.narrow(1, offset, b.shape[1]), hidden, b, routing, add=True)
        if target is not output:
            output.copy_(target)


def slot_products(inputs: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """`weights[i] @ inputs[t]` of every row, `[T, rows]`, accumulated in fp32; arbitrary where `i` is no slot.

    Args:
        inputs: `[T, columns]`.
        weights: `[K, rows, columns]`, any strides.
        routing: of the T rows among K slots.
    """
    dtype = accumulator(inputs, weights)
    inputs = inputs.to(dtype)
    kernel = choose(inputs.device.type, len(inputs), len(weights)).kernel
    with _without_autocast(inputs.device.type):
        if kernel == "gather":
            chosen = weights[routing.slot].to(dtype)
            return torch.bmm(chosen, inputs.unsqueeze(2)).squeeze(2)
        result = inputs.new_empty(len(inputs), weights.shape[1])
        if kernel == "grouped":
            for slot, rows in routing.rows_by_slot:
                result[rows] = inputs[rows] @ weights[slot].to(dtype).t()
            return result
        for slot in range(len(weights)):
            product = inputs @ weights[slot].to(dtype).t()
            torch.where((routing.slot == slot)[:, None], product, result, out=result)
        return result


def accumulator(*operands: Tensor) -> torch.dtype:
    """The dtype to accumulate in: float32, or float64 as soon as one operand is."""
    return torch.float64 if any(operand.dtype == torch.float64 for operand in operands) else torch.float32


def outer_by_slot(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    """`[K, m, n]`: for each slot the sum of `left[t] right[t]^T` over its rows, in the dtype of `left`.

    Both factors are masked: a NaN in the row of one adapter must not reach the gradient of another.
    """
    result = left.new_empty(routing.slots, left.shape[1], right.shape[1])
    with _without_autocast(left.device.type):
        for slot in range(routing.slots):
            mine = (routing.indices == slot)[:, None]
            torch.mm(torch.where(mine, left, 0.0).t(), torch.where(mine, right, 0.0), out=result[slot])
    return result


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """What autocast would round products to is not what the contract says; entered only where it is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
