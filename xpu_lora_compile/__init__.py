"""Batched multi-LoRA that torch.compile can see.

PEFT folder --adapters--> stacked A and B --layers--> calls to ops --Dynamo--> FX graph
                                                         |                        |
                                              eager kernel, any device    passes --backend--> Inductor
"""

from __future__ import annotations

from typing import Any

from xpu_lora_compile.adapters.bank import AdapterBank
from xpu_lora_compile.errors import LoraError
from xpu_lora_compile.layers import attach
from xpu_lora_compile.ops import bgmv_expand, bgmv_expand_slice, bgmv_shrink, lora_linear
from xpu_lora_compile.passes import Decision, record_decisions, rewrite

__version__ = "0.1.0"


def inductor_options(options: dict[str, Any] | None = None) -> dict[str, Any]:
    """See `xpu_lora_compile.backend.inductor_options`, which loads Inductor and therefore waits until it is called."""
    from xpu_lora_compile.backend import inductor_options

    return inductor_options(options)


__all__ = [
    "AdapterBank",
    "Decision",
    "LoraError",
    "attach",
    "bgmv_expand",
    "bgmv_expand_slice",
    "bgmv_shrink",
    "inductor_options",
    "lora_linear",
    "record_decisions",
    "rewrite",
]
