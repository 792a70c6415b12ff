"""Linear layers of HQQ."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from xpu_lora_compile.layers.host import Quantized


class Hqq(Quantized):
    """`HQQLinear`, which says in which dtype it computes."""

    name = "HQQ"
    classes = ("hqq.core.quantize.HQQLinear",)
    has_weight = True

    def weight_of(self, module: nn.Module) -> Tensor:
        """As `Host.weight_of`."""
        return cast("Any", module).dequantize().detach()  # type: ignore[no-any-return]
