"""One product for each slot that rows use: for a CPU, which can read the sizes of the groups without waiting."""

from __future__ import annotations

from torch import Tensor

from xpu_lora_compile.kernels.routing import Routing


def grouped(inputs: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """`weights[i] @ inputs[t]` of every row, in the dtype of `inputs`; arbitrary where `i` is no slot."""
    result = inputs.new_empty(len(inputs), weights.shape[1])
    for slot, rows in routing.rows_by_slot:
        result[rows] = inputs[rows] @ weights[slot].to(inputs.dtype).t()
    return result
