"""`xpu-lora bench model --base`: a base model that the real libraries have quantized, next to itself and PEFT."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.quantized_models import library
from torch import nn

from xpu_lora_compile.bench import model, quantized
from xpu_lora_compile.errors import BenchError

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


def linears(base: str) -> nn.Module:
    made = nn.ModuleDict({"up": nn.Linear(64, 128), "lm_head": nn.Linear(128, 64)})
    quantized.quantize(made.requires_grad_(False), base)
    return made


@pytest.mark.parametrize("base", LIBRARIES)
def test_all_but_the_head_is_quantized_and_computes_about_the_same(base: str) -> None:
    library(LIBRARIES[base])
    torch.manual_seed(0)
    plain = linears(quantized.PLAIN)
    torch.manual_seed(0)
    made: Any = linears(base)
    x = torch.randn(3, 64)
    assert type(made["lm_head"].weight) is nn.Parameter
    assert (type(made["up"]), type(made["up"].weight)) != (nn.Linear, nn.Parameter)
    wanted, got = plain["up"](x), made["up"](x)
    assert 0 < (got - wanted).abs().max() < 0.2 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_model_is_timed_next_to_itself_and_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    library("bitsandbytes")
    torch._dynamo.reset()
    monkeypatch.setattr(model, "SMOLLM2", model.SMOLLM2 | TINY)
    monkeypatch.setattr(model, "fresh_cache", nullcontext)
    ran = model.run("float32", 3, 3, 2, 2, 1, 2, "nf4", lambda _: None)
    assert "nf4 weights" in ran.what
    assert ran.summary["logits: greatest difference from PEFT's / greatest logit"] < 1e-4


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BenchError, match="pip install bitsandbytes"):
        linears("nf4")
