"""`nn.Linear`, with a weight of numbers or a tensor that stands for one, as torchao makes them; and its subclasses."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from xpu_lora_compile.layers.host import Host, LoraLayer, full_name


class LoraLinear(LoraLayer, nn.Linear):  # type: ignore[override]
    """A Linear that adds LoRA."""

    def without_lora(self, input: Tensor) -> Tensor:  # noqa: A002
        """As `LoraLayer.without_lora`; Dynamo would guard `super()` and the property `weight` for each layer."""
        return nn.functional.linear(input, cast("Tensor", self._parameters["weight"]), self.bias)


class Linear(Host):
    """A linear layer with a floating weight.

    A subclass that has another forward may compute something else, and is taken by name. The one whose parent reads the
    weight instead of calling it, `nn.MultiheadAttention`, is not.
    """

    name = "nn.Linear"
    classes = ("transformers.models.falcon.modeling_falcon.FalconLinear",)

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Return whether it is nn.Linear, a subclass with the same forward, or one that is known."""
        if not issubclass(kind, nn.Linear) or issubclass(kind, NonDynamicallyQuantizableLinear):
            return False
        return kind.forward is nn.Linear.forward or full_name(kind) in self.classes

    def layer(self, module: nn.Module) -> type[LoraLayer]:
        """Return `LoraLinear`, or for a subclass one of its own."""
        return LoraLinear if type(module) is nn.Linear else super().layer(module)
