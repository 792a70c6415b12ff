"""SmolLM2 and the example's adapters without most of their layers: what compiles for a minute takes seconds.

The leg `demo` runs the whole model.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import smollm2
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM


def first_layers(layers: int) -> LlamaForCausalLM:
    """Return the real model without its other layers."""
    model = smollm2.load_model()
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model


def save_first_layers(adapter: Path, folder: Path, layers: int, strength: float) -> Path:
    """Save a real adapter without its tensors for other layers, and so strong that its tokens are its own all the same.

    Args:
        adapter: its folder.
        folder: where to save it, which is made.
        layers: how many are kept.
        strength: factor on B.
    """
    folder.mkdir()
    shutil.copy(adapter / "adapter_config.json", folder)
    numbers = re.compile(r"\.layers\.(\d+)\.")
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = [name for name in tensors if all(int(number) < layers for number in numbers.findall(name))]
    strong = {name: tensors[name] * (strength if ".lora_B." in name else 1) for name in kept}
    save_file(strong, folder / "adapter_model.safetensors")
    return folder
