"""Linear layers of bitsandbytes, with weights in 4 or 8 bits."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from xpu_lora_compile.errors import AdapterError
from xpu_lora_compile.layers.host import Quantized


class BitsAndBytes(Quantized):
    """`Linear4bit` and `Linear8bitLt`."""

    name = "bitsandbytes"
    classes = ("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt")
    has_weight = True

    def weight_of(self, module: nn.Module) -> Tensor:
        """As `Host.weight_of`.

        Raises:
            AdapterError: a CPU's first call has packed the weight in another order.
        """
        weight: Any = module._parameters["weight"]
        state = getattr(weight, "quant_state", None)
        if state is None:
            # Linear8bitLt keeps the scales of its rows where its first call has put them.
            scales = weight.SCB if weight.SCB is not None else cast("Any", module).state.SCB
            return cast("Tensor", weight.detach().to(torch.float32) * (scales.to(weight.device).unsqueeze(1) / 127))
        if getattr(state, "packing_format_for_cpu", False):
            raise AdapterError(
                "load",
                "the weight of a Linear4bit, to compute the norms of DoRA",
                "one that the first call on this CPU has packed",
                "Load the adapters with DoRA before the model's first call.",
            )
        return cast("Tensor", sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.detach(), state))
