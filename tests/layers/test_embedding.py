"""LoRA on `nn.Embedding`: a row of A for each token, as many tokens as the adapter has."""

from __future__ import annotations

import torch
from torch import nn

import xpu_lora_compile as xlc


@torch.no_grad()
def test_an_adapter_of_fewer_tokens_changes_those_alone() -> None:
    model = nn.Sequential(nn.Embedding(7, 4))
    bank = xlc.attach(model, target_modules=["0"], slots=1, max_rank=3)
    a, b = torch.ones(2, 5), torch.ones(4, 2)
    model[0].store(0, a, b)
    bank._slots[0] = "a"
    tokens = torch.tensor([[0, 4, 5, 6], [0, 4, 5, 6]])
    base = model(tokens)
    with bank.use(["a", None]):
        changed = model(tokens) - base
    expected = torch.zeros(2, 4, 4)
    expected[0, :2] = 2
    torch.testing.assert_close(changed, expected)


@torch.no_grad()
def test_a_row_without_an_adapter_keeps_its_value() -> None:
    model = nn.Sequential(nn.Embedding(7, 4))
    bank = xlc.attach(model, target_modules=["0"], slots=2, max_rank=3)
    bank._slots[1] = "a"
    for stack in (model[0].lora_a, model[0].lora_b):
        stack[0] = torch.nan
    tokens = torch.tensor([[1], [2]])
    base = model(tokens)
    with bank.use([None, "a"]):
        assert torch.equal(model(tokens), base)
