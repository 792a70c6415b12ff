"""Linear layers of bitsandbytes, with weights in 4 or 8 bits."""

from __future__ import annotations

from xpu_lora_compile.layers.host import Quantized


class BitsAndBytes(Quantized):
    """`Linear4bit` and `Linear8bitLt`."""

    name = "bitsandbytes"
    classes = ("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt")
