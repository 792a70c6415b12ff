"""LoRA on gptqmodel's layers, with a stand-in: all subclasses of its base class, and results that are views."""

from __future__ import annotations

from typing import Any

import torch
from support.stand_ins import StandInForBaseQuantLinear, StandInForGptq
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.layers import host_of


def test_each_subclass_is_known_by_the_name_of_the_base_class() -> None:
    members = {"__module__": "gptqmodel.nn_modules.qlinear", "__qualname__": "BaseQuantLinear"}
    base = type("BaseQuantLinear", (StandInForBaseQuantLinear,), members)
    kernel = type("TorchQuantLinear", (base,), {"forward": StandInForGptq.forward, "__module__": "elsewhere"})
    host = host_of(kernel(6, 5))
    assert host is not None
    assert host.name == "GPTQ and AWQ of gptqmodel"


class Kept(nn.Module):
    """Returns a part of memory that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 5
        self.register_buffer("memory", torch.arange(24.0).view(3, 8))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.memory[: hidden.reshape(-1, 6).shape[0], 1:6].view(*hidden.shape[:-1], 5)


@torch.no_grad()
def test_a_result_that_is_a_view_is_not_written_to() -> None:
    for way in ("eager", "compiled"):
        torch._dynamo.reset()
        model = nn.Sequential(Kept())
        before = model[0].memory.clone()
        bank = xlc.attach(model, slots=1, max_rank=2, linear_classes=[Kept])
        model[0].store(0, torch.ones(2, 6), torch.ones(5, 2))
        bank._slots[0] = "a"
        run: Any = model
        if way == "compiled":
            run = torch.compile(model, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"})
        with bank.use(["a", None, "a"]):
            output = run(torch.ones(3, 6))
        assert torch.equal(model[0].memory, before)
        torch.testing.assert_close(output, before[:, 1:6] + torch.tensor([[12.0], [0.0], [12.0]]))
