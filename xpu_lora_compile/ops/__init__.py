"""The contract: public ops, their checks, their reference, and the handles that passes match on."""

from xpu_lora_compile.kernels.native import NATIVE_ADD_LORA, NATIVE_EXPAND, NATIVE_SHRINK
from xpu_lora_compile.ops.bgmv import (
    BGMV_EXPAND,
    BGMV_EXPAND_SLICE,
    BGMV_SHRINK,
    bgmv_expand,
    bgmv_expand_slice,
    bgmv_shrink,
)
from xpu_lora_compile.ops.internal import (
    ADD_LORA,
    EXPAND,
    EXPAND_SLICE,
    LINEAR_WITH_LORA,
    ROUTE,
    ROUTE_TILES,
    SHRINK,
    SORTED_INDICES,
    TRITON_ADD_LORA,
    TRITON_EXPAND_SLICE,
    TRITON_ROUTE_TILES,
    TRITON_SHRINK,
    TRITON_TRAINING_TILES,
    VALID_SLOTS,
    VENDOR_ADD_LORA,
)
from xpu_lora_compile.ops.lora_linear import LORA_LINEAR, LORA_LINEARS, lora_linear
from xpu_lora_compile.ops.moe import moe_lora_linear
from xpu_lora_compile.ops.trained_linear import TRAINED_LINEAR

__all__ = [
    "ADD_LORA",
    "BGMV_EXPAND",
    "BGMV_EXPAND_SLICE",
    "BGMV_SHRINK",
    "EXPAND",
    "EXPAND_SLICE",
    "LINEAR_WITH_LORA",
    "LORA_LINEAR",
    "LORA_LINEARS",
    "NATIVE_ADD_LORA",
    "NATIVE_EXPAND",
    "NATIVE_SHRINK",
    "ROUTE",
    "ROUTE_TILES",
    "SHRINK",
    "SORTED_INDICES",
    "TRAINED_LINEAR",
    "TRITON_ADD_LORA",
    "TRITON_EXPAND_SLICE",
    "TRITON_ROUTE_TILES",
    "TRITON_SHRINK",
    "TRITON_TRAINING_TILES",
    "VALID_SLOTS",
    "VENDOR_ADD_LORA",
    "bgmv_expand",
    "bgmv_expand_slice",
    "bgmv_shrink",
    "lora_linear",
    "moe_lora_linear",
]
