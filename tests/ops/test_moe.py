"""`moe_lora_linear`: pairs of tokens and experts, next to the reference; what is out of range; gradients; errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.cases import DEVICE
from torch import Tensor
from torch.autograd import gradcheck

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import DtypeError, ShapeError
from xpu_lora_compile.ops.budget import budget_of

SLOTS, EXPERTS, PAGES, RANK, FEATURES, WIDTH = 3, 5, 7, 4, 9, 11


def operands(seed: int, rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Rows of all kinds: without a slot, without an expert, of experts that their adapter has nothing for."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.randperm(SLOTS * EXPERTS, generator=draw).view(SLOTS, EXPERTS)
    a = torch.randn(PAGES, RANK, FEATURES, generator=draw, dtype=torch.float64)
    b = torch.randn(PAGES, WIDTH, RANK, generator=draw, dtype=torch.float64)
    return {
        "base": torch.randn(rows, WIDTH, generator=draw).to(DEVICE, dtype),
        "inputs": torch.randn(rows, FEATURES, generator=draw).to(DEVICE, dtype),
        "lora_a": [a.to(DEVICE, dtype)],
        "lora_b": [b.to(DEVICE, dtype)],
        "lora_indices_tensor": torch.randint(-2, SLOTS + 2, (rows,), generator=draw).to(DEVICE),
        "expert_indices_tensor": torch.randint(-1, EXPERTS + 1, (rows,), generator=draw).to(DEVICE),
        # A page from P on is none.
        "expert_pages": table.to(DEVICE),
        "slice_offsets": [0],
    }


def pages_in_use(args: dict[str, Any]) -> set[int]:
    table = args["expert_pages"].tolist()
    pairs = zip(args["lora_indices_tensor"].tolist(), args["expert_indices_tensor"].tolist(), strict=True)
    return {table[slot][expert] for slot, expert in pairs if 0 <= slot < SLOTS and 0 <= expert < EXPERTS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_10000_rows_are_those_of_the_reference_whatever_is_in_other_pages(dtype: torch.dtype) -> None:
    for seed, rows in enumerate((1, 2, 0, 31, 300, 2000, 7666)):
        args = operands(seed, rows, dtype)
        if not rows:
            assert xlc.moe_lora_linear(**args).shape == (0, WIDTH)
            continue
        budget = budget_of("moe_lora_linear", args)
        for page in set(range(PAGES)) - pages_in_use(args):
            args["lora_a"][0][page] = args["lora_b"][0][page] = torch.nan
        budget.check(xlc.moe_lora_linear(**args), torch.ones(rows, WIDTH, dtype=torch.bool))


def test_rows_without_a_page_are_those_of_base() -> None:
    args = operands(0, 64)
    result = xlc.moe_lora_linear(**args)
    table, changed = args["expert_pages"].tolist(), 0
    for t, (slot, expert) in enumerate(
        zip(args["lora_indices_tensor"].tolist(), args["expert_indices_tensor"].tolist(), strict=True)
    ):
        has_page = 0 <= slot < SLOTS and 0 <= expert < EXPERTS and table[slot][expert] < PAGES
        assert torch.equal(result[t], args["base"][t]) != has_page
        changed += has_page
    assert 0 < changed < 64


def test_all_experts_of_all_slots_are_a_view() -> None:
    args = operands(1, 40)
    dense_a = torch.randn(SLOTS, EXPERTS, RANK, FEATURES, device=DEVICE)
    dense_b = torch.randn(SLOTS, EXPERTS, WIDTH, RANK, device=DEVICE)
    table = torch.arange(SLOTS * EXPERTS, device=DEVICE).view(SLOTS, EXPERTS)
    args |= {"lora_a": [dense_a.flatten(0, 1)], "lora_b": [dense_b.flatten(0, 1)], "expert_pages": table}
    got = xlc.moe_lora_linear(**args)
    for t in range(40):
        slot, expert = int(args["lora_indices_tensor"][t]), int(args["expert_indices_tensor"][t])
        if 0 <= slot < SLOTS and 0 <= expert < EXPERTS:
            wanted = args["base"][t] + dense_b[slot, expert] @ (dense_a[slot, expert] @ args["inputs"][t])
            torch.testing.assert_close(got[t], wanted, atol=1e-4, rtol=1e-4)


def test_compiled_it_is_one_lora_call_with_the_same_numbers() -> None:
    args = operands(2, 33)
    tensors = {name: value for name, value in args.items() if name != "slice_offsets"}

    def call(given: dict[str, Any]) -> Tensor:
        return xlc.moe_lora_linear(**given, slice_offsets=[0])

    with xlc.record_decisions() as decisions:
        got = torch.compile(call, backend="xpu_lora", fullgraph=True)(tensors)
    assert len(decisions) == 1
    torch.testing.assert_close(got, call(tensors), atol=1e-5, rtol=1e-5)


def test_gradients_reach_what_a_row_uses() -> None:
    args = operands(3, 6)
    a, b = (args[name][0].double().requires_grad_() for name in ("lora_a", "lora_b"))
    inputs, base = (args[name].double().requires_grad_() for name in ("inputs", "base"))
    indices = [args[name] for name in ("lora_indices_tensor", "expert_indices_tensor", "expert_pages")]

    def call(base: Tensor, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return xlc.moe_lora_linear(base, inputs, [a], [b], *indices, [0])

    assert gradcheck(call, (base, inputs, a, b))


def test_bad_indices_are_refused_with_a_remedy() -> None:
    args = operands(4, 6)
    with pytest.raises(ShapeError, match=re.escape("slots [T], experts [T] and pages [K, E]")):
        xlc.moe_lora_linear(**args | {"expert_indices_tensor": args["expert_indices_tensor"].view(3, 2)})
    with pytest.raises(ShapeError, match="repeat_interleave"):
        xlc.moe_lora_linear(**args | {"expert_pages": args["expert_pages"].flatten()})
    with pytest.raises(DtypeError, match=re.escape("torch.float32. Call .long() on it")):
        xlc.moe_lora_linear(**args | {"expert_pages": args["expert_pages"].float()})
