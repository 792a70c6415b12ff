"""All rows through every slot, keeping what belongs: nothing on the host depends on the indices."""

from __future__ import annotations

import torch
from torch import Tensor

from xpu_lora_compile.kernels.routing import Routing


def dense(inputs: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """`weights[i] @ inputs[t]` of every row, in the dtype of `inputs`; arbitrary where `i` is no slot.

    One product a slot, picked by `where`: in one product over all slots, masked by zeros, a NaN in the weights of a
    slot would reach the rows of all others.
    """
    result = inputs.new_empty(len(inputs), weights.shape[1])
    for slot in range(len(weights)):
        product = inputs @ weights[slot].to(inputs.dtype).t()
        torch.where((routing.slot == slot)[:, None], product, result, out=result)
    return result
