"""Modules that carry LoRA: a model's own, each with another class that adds each row's own adapter.

`HOSTS` lists the kinds of modules that LoRA can be attached to: the first that takes a module is used.
"""

from __future__ import annotations

from torch import nn

from xpu_lora_compile.layers.embedding import Embedding
from xpu_lora_compile.layers.host import Host
from xpu_lora_compile.layers.linear import Linear

HOSTS: tuple[Host, ...] = (Linear(), Embedding())


def host_of(module: nn.Module) -> Host | None:
    """Return the first host that takes a module; None where LoRA cannot be attached to it."""
    host = next((host for host in HOSTS if host.takes(module)), None)
    return None if host is None or "forward" in vars(module) or hasattr(module, "lora_a") else host
