"""Copy each row's weights, and multiply in one batched product: for few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from xpu_lora_compile.kernels.routing import Routing


def gather(inputs: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """`weights[i] @ inputs[t]` of every row, in the dtype of `inputs`; a row whose `i` is no slot reads any."""
    chosen = weights[routing.slot].to(inputs.dtype)
    return torch.bmm(chosen, inputs.unsqueeze(2)).squeeze(2)
