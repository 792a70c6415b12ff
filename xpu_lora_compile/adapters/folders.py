"""Writes a PEFT folder with random weights: for benchmarks and checks, which load it as any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from xpu_lora_compile.adapters.checkpoint import ModuleSizes


def write_adapter(
    folder: Path, sites: Mapping[str, ModuleSizes], rank: int, dtype: torch.dtype = torch.float32
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` for these linear modules and convolutions.

    Args:
        folder: that exists.
        sites: by the names of the modules, as `AdapterBank.sites`.
        rank: R of all.
        dtype: of the file's tensors.
    """
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(sites), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {}
    for name, site in sites.items():
        a, b = map(torch.randn, site.shapes_in_file(rank))
        weights[f"base_model.model.{name}.lora_A.weight"] = (a / site.in_features**0.5).to(dtype)
        weights[f"base_model.model.{name}.lora_B.weight"] = (0.3 * b / rank**0.5).to(dtype)
    save_file(weights, folder / "adapter_model.safetensors")
