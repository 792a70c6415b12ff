"""Adapters of other kinds, made LoRA: what the bank then computes is as near to PEFT as the error says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import quantized_models as models
from support.peft_folders import loaded_by_peft, quiet, save_adapter, tiny_llama
from torch import nn

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import AdapterError, UnsupportedAdapterError

TOKENS = torch.randint(1, 70, (2, 5), generator=torch.Generator().manual_seed(3))

KINDS: dict[str, Any] = {
    "LoHa": peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj", "down_proj"]),
    "LoKr": peft.LoKrConfig(r=2, alpha=4, target_modules=["q_proj", "up_proj"]),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "MiSS": peft.MissConfig(r=4, target_modules=["q_proj", "down_proj"]),
}


def save(folder: Path, config: Any, model: nn.Module | None = None) -> Path:
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        made = peft.get_peft_model(model or tiny_llama(), config)
        for parameter in made.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_are_an_exact_conversion(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", KINDS[kind])
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    errors = xlc.convert(model, folder, tmp_path / "out", 32)
    assert errors
    assert max(errors.values()) < 1e-5
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in tiny_llama().named_modules()
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    bank = xlc.attach(model, adapters={"a": tmp_path / "out"})
    with torch.no_grad():
        wanted = loaded_by_peft(folder)(TOKENS).logits
        base = tiny_llama()(TOKENS).logits
        with bank.use(["a", None]):
            logits = model(TOKENS).logits
    assert float((wanted - base).abs().max()) > 1e-3
    torch.testing.assert_close(logits, torch.stack([wanted[0], base[1]]), atol=1e-5, rtol=1e-4)


def test_a_lower_rank_says_how_far_it_is_off(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", KINDS["LoHa"])
    by_rank = [xlc.convert(tiny_llama(), folder, tmp_path / str(rank), rank) for rank in (1, 2, 4)]
    for name in by_rank[0]:
        first, second, all_ranks = (errors[name] for errors in by_rank)
        assert 1 > first > second > 0.01
        assert all_ranks < 1e-5
    kept = xlc.convert(tiny_llama(), folder, tmp_path / "part", 0.9)
    assert all(error**2 <= 0.1 + 1e-5 for error in kept.values())


def test_a_weight_that_is_transposed_is_converted(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    folder = save(tmp_path / "a", config, models.seeded(models.gpt2))
    errors = xlc.convert(models.seeded(models.gpt2), folder, tmp_path / "out", 4)
    assert max(errors.values()) < 1e-5


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", KINDS["LoHa"])
    with pytest.raises(AdapterError, match="Load the base model again"):
        xlc.convert(tiny_llama(hidden_size=64), folder, tmp_path / "out", 4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "PEFT can convert"),
        (KINDS["LoHa"], "lower rank"),
    ],
    ids=["IA3", "a rank beyond the sizes"],
)
def test_what_cannot_be_converted_is_refused(config: Any, words: str, tmp_path: Path) -> None:
    folder, model = save(tmp_path / "a", config), tiny_llama()
    with pytest.raises(UnsupportedAdapterError, match=words):
        xlc.convert(model, folder, tmp_path / "out", 1000)
    assert not (tmp_path / "out").exists()
    assert not [name for name, _ in model.named_modules() if "base_layer" in name]


def test_lora_is_not_converted(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", target_modules=["q_proj"], init_lora_weights="pissa")
    model = tiny_llama()
    with pytest.raises(UnsupportedAdapterError, match=r"Load it as it is, with bank\.load"):
        xlc.convert(model, tmp_path / "a", tmp_path / "out", 4)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), tiny_llama().parameters(), strict=True))


def test_a_model_with_lora_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    xlc.attach(model)
    with pytest.raises(AdapterError, match=r"Call bank\.detach\(\)"):
        xlc.convert(model, tmp_path, tmp_path / "out", 4)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="save_pretrained"):
        xlc.convert(tiny_llama(), tmp_path, tmp_path / "out", 4)


def test_a_bank_that_refuses_another_kind_names_it(tmp_path: Path) -> None:
    folder = save(tmp_path, KINDS["LoKr"])
    with pytest.raises(UnsupportedAdapterError, match=r"xlc\.convert\(model, folder, out, rank\)"):
        xlc.attach(tiny_llama()).load("a", folder)
