"""LoRA on experts: families of transformers, forms of files, next to PEFT for each adapter alone; pages and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.mixtures import FAMILIES, experts_of, logits_by_peft, mixture, save_forms, save_fused
from torch import Tensor

import xpu_lora_compile as xlc


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(7))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens).logits
    return result


def assert_rows(got: Tensor, wanted: dict[str | None, Tensor], names: list[str | None]) -> None:
    for row, name in enumerate(names):
        torch.testing.assert_close(got[row], wanted[name][row], atol=2e-6, rtol=1e-5, msg=f"row {row}, {name}")


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_each_row_has_its_own_adapters_experts(
    family: str, implementation: str, tmp_path: Path, tokens: Tensor
) -> None:
    folders = {name: save_fused(family, tmp_path / name, seed) for seed, name in enumerate("ab")}
    wanted: dict[str | None, Tensor] = {None: logits_by_peft(family, None, tokens)}
    wanted |= {name: logits_by_peft(family, folder, tokens) for name, folder in folders.items()}
    assert all((wanted[name] - wanted[None]).abs().max() > 1e-3 for name in "ab")
    model = mixture(family, implementation)
    bank = xlc.attach(model, adapters=folders)
    names: list[str | None] = ["b", None, "a", "b"]
    with bank.use(names):
        assert_rows(logits(model, tokens), wanted, names)
    with bank.use(["a"] * 4):
        assert_rows(logits(model, tokens), wanted, ["a"] * 4)
    plain = logits(mixture(family, implementation), tokens)
    assert torch.equal(logits(model, tokens), plain)
    bank.detach()
    assert torch.equal(logits(model, tokens), plain)


# Llama 4 turns queries and keys as complex numbers.
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
@pytest.mark.sweep
@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("Mixtral", "grouped_mm"),
        ("Qwen2Moe", "grouped_mm"),
        ("Qwen3Moe", "batched_mm"),
        ("DeepseekV3", "grouped_mm"),
        ("Olmoe", "batched_mm"),
        ("GptOss", "eager"),
        ("Llama4Text", "eager"),
    ],
)
def test_it_is_one_graph_for_all_adapters(family: str, implementation: str, tmp_path: Path, tokens: Tensor) -> None:
    folders = {name: save_fused(family, tmp_path / name, seed) for seed, name in enumerate("abc")}
    model = mixture(family, implementation)
    bank = xlc.attach(model, adapters={name: folders[name] for name in "ab"}, slots=2)
    compiled = torch.compile(model, backend="xpu_lora", fullgraph=True)
    names: list[str | None] = ["b", None, "a", "b"]
    wanted = {name: logits_by_peft(family, folders.get(name), tokens) for name in (*"abc", None)}
    with bank.use(names):
        assert_rows(logits(compiled, tokens), wanted, names)
    bank.drop("b")
    bank.load("c", folders["c"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for others in (["c", "a", None, None], ["a", "c", "c", None]):
            with bank.use(others):
                assert_rows(logits(compiled, tokens), wanted, list(others))


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_a_file_is_the_same_adapter(family: str, tmp_path: Path, tokens: Tensor) -> None:
    folders = save_forms(family, tmp_path, seed=3)
    wanted = logits_by_peft(family, folders["fused"], tokens)
    assert (wanted - logits_by_peft(family, None, tokens)).abs().max() > 1e-3
    model = mixture(family)
    bank = xlc.attach(model, adapters=folders)
    names: list[str | None] = list(folders)
    with bank.use(names):
        assert_rows(logits(model, tokens), dict.fromkeys(names, wanted), names)


def test_peft_reads_the_names_of_single_experts_as_we_do(tmp_path: Path, tokens: Tensor) -> None:
    folder = save_forms("Mixtral", tmp_path, seed=3)["single"]
    model = mixture("Mixtral")
    bank = xlc.attach(model, adapters={"a": folder})
    with bank.use(["a"] * 4):
        torch.testing.assert_close(
            logits(model, tokens), logits_by_peft("Mixtral", folder, tokens), atol=2e-6, rtol=1e-5
        )
    assert experts_of(model)
