"""The kernel of every device: plain PyTorch, no host synchronisation, no shape known only to the device.

Two forms, by the number of rows T and of slots K. With few rows each row's weights are gathered, `[T, rows, columns]`.
With more rows than slots every slot multiplies all rows and a mask keeps the right ones: K products, but no copy of
weights that grows with T. In both, what a row without an adapter computes is dropped by `torch.where`, never
multiplied by zero, so that NaN in a slot stays in that slot.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shrink(output: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, scaling: float) -> None:
    """Write `scaling * A[i] @ inputs[t]` into the first R columns of `output`, zero where `i` is no slot."""
    hidden = slot_products(inputs.to(accumulator(output, inputs, weights)), weights, indices)
    hidden = torch.where(has_adapter(indices, weights)[:, None], hidden * scaling, 0.0)
    output[:, : weights.shape[1]].copy_(hidden)


def expand(output: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, add: bool) -> None:
    """Write or add `B[i] @ inputs[t]` into `output`, `[T, W]`; rows whose `i` is no slot keep their value."""
    value = slot_products(inputs.to(accumulator(output, inputs, weights)), weights, indices)
    if add:
        value += output
    output.copy_(torch.where(has_adapter(indices, weights)[:, None], value, output.to(value.dtype)))


def slot_products(inputs: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """`weights[i] @ inputs[t]` of every row, `[T, rows]`, accumulated in fp32; arbitrary where `i` is no slot.

    Args:
        inputs: `[T, columns]`.
        weights: `[K, rows, columns]`, any strides.
        indices: `[T]`, any integers.
    """
    dtype = accumulator(inputs, weights)
    inputs = inputs.to(dtype)
    slots = len(weights)
    if len(inputs) <= slots:
        chosen = weights[indices.clamp(0, slots - 1)].to(dtype)
        return torch.bmm(chosen, inputs.unsqueeze(2)).squeeze(2)
    result = inputs.new_empty(len(inputs), weights.shape[1])
    for slot in range(slots):
        product = inputs @ weights[slot].to(dtype).t()
        torch.where((indices == slot)[:, None], product, result, out=result)
    return result


def has_adapter(indices: Tensor, weights: Tensor) -> Tensor:
    """`[T]`, true where the index is one of the K slots."""
    return (indices >= 0) & (indices < len(weights))


def accumulator(*operands: Tensor) -> torch.dtype:
    """The dtype to accumulate in: float32, or float64 as soon as one operand is."""
    return torch.float64 if any(operand.dtype == torch.float64 for operand in operands) else torch.float32


def outer_by_slot(left: Tensor, right: Tensor, indices: Tensor, slots: int) -> Tensor:
    """`[K, m, n]`: for each slot the sum of `left[t] right[t]^T` over its rows, in the dtype of `left`.

    Both factors are masked: a NaN in the row of one adapter must not reach the gradient of another.
    """
    result = left.new_empty(slots, left.shape[1], right.shape[1])
    for slot in range(slots):
        mine = (indices == slot)[:, None]
        torch.mm(torch.where(mine, left, 0.0).t(), torch.where(mine, right, 0.0), out=result[slot])
    return result
