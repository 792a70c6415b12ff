"""Which modules the rules of `attach` find, and which of them are refused."""

from __future__ import annotations

import pytest
import torch
from support.peft_folders import tiny_llama
from torch import nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import AttachError


def test_all_linear_leaves_out_the_output_embedding() -> None:
    bank = xlc.attach(tiny_llama())
    assert {name.rsplit(".", 1)[-1] for name in bank.sites} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize(
    ("target", "exclude", "found"),
    [
        (["layers.0.self_attn.q_proj"], (), {"model.layers.0.self_attn.q_proj"}),
        (r"model\.layers\.1\..*[kv]_proj", (), {"model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"}),
        (["q_proj"], ["layers.0.self_attn.q_proj"], {"model.layers.1.self_attn.q_proj"}),
        (["q_proj", "lm_head", "embed_tokens"], r".*layers.*", {"lm_head", "model.embed_tokens"}),
    ],
    ids=["list", "regex", "exclude", "vocabulary"],
)
def test_modules_are_found_by_pefts_rules(target: object, exclude: object, found: set[str]) -> None:
    assert set(xlc.attach(tiny_llama(), target_modules=target, exclude_modules=exclude).sites) == found


def hooked(model: nn.Module) -> nn.Module:
    """A forward on the instance, as accelerate puts it there."""
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    return model


def quantized(model: nn.Module) -> nn.Module:
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        (TwoNames(), "all-linear", r"first is second.*exclude_modules=\['first'\]"),
        (nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), ["0"], r"0 \(Embedding\) with max_norm"),
        (tiny_llama(), ["c_attn"], r"names of modules such as .*q_proj.* which matches nothing"),
        (tiny_llama(), ["self_attn"], r"self_attn \(LlamaAttention\)"),
        (Odd(), "all-linear", r"attention.out_proj \(NonDynamicallyQuantizableLinear\)"),
        (Odd(), ["norm"], r"norm \(LayerNorm\)"),
        (hooked(tiny_llama()), "all-linear", r"layers.0.self_attn.q_proj \(Linear\)"),
        (quantized(tiny_llama()), "all-linear", r"q_proj \(Linear\) with a weight of torch.int8"),
    ],
    ids=["two-names", "max-norm", "nothing", "container", "attention", "norm", "hooked", "quantized"],
)
def test_what_cannot_carry_lora_is_refused(model: nn.Module, target: str | list[str], message: str) -> None:
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(AttachError, match=message):
        xlc.attach(model, target_modules=target)
    assert [type(module) for module in model.modules()] == kinds


class Unsized(nn.Module):
    """A linear layer that does not say its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kernel.T


def test_a_model_without_any_layer_for_lora_is_refused() -> None:
    with pytest.raises(AttachError, match=r"Sequential, which has none\. .*linear_classes="):
        xlc.attach(nn.Sequential(Unsized()))


def test_a_declared_class_without_sizes_is_refused() -> None:
    model = nn.Sequential(Unsized(), nn.Linear(3, 2))
    with pytest.raises(AttachError, match=r"got 0 \(Unsized\) without them\. .*exclude_modules=\['0'\]"):
        xlc.attach(model, linear_classes=[Unsized])
    assert set(xlc.attach(model, linear_classes=[Unsized], exclude_modules=["0"]).sites) == {"1"}
