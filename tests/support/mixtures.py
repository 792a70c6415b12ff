"""Small mixtures of experts of transformers, and adapters for them in every form that files have."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

VOCABULARY, RANK, ALPHA = 64, 3, 5
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "intermediate_size": 48,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "Qwen3Moe": {
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 8,
    },
    "DeepseekV3": {
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "Olmoe": {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "Llama4Text": {
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
    },
}
FAMILIES = tuple(_CONFIGS)
# Of transformers 4: what the projections of one expert were called, and where.
_OLD_NAMES = {"Mixtral": ("w1", "w3", "w2")}


def mixture(family: str, implementation: str = "grouped_mm") -> nn.Module:
    """Make a small model of a family, the same each time."""
    config = getattr(transformers, f"{family}Config")(**_SIZES | _CONFIGS[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            # Some are made without values.
            nn.init.normal_(parameter, std=0.15)
    if family != "Llama4Text":
        model.set_experts_implementation(implementation)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold the weights of experts, by name."""
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def save_fused(
    family: str, folder: Path, seed: int, edit: Callable[[dict[str, nn.Parameter]], None] | None = None, **lora: Any
) -> Path:
    """Have PEFT make and save an adapter on all experts, and on attention."""
    settings: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "o_proj"] if family != "DeepseekV3" else ["o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    with _quiet():
        peft = get_peft_model(mixture(family), LoraConfig(**settings | lora))  # type: ignore[arg-type]
    weights = {name: weight for name, weight in peft.named_parameters() if "lora_" in name}
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    if edit is not None:
        edit(weights)
    peft.save_pretrained(folder)
    return folder


def save_forms(family: str, folder: Path, seed: int) -> dict[str, Path]:
    """Save one adapter on experts in every form: gate, up and down have factors of their own, of rank `RANK`.

    Returns:
        The folder of each form: "fused" is PEFT's; "single" names each expert; "stacked" has three dimensions;
        "shared" is stacked, with one A of gate and up and one B of down for all experts, as all the others have, too.
    """
    model = mixture(family)
    generator = torch.Generator().manual_seed(seed)
    gate_name, up_name, down_name = _OLD_NAMES.get(family, ("gate_proj", "up_proj", "down_proj"))
    files: dict[str, dict[str, Tensor]] = {form: {} for form in ("fused", "single", "stacked", "shared")}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    for name, module in experts_of(model).items():
        held: Any = module
        count = held.down_proj.shape[0]
        columns = 1 if getattr(held, "is_transposed", True) else 2
        features, width = held.gate_up_proj.shape[columns], held.down_proj.shape[columns]
        factors = {
            gate_name: (draw(1, RANK, features).expand(count, -1, -1), draw(count, width, RANK)),
            up_name: (draw(1, RANK, features).expand(count, -1, -1), draw(count, width, RANK)),
            down_name: (draw(count, RANK, width), draw(1, features, RANK).expand(count, -1, -1)),
        }
        prefix = f"base_model.model.{name}"
        for projection, (a, b) in factors.items():
            files["stacked"] |= {f"{prefix}.{projection}.lora_A.weight": a, f"{prefix}.{projection}.lora_B.weight": b}
            once = (a, b[:1]) if projection == down_name else (a[:1], b)
            for factor, value in zip("AB", once, strict=True):
                files["shared"][f"{prefix}.{projection}.lora_{factor}.weight"] = value
            for expert in range(count):
                key = f"{prefix}.{expert}.{projection}"
                files["single"] |= {f"{key}.lora_A.weight": a[expert], f"{key}.lora_B.weight": b[expert]}
        (gate_a, gate_b), (up_a, up_b), (down_a, down_b) = factors.values()
        a = torch.cat((gate_a, up_a), 1)
        b = torch.zeros(count, 2 * width, 2 * RANK)
        if getattr(held, "is_concatenated", True):
            b[:, :width, :RANK], b[:, width:, RANK:] = gate_b, up_b
        else:
            b[:, ::2, :RANK], b[:, 1::2, RANK:] = gate_b, up_b
        files["fused"] |= _as_peft(f"{prefix}.base_layer", a, b, swaps=not hasattr(held, "is_transposed"))
        files["fused"] |= _as_peft(prefix, down_a, down_b, swaps=not hasattr(held, "is_transposed"))
    folders = {form: folder / form for form in files}
    for form, tensors in files.items():
        config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": []}
        if form == "fused":
            config["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
            # Of the same scaling.
            config["rank_pattern"] = {r".*\.gate_up_proj": 2 * RANK}
            config["alpha_pattern"] = {r".*\.gate_up_proj": 2 * ALPHA}
        else:
            config["target_modules"] = [gate_name, up_name, down_name]
        folders[form].mkdir(parents=True)
        (folders[form] / "adapter_config.json").write_text(json.dumps(config))
        save_file(
            {key: value.contiguous().clone() for key, value in tensors.items()},
            folders[form] / "adapter_model.safetensors",
        )
    return folders


def _as_peft(prefix: str, a: Tensor, b: Tensor, *, swaps: bool) -> dict[str, Tensor]:
    if swaps:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return {
        f"{prefix}.lora_A.weight": a.reshape(-1, a.shape[2]),
        f"{prefix}.lora_B.weight": b.permute(1, 2, 0).reshape(b.shape[1], -1),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT does not count parameters among what a pattern names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
        warnings.filterwarnings("ignore", "The following alpha_pattern keys", RuntimeWarning)
        yield


def logits_by_peft(family: str, folder: Path | None, tokens: Tensor) -> Tensor:
    """Return what PEFT computes for one adapter alone, or the base model without one."""
    model: Any = mixture(family)
    if folder is not None:
        with _quiet():
            model = PeftModel.from_pretrained(model, folder).eval()
    return logits(model, tokens)


def token_ids() -> Tensor:
    """Tokens for four sequences."""
    return torch.randint(1, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(7))


def logits(model: Any, tokens: Tensor) -> Tensor:
    """What a model computes, without gradients."""
    with torch.no_grad():
        result: Tensor = model(tokens).logits
    return result


def assert_rows(got: Tensor, wanted: dict[str | None, Tensor], names: list[str | None]) -> None:
    """Assert that each row is that of the adapter of its name."""
    for row, name in enumerate(names):
        torch.testing.assert_close(got[row], wanted[name][row], atol=2e-6, rtol=1e-5, msg=f"row {row}, {name}")
