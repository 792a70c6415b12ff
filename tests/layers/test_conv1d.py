"""LoRA on `Conv1D` of transformers: sizes are those of a linear layer, and a wrong adapter is refused by them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import quantized_models as models
from support.peft_folders import save_adapter
from transformers.pytorch_utils import Conv1D

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import AdapterShapeError
from xpu_lora_compile.layers import host_of


def test_its_weight_is_transposed_and_its_sizes_are_not() -> None:
    conv = Conv1D(5, 6)
    host = host_of(conv)
    assert host is not None
    assert host.name == "Conv1D"
    assert (host.site(conv).in_features, host.site(conv).out_features) == (6, 5)


def test_all_linear_covers_it(tmp_path: Path) -> None:
    bank = xlc.attach(models.gpt2())
    assert {name.rsplit(".", 1)[-1] for name in bank.sites} == {"c_attn", "c_proj", "c_fc"}


def test_an_adapter_of_other_sizes_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, model=models.gpt2(), target_modules=["c_fc"])
    other = models.transformers.GPT2LMHeadModel(
        models.transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=70, bos_token_id=0, eos_token_id=0)
    )
    with pytest.raises(AdapterShapeError, match=r"shape \[4, 16\]; got shape \[4, 32\]"):
        xlc.attach(other, target_modules=["c_fc"]).load("a", folder)
