"""Batched multi-LoRA that torch.compile can see.

PEFT folder --adapters--> stacked A and B --layers--> calls to ops --Dynamo--> FX graph
                                                         |                        |
                                              eager kernel, any device    passes --backend--> Inductor
"""

from __future__ import annotations

from typing import Any

from xpu_lora_compile.adapters.bank import AdapterBank
from xpu_lora_compile.adapters.convert import convert
from xpu_lora_compile.artifacts import Served, export, load_artifact
from xpu_lora_compile.errors import LoraError
from xpu_lora_compile.inspect.explain import explain
from xpu_lora_compile.inspect.report import Report
from xpu_lora_compile.inspect.verify import verify
from xpu_lora_compile.kernels import force_kernel
from xpu_lora_compile.layers.attach import attach, detach
from xpu_lora_compile.ops import bgmv_expand, bgmv_expand_slice, bgmv_shrink, lora_linear, moe_lora_linear
from xpu_lora_compile.passes import Decision, Launch, record_decisions, rewrite

__version__ = "0.1.0"


def inductor_options(options: dict[str, Any] | None = None, *, launch: Launch = "auto") -> dict[str, Any]:
    """Options that put our passes into stock Inductor: `torch.compile(model, options=xlc.inductor_options())`.

    Args:
        options: further options of Inductor to go with them; passes among them keep running, after ours.
        launch: who launches the Triton kernels on a GPU, as for `rewrite`: "auto", "inductor" or "op".

    Raises:
        OptionError: an option that Inductor does not know, or a value of the wrong type; an unknown `launch`.
    """
    # Loads Inductor, and therefore waits until it is called.
    from xpu_lora_compile.backend import inductor_options

    return inductor_options(options, launch=launch)


__all__ = [
    "AdapterBank",
    "Decision",
    "LoraError",
    "Report",
    "Served",
    "attach",
    "bgmv_expand",
    "bgmv_expand_slice",
    "bgmv_shrink",
    "convert",
    "detach",
    "explain",
    "export",
    "force_kernel",
    "inductor_options",
    "load_artifact",
    "lora_linear",
    "moe_lora_linear",
    "record_decisions",
    "rewrite",
    "verify",
]
