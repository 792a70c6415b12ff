"""`moe_lora_linear`: the LoRA of experts, where a row is a pair of a token and one of its experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xpu_lora_compile.errors import DtypeError, ShapeError
from xpu_lora_compile.ops.lora_linear import lora_linear


def moe_lora_linear(
    base: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_indices_tensor: Tensor,
    expert_indices_tensor: Tensor,
    expert_pages: Tensor,
    slice_offsets: Sequence[int],
    scaling: float = 1.0,
    ranks: Tensor | None = None,
) -> Tensor:
    """Add to the output of experts what the LoRA of each row's own adapter has for the row's expert.

    ```
    p = expert_pages[lora_indices_tensor[t], expert_indices_tensor[t]]
    result[t, o : o + W] += B[p] @ (scaling * A[p] @ inputs[t])      for each slice's A, B and offset o
    ```

    A page holds one expert's weights of one adapter, so that to a kernel a page is what a slot is elsewhere. Stacks
    `[K, E, R, D]` are `[K * E, R, D]` with the pages `torch.arange(K * E).view(K, E)`. It is `lora_linear` of the
    pages: its passes, kernels, gradients and precision are those of that op.

    Args:
        base: `[T, H]`, not changed; a row is a pair of a token and an expert, in any order.
        inputs: `[T, D]`.
        lora_a: for each slice, A `[P, R, D]`, any strides.
        lora_b: for each slice, B `[P, W, R]`, any strides.
        lora_indices_tensor: `[T]`, int32 or int64: the slot of each row; outside `[0, K)` it has no adapter.
        expert_indices_tensor: `[T]`, int32 or int64: the expert of each row; outside `[0, E)` it has none.
        expert_pages: `[K, E]`, int32 or int64: the page of each slot's expert; outside `[0, P)` the adapter has no
            weights for it.
        slice_offsets: for each slice, its first column.
        scaling: factor on what is added.
        ranks: as of `lora_linear`, for each page, `[P]`.

    Returns:
        `[T, H]` in the dtype of `base`; a new tensor.

    Raises:
        ContractError: a shape, dtype, device or slice that does not fit; the subclass says which.

    Example:
        >>> a, b = torch.ones(1, 1, 3), torch.ones(1, 2, 1)
        >>> pages = torch.tensor([[-1, 0]])  # one adapter, which changes the second of two experts
        >>> base, inputs, slots, experts = torch.zeros(3, 2), torch.ones(3, 3), torch.tensor([0, 0, -1]), [0, 1, 1]
        >>> moe_lora_linear(base, inputs, [a], [b], slots, torch.tensor(experts), pages, [0]).tolist()
        [[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]]
    """
    pages = pages_of(lora_indices_tensor, expert_indices_tensor, expert_pages)
    return lora_linear(base, inputs, lora_a, lora_b, pages, slice_offsets, scaling, ranks)


def pages_of(slots: Tensor, experts: Tensor, expert_pages: Tensor) -> Tensor:
    """Return the page of each row, `[T]`, and -1 where it has none: see `moe_lora_linear`.

    Raises:
        ShapeError: indices that are no rows, or a table that is none.
        DtypeError: something else than int32 or int64.
    """
    if slots.dim() != 1 or slots.shape != experts.shape or expert_pages.dim() != 2:
        got = f"{list(slots.shape)}, {list(experts.shape)} and {list(expert_pages.shape)}"
        raise ShapeError(
            "moe_lora_linear",
            "slots [T], experts [T] and pages [K, E]",
            got,
            "Give each row, a pair of a token and an expert, its slot and its expert: slots.repeat_interleave(top_k), "
            "top_k_index.flatten().",
        )
    if other := [index.dtype for index in (slots, experts, expert_pages) if index.dtype not in _INTEGERS]:
        raise DtypeError("moe_lora_linear", "indices and pages of int32 or int64", str(other[0]), "Call .long() on it.")
    count, of_slot = expert_pages.shape
    known = (slots >= 0) & (slots < count) & (experts >= 0) & (experts < of_slot)
    place = torch.where(known, slots * of_slot + experts, 0)
    found = expert_pages.flatten()[place] if count * of_slot else place
    return torch.where(known, found, -1)


_INTEGERS = (torch.int32, torch.int64)
