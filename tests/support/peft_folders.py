"""Real PEFT folders for tests: a tiny Llama, adapters with random weights that PEFT saves, and edits to both files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from xpu_lora_compile.adapters.checkpoint import WEIGHTS_FILE, ModuleSizes
from xpu_lora_compile.adapters.config import CONFIG_FILE

# What PEFT can be told about ranks, scalings and targets, by name: one real folder each.
CASES: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "full-names": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "regex": {"target_modules": r"model\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.up_proj)"},
    "regex-with-lm_head": {"target_modules": r".*(q_proj|lm_head)"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude-list": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]},
    "exclude-regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
    "rank_pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2, "layers.1.*q_proj": 5}},
    "alpha_pattern": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"^model.layers.0.*v_proj": 3}},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 3}},
    "layers_to_transform": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layer-0": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"], "alpha_pattern": {"embed_tokens": 24}},
    "embedding-and-lm_head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "use_rslora": True},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
}


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """Return a Llama of two layers, hidden size 32 and 70 tokens, with the same random weights every time."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 70}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **overrides})).eval()


def save_adapter(folder: Path, *, seed: int = 0, model: nn.Module | None = None, **lora: Any) -> Path:
    """Let PEFT save an adapter with random A and B; `lora` goes to LoraConfig, with r=4 and alpha=6 unless told."""
    save_embedding_layers = lora.pop("save_embedding_layers", "auto")
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model or tiny_llama(), LoraConfig(**{"r": 4, "lora_alpha": 6, **lora}))
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        peft_model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


def loaded_by_peft(folder: Path, model: nn.Module | None = None) -> PeftModel:
    """Load the folder with PEFT, as the oracle."""
    with quiet():
        return PeftModel.from_pretrained(model or tiny_llama(), folder)


def lora_layers(peft_model: PeftModel) -> dict[str, LoraLayer]:
    """Return the modules that PEFT put LoRA on, by their name in the base model."""
    return {
        name: module for name, module in peft_model.base_model.model.named_modules() if isinstance(module, LoraLayer)
    }


def sites_of(model: nn.Module) -> dict[str, ModuleSizes]:
    """Return a site for every linear layer and embedding of the model; the vocabulary's are padded."""
    sites = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sites[name] = ModuleSizes("linear", module.in_features, module.out_features, padded=name == "lm_head")
        elif isinstance(module, nn.Embedding):
            sites[name] = ModuleSizes("embedding", module.num_embeddings, module.embedding_dim, padded=True)
    return sites


def edit_config(folder: Path, **changes: Any) -> None:
    """Overwrite fields of adapter_config.json; `...` removes one."""
    path = folder / CONFIG_FILE
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@contextmanager
def edited_weights(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Give the tensors of adapter_model.safetensors to change, and write them back."""
    # Clones, since loaded tensors are the mapped file, which is about to be overwritten.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    yield tensors
    save_file(tensors, folder / WEIGHTS_FILE)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what PEFT and transformers warn of; the tests turn warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
