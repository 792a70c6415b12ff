"""Tiny models of each family of linear layers, quantized by the real libraries if they are there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support.peft_folders import tiny_llama
from torch import nn

Make = Callable[[], nn.Module]


def library(name: str) -> Any:
    """The library; skips the test where it is not installed, as it is for `tox -e quantized`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed: python3 -m tox -e quantized")


def seeded(make: Make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # bitsandbytes has another kernel where a gradient is asked for.
        return make().eval().requires_grad_(False)


def llama(**overrides: Any) -> nn.Module:
    # Sizes that blocks of 64 numbers go into.
    return tiny_llama(hidden_size=64, intermediate_size=128, **overrides)


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Put another module in the place of each linear layer but the head."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, make(module))
    return model.eval()


def bnb_4bit(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    nf4 = library("bitsandbytes").nn.Linear4bit

    def quantize(module: nn.Linear) -> nn.Module:
        made = nf4(module.in_features, module.out_features, bias=False, quant_type="nf4", **options)
        made.load_state_dict(module.state_dict())
        return made.to("cpu")

    model = replaced(llama().to(dtype), quantize)
    model.is_loaded_in_4bit = True
    return model


def bnb_8bit(threshold: float = 0.0) -> nn.Module:
    int8 = library("bitsandbytes").nn.Linear8bitLt

    def quantize(module: nn.Linear) -> nn.Module:
        made = int8(module.in_features, module.out_features, bias=False, has_fp16_weights=False, threshold=threshold)
        made.load_state_dict(module.state_dict())
        return made.to("cpu")

    model = replaced(llama(), quantize)
    model.is_loaded_in_8bit = True
    return model


def torchao(config: Callable[[Any], Any]) -> Make:
    def make() -> nn.Module:
        ao, model = library("torchao.quantization"), llama()
        ao.quantize_(model, config(ao), filter_fn=lambda module, name: type(module) is nn.Linear and name != "lm_head")
        return model

    return make


def hqq() -> nn.Module:
    quantize = library("hqq.core.quantize")

    def made(module: nn.Linear) -> nn.Module:
        config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
        layer: nn.Module = quantize.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
        return layer

    return replaced(llama(), made)


def compressed() -> nn.Module:
    """The forward of each module is replaced by one that quantizes the weight and calls that of the class."""
    quantization, model = library("compressed_tensors.quantization"), llama()
    weights = quantization.QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    config = quantization.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.detach().abs().amax(1, keepdim=True) / 127)
    return model


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=70, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def falcon() -> nn.Module:
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=70, bos_token_id=0, eos_token_id=0
    )
    return transformers.FalconForCausalLM(config)


def gemma3() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 70, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **heads, pad_token_id=0))


def bart() -> nn.Module:
    sizes = {"d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "vocab_size": 70, "max_position_embeddings": 64}
    heads = {"decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48}
    return transformers.BartForCausalLM(transformers.BartConfig(**sizes, **heads, scale_embedding=True))
