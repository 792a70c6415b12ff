"""The same job as others do it: plain functions that add LoRA to `output` in place, written from what theirs mean.

Each takes output `[T, H]`, inputs `[T, D]`, for each slice A `[K, R, D]` and B in the layout that suits it best,
indices `[T]` with -1 for rows without an adapter, and the slices' first columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Form = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor], Tensor, Sequence[int]], None]


def vllm(
    output: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
) -> None:
    """VLLM's `torch_ops` on a CPU: gather each row's weights, two einsums, and an add to the slice. B is `[K, W, R]`.

    vLLM (0.32) has no rows without an adapter here: the last slot, which -1 takes, is one of zeros.
    """
    for a, b, offset in zip(lora_a, lora_b, offsets, strict=True):
        hidden = torch.einsum("td,trd->tr", inputs, a[indices])
        output[:, offset : offset + b.shape[1]] += torch.einsum("tr,twr->tw", hidden, b[indices])


def loop(
    output: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
) -> None:
    """PEFT's mixed batch: the rows of each adapter go through two linears and are added. B is `[K, W, R]`."""
    for slot in indices.unique().tolist():
        if slot < 0:
            continue
        rows = torch.where(indices == slot)[0]
        for a, b, offset in zip(lora_a, lora_b, offsets, strict=True):
            delta = torch.nn.functional.linear(torch.nn.functional.linear(inputs[rows], a[slot]), b[slot])
            output[rows, offset : offset + b.shape[1]] += delta


def gather(
    output: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
) -> None:
    """Multiply and reduce over indirect loads, which Inductor fuses into one loop without a copy. B is `[K, W, R]`."""
    slot, valid = indices.clamp(min=0), (indices >= 0)[:, None]
    for a, b, offset in zip(lora_a, lora_b, offsets, strict=True):
        hidden = (inputs[:, None, :].float() * a[slot].float()).sum(-1)
        delta = (hidden[:, None, :] * b[slot].float()).sum(-1)
        output[:, offset : offset + b.shape[1]] += torch.where(valid, delta, 0.0).to(output.dtype)


def dense(
    output: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
) -> None:
    """Every row through all slots in one product, masked, and back in another. B is stored as `[K, R, W]`."""
    for a, b, offset in zip(lora_a, lora_b, offsets, strict=True):
        slots, rank, features = a.shape
        mine = indices[:, None] == torch.arange(slots, device=indices.device)
        hidden = (inputs @ a.view(slots * rank, features).t()).view(-1, slots, rank) * mine[:, :, None]
        output[:, offset : offset + b.shape[2]].addmm_(hidden.view(-1, slots * rank), b.view(slots * rank, -1))


def ipex(
    output: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
) -> None:
    """The kernels of intel-extension-for-pytorch, for a CPU and bfloat16 or float16 throughout. B is `[K, W, R]`.

    They read before the weights for -1: a slot of zeros stands in for rows without an adapter.
    """
    for a, b, offset in zip(lora_a, lora_b, offsets, strict=True):
        hidden = inputs.new_zeros(inputs.shape[0], a.shape[1])
        torch.ops.torch_ipex.punica_bgmv_shrink(hidden, inputs, a, indices, 1.0)
        torch.ops.torch_ipex.punica_bgmv_expand_slice(output, hidden, b, indices, offset, b.shape[1], True)
