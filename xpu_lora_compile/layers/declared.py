"""Classes of which the caller of `attach` says that they are linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from xpu_lora_compile.layers.host import LoraLayer, Quantized


class DeclaredLayer(LoraLayer):
    """LoRA on what is known by its word alone: the result may be a view of something that must not change."""

    lora_in_place = False


class Declared(Quantized):
    """Modules of some classes, and subclasses of theirs, that map `[..., in_features]` to `[..., out_features]`.

    Args:
        classes: as `attach` is given them.
    """

    mixin = DeclaredLayer

    def __init__(self, classes: Sequence[type[nn.Module]]) -> None:
        self.name = ", ".join(kind.__name__ for kind in classes)
        self.declared = tuple(classes)

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Return whether it is one of them."""
        return issubclass(kind, self.declared)

    def takes(self, module: nn.Module) -> bool:
        """Return whether it is one of them, and has sizes."""
        return self.takes_class(type(module)) and all(
            isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features")
        )
