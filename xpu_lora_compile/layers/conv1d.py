"""`Conv1D` of transformers, the linear layer of GPT-2: its weight is `[in, out]`."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from xpu_lora_compile.adapters.checkpoint import ModuleSizes
from xpu_lora_compile.layers.host import Host


class Conv1D(Host):
    """A linear layer with a transposed weight; A and B of its adapters are as those of an nn.Linear."""

    name = "Conv1D"
    classes = ("transformers.pytorch_utils.Conv1D",)

    def site(self, module: nn.Module) -> ModuleSizes:
        """Return D and the columns of the output."""
        in_features, out_features = cast("Tensor", module._parameters["weight"]).shape
        return ModuleSizes("linear", in_features, out_features, padded=False)

    def weight_of(self, module: nn.Module) -> Tensor:
        """As `Host.weight_of`."""
        return super().weight_of(module).t()
