"""Quantized base models, for `--base` of `xpu-lora bench model` and `bench gpu-model`.

The real libraries change the linear layers but the head.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from xpu_lora_compile.errors import BenchError

PLAIN = "plain"


def _is_quantized(module: nn.Module, name: str) -> bool:
    return type(module) is nn.Linear and not name.endswith("lm_head")


def _int8(model: nn.Module) -> None:
    """Weights as torchao's int8, one scale for each row; activations stay as they are."""
    ao = _library("torchao.quantization", "torchao")
    ao.quantize_(model, ao.Int8WeightOnlyConfig(), filter_fn=_is_quantized)


def _nf4(model: nn.Module) -> None:
    """Weights as the 4-bit NormalFloat of bitsandbytes, in blocks of 64."""
    four_bit = _library("bitsandbytes", "bitsandbytes").nn.Linear4bit
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and _is_quantized(module, name):
            sizes, dtype = (module.in_features, module.out_features), module.weight.dtype
            made = four_bit(*sizes, bias=module.bias is not None, quant_type="nf4", compute_dtype=dtype)
            made.load_state_dict(module.state_dict())
            # The weight is quantized as it moves to its device.
            model.set_submodule(name, made.to(module.weight.device))
    # By this PEFT knows such a model.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


BASES: dict[str, Callable[[nn.Module], None]] = {PLAIN: lambda model: None, "int8": _int8, "nf4": _nf4}


def quantize(model: nn.Module, base: str) -> None:
    """Store the linear layers of a model in one of these ways.

    Raises:
        BenchError: there is no such way, or its library is missing.
    """
    if base not in BASES:
        raise BenchError("bench: --base", ", ".join(BASES), repr(base), "Choose one of these.")
    BASES[base](model)


def described(base: str) -> str:
    """How a benchmark's title says so: "nf4 weights, ", or nothing of plain ones."""
    return "" if base == PLAIN else f"{base} weights, "


def _library(module: str, package: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as missing:
        raise BenchError("bench: --base", package, "none", f"pip install {package}.") from missing
