"""PeftModels that are tiny and loaded, for tests of banks that serve them; and what PEFT can do to them meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from support.cases import DEVICE
from support.peft_folders import lora_layers, quiet
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TOKENS = torch.randint(0, 70, (4, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)
# The first is that of the adapter which PEFT loads first.
ADAPTERS = ("default", "pirate", "haiku")

Lora = dict[str, Any]
_QWEN2 = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 70}
_QWEN2 |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 70, "n_positions": 64}
_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 70}
_BERT |= {"num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 3}


def qwen2() -> nn.Module:
    """A Qwen2 of two layers; its attention has biases."""
    return _made(Qwen2ForCausalLM, Qwen2Config(**_QWEN2, pad_token_id=0))


def gpt2() -> nn.Module:
    """A GPT-2 of two layers, of Conv1D, whose weights are transposed."""
    return _made(GPT2LMHeadModel, GPT2Config(**_GPT2, pad_token_id=0, bos_token_id=1, eos_token_id=1))


def bert() -> nn.Module:
    """A BERT of two layers that classifies; PEFT saves its classifier with each adapter."""
    return _made(BertForSequenceClassification, BertConfig(**_BERT, pad_token_id=0))


def _made(kind: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = kind(config).eval().requires_grad_(False)
        return model


# A model, what its LoRA targets, and its kind of task.
MODELS: dict[str, tuple[Callable[[], nn.Module], Lora]] = {
    "qwen2": (qwen2, {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "bert": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
}


def live_model(kind: str, *, adapters: tuple[str, ...] = ADAPTERS, **lora: Any) -> PeftModel:
    """Return a PeftModel with some adapters of ranks 2, 3, ..., with random weights, of which none is trained."""
    make, targets = MODELS[kind]
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(1)
        for number, name in enumerate(adapters):
            config = LoraConfig(**{"r": 2 + number, "lora_alpha": 3, **targets, **lora})
            if number:
                model.add_adapter(name, config)  # noqa: F821
            else:
                model = get_peft_model(make(), config, adapter_name=name)
        randomize(model)
    freeze(model)
    return model.eval().to(DEVICE)


def randomize(model: nn.Module, name: str = "") -> None:
    """Give all adapters, or one, other weights."""
    for key, parameter in model.named_parameters():
        is_own = any(part in key for part in ("lora_", "modules_to_save", "trainable_tokens_delta"))
        if is_own and (not name or f".{name}" in key):
            nn.init.normal_(parameter, std=0.3)


def freeze(model: PeftModel) -> None:
    """Have no adapter require grad, as one that serves."""
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)


def saved(folder: Path, kind: str, rank: int, seed: int, **lora: Any) -> Path:
    """Let PEFT save an adapter of such a model."""
    make, targets = MODELS[kind]
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(make(), LoraConfig(**{"r": rank, "lora_alpha": 4, **targets, **lora}))
        randomize(model)
        model.save_pretrained(folder)
    return folder


class Change:
    """One thing that PEFT, or its user, does to a live model: to several copies of it alike."""

    def __init__(self, seed: int, folders: list[Path]) -> None:
        self.choose = random.Random(seed)
        self.folders = folders
        self.added = 0

    def next(self, models: list[PeftModel]) -> tuple[str, Callable[[PeftModel], Tensor]]:
        """Do something to all of the models; returns what it was, and how to call them now."""
        names = list(models[0].peft_config)
        kinds = [
            *(
                "adapter_names",
                "set_adapter",
                "disable_adapter",
                "set_scale",
                "scale_layer",
                "raw scaling",
                "write",
                "data",
            ),
            *("load_adapter", "delete_adapter", "hotswap_adapter", "add_weighted_adapter"),
        ]
        kind = self.choose.choice(kinds) if len(names) < 6 else "delete_adapter"
        call: Callable[[PeftModel], Tensor] = logits
        if kind == "adapter_names":
            chosen = self.choose.choices([*names, "__base__"], k=len(TOKENS))
            return kind, lambda model: logits(model, adapter_names=chosen)
        if kind == "disable_adapter":
            return kind, disabled
        name, seed, number = self.choose.choice(names), self.choose.random(), self.added
        folder, weights = self.choose.choice(self.folders), [self.choose.uniform(-1, 1), self.choose.uniform(-1, 1)]
        several = self.choose.sample(names, min(2, len(names)))
        if kind in ("load_adapter", "add_weighted_adapter"):
            self.added += 1
        for model in models:
            with quiet(), torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(int(seed * 1e6))
                if kind == "set_adapter":
                    model.set_adapter(name, inference_mode=True)
                elif kind == "load_adapter":
                    model.load_adapter(folder, f"loaded{number}")
                elif kind == "delete_adapter" and len(names) > 2:
                    model.delete_adapter(name)
                elif kind == "hotswap_adapter" and not model.modules_to_save:
                    hotswap_adapter(model, str(folder), name, torch_device=str(DEVICE))
                elif kind == "add_weighted_adapter" and len(several) == 2 and not model.modules_to_save:
                    model.add_weighted_adapter(several, weights, f"sum{number}", combination_type="svd", svd_rank=3)
                else:
                    _change_layers(kind, model, name, seed)
        return kind, call


def _change_layers(kind: str, model: PeftModel, name: str, factor: float) -> None:
    for layer in lora_layers(model).values():
        if name not in layer.lora_A:
            continue
        if kind == "set_scale":
            layer.set_scale(name, 0.5 + factor)
        elif kind == "scale_layer":
            layer.scale_layer(0.5 + factor)
        elif kind == "raw scaling":
            layer.scaling[name] = 0.5 + factor
        elif kind == "write":
            layer.lora_B[name].weight.mul_(0.5 + factor)
        elif kind == "data":
            layer.lora_A[name].weight.data.mul_(0.5 + factor)


def logits(model: Any, **kwargs: Any) -> Tensor:
    """What a model says of `TOKENS`."""
    result: Tensor = model(input_ids=TOKENS, **kwargs).logits
    return result


def disabled(model: PeftModel) -> Tensor:
    """The same without adapters."""
    inner = getattr(model, "_orig_mod", model)
    with inner.disable_adapter():
        return logits(model)
