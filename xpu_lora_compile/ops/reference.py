"""What the ops mean: one plain function an op, row by row in float64, rounded once at the end.

These are the oracle of every test. They return a new tensor where the ops write in place, and take any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bgmv_shrink(
    output: Tensor, inputs: Tensor, lora_a_weights: Tensor, lora_indices: Tensor, scaling: float = 1.0
) -> Tensor:
    """`output[t, :R] = scaling * A[i] @ inputs[t]`; zero for a row without an adapter."""
    weights = lora_a_weights.flatten(0, -3)
    result, ranks = output.clone(), weights.shape[1]
    for t, i in enumerate(lora_indices.tolist()):
        result[t, :ranks] = scaling * (weights[i].double() @ inputs[t].double()) if 0 <= i < len(weights) else 0.0
    return result


def bgmv_expand(
    output: Tensor, inputs: Tensor, lora_b_weights: Tensor, lora_indices: Tensor, add_inputs: bool = True
) -> Tensor:
    """`output[t, :n] (+)= (B[i] @ inputs[t])[:n]`, `n = min(W, H)`; a row without an adapter keeps its value."""
    columns = min(lora_b_weights.shape[-2], output.shape[1])
    return bgmv_expand_slice(output, inputs, lora_b_weights[..., :columns, :], lora_indices, 0, columns, add_inputs)


def bgmv_expand_slice(
    output: Tensor,
    inputs: Tensor,
    lora_b_weights: Tensor,
    lora_indices: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> Tensor:
    """`output[t, o : o + s] (+)= B[i] @ inputs[t]`; a row without an adapter keeps its value."""
    weights = lora_b_weights.flatten(0, -3)
    result, columns = output.clone(), slice(slice_offset, slice_offset + slice_size)
    for t, i in enumerate(lora_indices.tolist()):
        if 0 <= i < len(weights):
            value = weights[i].double() @ inputs[t].double()
            result[t, columns] = value + output[t, columns].double() if add_inputs else value
    return result


def lora_linear(
    base: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_indices: Tensor,
    slice_offsets: Sequence[int],
    scaling: float = 1.0,
    ranks: Tensor | None = None,
    adapter_weights: Tensor | None = None,
) -> Tensor:
    """`base` with every slice's `B[i] @ (scaling * A[i] @ inputs[t])` added to its columns; ranks say what is zero.

    With weights it is added for each of a row's M adapters, times the weight of that.
    """
    several = [lora_indices] if adapter_weights is None else list(lora_indices.unbind(1))
    factors = [None] if adapter_weights is None else list(adapter_weights.double().unbind(1))
    result = base.double()
    for a, b, offset in zip(lora_a, lora_b, slice_offsets, strict=True):
        for indices, factor in zip(several, factors, strict=True):
            hidden = result.new_zeros(len(inputs), a.shape[-2])
            hidden = bgmv_shrink(hidden, inputs, a, indices, scaling)
            hidden = hidden if factor is None else hidden * factor[:, None]
            result = bgmv_expand_slice(result, hidden, b, indices, offset, b.shape[-2])
    return result.to(base.dtype)


def moe_lora_linear(
    base: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_indices: Tensor,
    expert_indices: Tensor,
    expert_pages: Tensor,
    slice_offsets: Sequence[int],
    scaling: float = 1.0,
    ranks: Tensor | None = None,
) -> Tensor:
    """`lora_linear` with the page of each row's slot and expert; a row outside of the table has none."""
    table = expert_pages.tolist()
    pairs = zip(lora_indices.tolist(), expert_indices.tolist(), strict=True)
    slots, experts = expert_pages.shape
    pages = [table[slot][expert] if 0 <= slot < slots and 0 <= expert < experts else -1 for slot, expert in pairs]
    indices = torch.tensor(pages, dtype=torch.int64)
    return lora_linear(base, inputs, lora_a, lora_b, indices, slice_offsets, scaling, ranks)
