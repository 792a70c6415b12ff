"""`nn.Linear`."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from xpu_lora_compile.adapters.checkpoint import ModuleSizes
from xpu_lora_compile.layers.host import Host, LoraLayer


class LoraLinear(LoraLayer, nn.Linear):  # type: ignore[override]
    """A Linear that adds LoRA."""

    def without_lora(self, input: Tensor) -> Tensor:  # noqa: A002
        """As `LoraLayer.without_lora`; Dynamo would guard `super()` and the property `weight` for each layer."""
        return nn.functional.linear(input, cast("Tensor", self._parameters["weight"]), self.bias)


class Linear(Host):
    """A linear layer with a floating weight; no subclass, which may compute something else."""

    name = "nn.Linear"

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Return whether it is nn.Linear itself."""
        return kind is nn.Linear

    def site(self, module: nn.Module) -> ModuleSizes:
        """Return D and the columns of the output."""
        assert isinstance(module, nn.Linear)  # noqa: S101 - for the type checker
        return ModuleSizes("linear", module.in_features, module.out_features, padded=False)

    def layer(self, module: nn.Module) -> type[LoraLayer]:
        """Return `LoraLinear`."""
        return LoraLinear
