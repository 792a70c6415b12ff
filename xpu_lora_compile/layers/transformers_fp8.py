"""Linear layers of transformers with weights in 8 or 4 bits of floating point."""

from __future__ import annotations

import torch
from torch import nn

from xpu_lora_compile.layers.host import Quantized

_INTEGRATIONS = "transformers.integrations."


class TransformersFp8(Quantized):
    """`FP8Linear`, that of FBGEMM, and that of compressed-tensors; their results are of their inputs' dtype."""

    name = "FP8 of transformers"
    classes = (
        f"{_INTEGRATIONS}finegrained_fp8.FP8Linear",
        f"{_INTEGRATIONS}fbgemm_fp8.FbgemmFp8Linear",
        f"{_INTEGRATIONS}compressed_tensors.CompressedTensorsFP8Linear",
        f"{_INTEGRATIONS}nvfp4.NVFP4Linear",
    )

    def dtype(self, module: nn.Module) -> torch.dtype | None:
        """Return that of a weight that is not quantized; else nothing, since a bias may be of another."""
        weight = module._parameters.get("weight")
        return weight.dtype if weight is not None and weight.is_floating_point() and weight.itemsize > 1 else None
