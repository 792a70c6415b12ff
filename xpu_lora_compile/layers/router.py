"""Routers of mixtures, as transformers 5 has them: a weight of their own, and what they make of its product."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from xpu_lora_compile.adapters.checkpoint import ModuleSizes
from xpu_lora_compile.layers.host import Host, LoraLayer, routing_of
from xpu_lora_compile.ops import lora_linear


class _WithLora(TorchFunctionMode):
    """Adds a router's LoRA to its product, the one linear function that its forward calls."""

    def __init__(self, router: RouterLayer) -> None:
        super().__init__()
        self.router = router

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        result = func(*args, **(kwargs or {}))
        return self.router.added(args[0], result) if func is functional.linear else result


class RouterLayer(LoraLayer):
    """A router whose logits have each row's own adapter in them, before it chooses experts by these."""

    lora_takes_one_input = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class; in a `bank.use` block with the LoRA of each row's own adapter."""
        if routing_of(self).sequence_slots is None:
            return super(LoraLayer, self).forward(*args, **kwargs)
        with _WithLora(self):
            return super(LoraLayer, self).forward(*args, **kwargs)

    def added(self, inputs: Tensor, logits: Tensor) -> Tensor:
        """Logits `[..., E]` with LoRA, of inputs `[..., D]`."""
        indices = routing_of(self).rows_of(self, inputs, 1)
        if indices is None:
            return logits
        rows = logits.reshape(-1, logits.shape[-1])
        factors = [self.lora_a], [self.lora_b]
        return lora_linear(rows, inputs.reshape(-1, inputs.shape[-1]), *factors, indices, [0]).view(logits.shape)


class Router(Host):
    """Routers of transformers whose forward calls one linear function, with their weight."""

    name = "routers of transformers 5"
    mixin = RouterLayer

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Return whether it is such a class, by its name and by what its forward calls."""
        if not (kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("Router")):
            return False
        return getattr(kind.forward, "__code__", None) is not None and "linear" in kind.forward.__code__.co_names

    def takes(self, module: nn.Module) -> bool:
        """Return whether its weight is `[E, D]`."""
        return super().takes(module) and cast("Tensor", module._parameters["weight"]).dim() == 2

    def site(self, module: nn.Module) -> ModuleSizes:
        """Return the sizes of the weight, which "all-linear" of PEFT leaves out."""
        experts, features = cast("Tensor", module._parameters["weight"]).shape
        return ModuleSizes("linear", features, experts, padded=False, by_name=True)
