"""LoRA on HQQ: the class is known by name, and says in which dtype it computes."""

from __future__ import annotations

import torch
from support.stand_ins import StandInForHqq

from xpu_lora_compile.layers import host_of


def test_the_class_is_known_by_name() -> None:
    members = {"__module__": "hqq.core.quantize", "__qualname__": "HQQLinear", "compute_dtype": torch.float16}
    layer = type("HQQLinear", (StandInForHqq,), members)(6, 5)
    host = host_of(layer)
    assert host is not None
    assert host.name == "HQQ"
    assert host.dtype(layer) == torch.float16
    assert host_of(StandInForHqq(6, 5)) is None
