"""LoRA on routers, which choose experts by each row's own adapter: next to PEFT for each adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.mixtures import (
    FAMILIES,
    RANK,
    assert_rows,
    experts_of,
    logits,
    logits_by_peft,
    mixture,
    save_fused,
    token_ids,
)
from torch import Tensor

import xpu_lora_compile as xlc


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def tokens() -> Tensor:
    return token_ids()


@pytest.mark.parametrize(
    ("family", "router"),
    [("Mixtral", "gate"), ("Qwen3Moe", "gate"), ("DeepseekV3", "gate"), ("GptOss", "router")],
)
def test_routers_choose_by_each_rows_own_adapter(family: str, router: str, tmp_path: Path, tokens: Tensor) -> None:
    parameters = [f"mlp.{router}.weight", "experts.gate_up_proj", "experts.down_proj"]
    folders = {
        name: save_fused(family, tmp_path / name, seed, target_parameters=parameters) for seed, name in enumerate("ab")
    }
    model = mixture(family)
    bank = xlc.attach(model, adapters=folders)
    assert any(name.endswith(f".{router}") for name in bank.sites)
    names: list[str | None] = ["b", None, "a", "b"]
    wanted = {name: logits_by_peft(family, folders.get(name), tokens) for name in (*"ab", None)}
    with bank.use(names):
        assert_rows(logits(model, tokens), wanted, names)
    bank.detach()
    assert torch.equal(logits(model, tokens), logits(mixture(family), tokens))


def test_what_peft_calls_all_linear_is_taken_and_compiled(tmp_path: Path, tokens: Tensor) -> None:
    """On a Mixtral PEFT adds experts and the router by itself, gate and up with twice the rank."""
    folder = save_fused("Mixtral", tmp_path, 0, target_modules="all-linear", target_parameters=None)
    model = mixture("Mixtral")
    bank = xlc.attach(model, adapters={"a": folder})
    assert {"q_proj", "gate", "gate_up_proj"} <= {name.rpartition(".")[2] for name in bank.sites}
    wanted = {name: logits_by_peft("Mixtral", folder if name else None, tokens) for name in ("a", None)}
    compiled, names = torch.compile(model, backend="xpu_lora", fullgraph=True), ["a", None, "a", None]
    with bank.use(names):
        assert_rows(logits(compiled, tokens), wanted, names)


# PEFT's own model fails on all linear layers of Llama 4: its router returns a tuple.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Llama4Text"])
def test_all_linear_of_every_family_is_pefts_in_a_mixed_batch(family: str, tmp_path: Path, tokens: Tensor) -> None:
    lora: dict[str, Any] = {"target_modules": "all-linear", "target_parameters": None}
    folders = {name: save_fused(family, tmp_path / name, seed, **lora) for seed, name in enumerate("ab")}
    model = mixture(family)
    bank = xlc.attach(model, adapters=folders)
    names: list[str | None] = ["b", None, "a", "b"]
    wanted = {name: logits_by_peft(family, folders.get(name), tokens) for name in (*"ab", None)}
    options = {"xpu_lora.execute": "eager"}
    compiled = torch.compile(model, backend="xpu_lora", fullgraph=True, options=options)
    with bank.use(names):
        assert_rows(logits(model, tokens), wanted, names)
        assert_rows(logits(compiled, tokens), wanted, names)
    # Gate and up have twice the rank of all others, and down has not.
    for experts in experts_of(model).values():
        ranks = {name: stack.shape[1] for name, stack in experts.named_buffers() if name.startswith("lora_a_")}
        assert ranks in ({}, {"lora_a_gate_up_proj": 2 * RANK, "lora_a_down_proj": RANK})


def test_a_bank_with_room_for_dora_has_plain_lora_on_routers(tmp_path: Path, tokens: Tensor) -> None:
    folder = save_fused("GptOss", tmp_path, 0, target_parameters=["mlp.router.weight"])
    model = mixture("GptOss")
    bank = xlc.attach(model, adapters={"a": folder}, use_dora=True, bias="all")
    wanted = {name: logits_by_peft("GptOss", folder if name else None, tokens) for name in ("a", None)}
    with bank.use(["a", None, "a", None]):
        assert_rows(logits(model, tokens), wanted, ["a", None, "a", None])


def test_a_new_adapter_on_all_linear_modules_leaves_routers_out(tmp_path: Path) -> None:
    folder = save_fused("Mixtral", tmp_path, 0, target_parameters=["mlp.gate.weight"])
    bank = xlc.attach(mixture("Mixtral"), adapters={"a": folder})
    bank.add("b", r=2)
    bank.trainable(["b"])
    assert not any(".gate." in name for name in bank.named_parameters("b"))
    assert bank.named_parameters("b")
