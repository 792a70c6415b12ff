"""Linear layers of HQQ."""

from __future__ import annotations

from xpu_lora_compile.layers.host import Quantized


class Hqq(Quantized):
    """`HQQLinear`, which says in which dtype it computes."""

    name = "HQQ"
    classes = ("hqq.core.quantize.HQQLinear",)
