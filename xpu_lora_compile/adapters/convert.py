"""`convert`: an adapter of another kind than LoRA -> a folder with LoRA that is close to it, as PEFT converts it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xpu_lora_compile.adapters.checkpoint import WEIGHTS_FILE
from xpu_lora_compile.adapters.names import PREFIX
from xpu_lora_compile.errors import AdapterError, UnsupportedAdapterError

# As PEFT calls the first adapter of a model.
_NAME = "default"


def convert(
    model: nn.Module, folder: str | os.PathLike[str], out: str | os.PathLike[str], rank: int | float
) -> dict[str, float]:
    """Write a LoRA adapter that is close to an adapter of another kind: LoHa, LoKr, VeRA and others.

    PEFT loads the adapter into the model, takes the best approximation of each module's change by a singular value
    decomposition, and is taken off again.

    Args:
        model: the base model, without LoRA; its weights stay as they are.
        folder: of the adapter.
        out: the folder to write, which is made if it is not there.
        rank: of all modules; or, as a float up to 1, the part of each change's squares that its rank is to keep.

    Returns:
        The error of each module: the length of the difference of both changes of its weight, divided by that of the
        change. 0 is an exact conversion, and 1 is as bad as no adapter.

    Raises:
        AdapterError: PEFT is not there or cannot load the adapter, or the model has LoRA.
        UnsupportedAdapterError: the adapter is LoRA already, or PEFT cannot convert its kind.
    """
    where = f"convert {os.fspath(folder)}"
    if any(hasattr(module, "lora_routing") for module in model.modules()) or hasattr(model, "peft_config"):
        raise AdapterError(
            where, "a plain base model", "one that has LoRA", "Call bank.detach(), or load the model again."
        )
    try:
        import peft
        from peft.tuners.lora.conversion import convert_to_lora
    except ImportError as error:
        raise AdapterError(where, "PEFT 0.19 or later", str(error), "Install it: pip install peft.") from error
    try:
        config = peft.PeftConfig.from_pretrained(os.fspath(folder))
    except (ValueError, OSError, KeyError, TypeError) as error:
        remedy = "Give the folder that PEFT's save_pretrained() wrote."
        raise AdapterError(where, "a folder that PEFT can load", str(error), remedy) from error
    if config.peft_type == "LORA":
        # PEFT would change the base weights for some ways to initialise it, and could not change them back.
        remedy = "Load it as it is, with bank.load; the error says what to do where it cannot be loaded."
        raise UnsupportedAdapterError(where, "an adapter of another kind than LoRA", "LoRA", remedy)
    try:
        peft_model = peft.PeftModel.from_pretrained(model, os.fspath(folder), adapter_name=_NAME)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        remedy = (
            "Load the base model again, the one that the adapter was trained on: PEFT may have changed its modules."
        )
        raise AdapterError(where, "an adapter that PEFT can load into the model", str(error), remedy) from error
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                made, weights = convert_to_lora(peft_model, rank, adapter_name=_NAME)
            except (TypeError, ValueError) as error:
                remedy = "Choose another rank where the text says so; else serve the adapter with PEFT."
                raise UnsupportedAdapterError(where, "an adapter that PEFT can convert", str(error), remedy) from error
            errors = {
                name.removeprefix(PREFIX): _error(module, weights, name)
                for name, module in peft_model.named_modules()
                if f"{name}.lora_A.weight" in weights
            }
        Path(out).mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, Path(out) / WEIGHTS_FILE)
        made.save_pretrained(os.fspath(out))
        return errors
    finally:
        peft_model.unload()


def _error(module: Any, weights: dict[str, Tensor], name: str) -> float:
    a, b = (weights[f"{name}.lora_{part}.weight"].float() for part in "AB")
    change = _change(module).float()
    # A Conv1D's weight is transposed.
    made = (
        b @ a
        if change.shape == (len(b), a.shape[1]) and type(module.get_base_layer()).__name__ != "Conv1D"
        else (b @ a).t()
    )
    return float((change - made).norm() / change.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _change(module: Any) -> Tensor:
    """What the adapter adds to the weight of a module."""
    try:
        change: Tensor = module.get_delta_weight(_NAME)
    except TypeError:
        # MiSS wants the weight, and gives the new one or the change. What it makes of the identity is always the same.
        base = module.get_base_layer()
        identity = torch.eye(base.in_features, dtype=base.weight.dtype, device=base.weight.device)
        change = (module(identity) - base(identity)).t()
    return change
