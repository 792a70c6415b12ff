"""Linear layers of gptqmodel, for GPTQ and AWQ."""

from __future__ import annotations

from torch import nn

from xpu_lora_compile.layers.declared import DeclaredLayer
from xpu_lora_compile.layers.host import Quantized, full_name


class GptqModel(Quantized):
    """All subclasses of its `BaseQuantLinear`, one for each kernel, which may return a view."""

    name = "GPTQ and AWQ of gptqmodel"
    classes = ("gptqmodel.nn_modules.qlinear.BaseQuantLinear",)
    mixin = DeclaredLayer

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Return whether it is one of them: each has a forward of its own."""
        return any(full_name(base) in self.classes for base in kind.__mro__)
