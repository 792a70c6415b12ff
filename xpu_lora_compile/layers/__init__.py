"""Modules that carry LoRA: a model's own, each with another class that adds each row's own adapter.

`HOSTS` lists the kinds of modules that LoRA can be attached to: the first that takes a module is used.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from xpu_lora_compile.layers.bitsandbytes import BitsAndBytes
from xpu_lora_compile.layers.conv1d import Conv1D
from xpu_lora_compile.layers.conv2d import Conv2d
from xpu_lora_compile.layers.embedding import Embedding
from xpu_lora_compile.layers.experts import Experts
from xpu_lora_compile.layers.gptqmodel import GptqModel
from xpu_lora_compile.layers.host import Host, has_other_forward
from xpu_lora_compile.layers.hqq import Hqq
from xpu_lora_compile.layers.linear import Linear
from xpu_lora_compile.layers.router import Router
from xpu_lora_compile.layers.transformers_fp8 import TransformersFp8

HOSTS: tuple[Host, ...] = (
    Linear(),
    Embedding(),
    Conv1D(),
    Conv2d(),
    BitsAndBytes(),
    Hqq(),
    TransformersFp8(),
    GptqModel(),
    Experts(),
    Router(),
)


def host_of(module: nn.Module, hosts: Sequence[Host] = HOSTS) -> Host | None:
    """Return the first host that takes a module; None where LoRA cannot be attached to it."""
    host = next((host for host in hosts if host.takes(module)), None)
    return None if host is None or has_other_forward(module) or hasattr(module, "lora_routing") else host
