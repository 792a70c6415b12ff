"""The examples run, say what they should, and the real model's compiled graph is what we claim it is."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path

import cross_compile_xpu
import padded_vocab
import pytest
import recompiles
import serve_many_adapters
import smollm2
import torch
import train_adapters
import train_many
from safetensors import safe_open
from support.first_layers import first_layers, save_first_layers
from torch._inductor.utils import run_and_get_code

import xpu_lora_compile as xlc

ADAPTERS = Path(serve_many_adapters.ADAPTERS)


@pytest.fixture(autouse=True)
def _library_warnings() -> object:
    """What transformers and PEFT warn of is for the reader of the example."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.set_stance("default")


def test_the_padded_vocabulary_is_settled_while_compiling(capsys: pytest.CaptureFixture[str]) -> None:
    assert padded_vocab.main() == 0
    printed = capsys.readouterr().out
    assert "slice_size: wanted 51865" in printed
    assert "bgmv_expand.default](args = (%logits, %rank_vectors" in printed
    assert "native_add_lora.default](args = ([%logits], %l_hidden_" in printed
    assert "51865 < 51904" in printed
    assert "padded columns untouched: True" in printed


def test_the_graph_for_an_intel_gpu_is_printed_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cross_compile_xpu.main() == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Nothing of this has run on an Intel GPU")
    with_wheel, without = printed.split("== with what is installed")
    # Packed qkv is two calls of the vendor's, and lm_head two; what indices are there is asked once.
    assert (with_wheel.count("_xpu_C.lora_shrink("), with_wheel.count("_xpu_C.lora_expand(")) == (2, 2)
    assert with_wheel.count("= xpu_lora.valid_slots(") == with_wheel.count("aten.masked_fill") == 1
    assert "51865 < 51904" in with_wheel
    assert "kernel vendor is not used" not in with_wheel
    assert "_xpu_C" not in without
    assert "lower: kernel vendor is not used: vllm-xpu-kernels is not installed" in without
    # As calls; folders may have any name.
    for copying in ("clone(", "contiguous(", "copy_("):
        assert copying not in printed


def test_a_forced_kernel_keeps_the_vendors_ops_out_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with xlc.force_kernel("gather"):
        assert cross_compile_xpu.main() == 0
    printed = capsys.readouterr().out
    assert "_xpu_C" not in printed
    assert printed.count("lower: kernel vendor is not used: gather was forced") == 4


def test_explain_says_what_an_intel_gpu_would_run_and_why() -> None:
    block, arguments = cross_compile_xpu.block, cross_compile_xpu.operands
    with cross_compile_xpu.without_memory():
        with cross_compile_xpu.wheel():
            report = xlc.explain(block, bandwidth=500)(*arguments())
        assert {site.kernel for site in report.sites} == {"vendor"}
        assert "Runs on kernel vendor: it is the first that takes this call." in str(report)
        report = xlc.explain(block, bandwidth=500)(*arguments())
    assert "vendor" not in {site.kernel for site in report.sites}
    assert "kernel vendor is not used: vllm-xpu-kernels is not installed" in str(report)


# Of 30. The whole model is for the tox leg `demo`, and for test_smollm2.py.
LAYERS = 2


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, list[str]]:
    """The main example, of a few layers: its exit status, what it printed, and the code that Inductor generated."""
    torch._dynamo.reset()
    adapters = tmp_path_factory.mktemp("adapters")
    for adapter in ADAPTERS.iterdir():
        save_first_layers(adapter, adapters / adapter.name, LAYERS, strength=20)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("COLUMNS", "120")
        from rich.console import Console

        recorder = Console(record=True, width=120)
        patch.setattr(serve_many_adapters, "Console", lambda: recorder)
        patch.setattr(serve_many_adapters, "load_model", lambda: first_layers(LAYERS))
        patch.setattr(serve_many_adapters, "ADAPTERS", adapters)
        patch.setattr(serve_many_adapters, "NEW_TOKENS", 16)
        patch.setattr(serve_many_adapters, "RUNS", 2)
        status, codes = run_and_get_code(serve_many_adapters.main)
    return status, recorder.export_text(), codes


def test_every_row_equals_peft_on_the_real_model(served: tuple[int, str, list[str]]) -> None:
    status, printed, _ = served
    assert status == 0, printed
    assert "All 4 rows equal PEFT's greedy tokens" in printed
    # Each of them others than those of its neighbours.
    answers = re.findall(r"^(?:base model|pirate|haiku|telegram): .*\n(.*)$", printed, re.MULTILINE)
    assert len(answers) == len(set(answers)) == 4
    assert f"{7 * LAYERS + 1} sites became {4 * LAYERS + 1} calls, in 1 graph." in " ".join(printed.split())
    assert "Every site reaches the output" in printed
    assert printed.count("narrower") == 1
    assert re.search(r"graphs compiled with LoRA .* 1 ", printed)


def test_the_real_models_graph_copies_nothing_for_lora(served: tuple[int, str, list[str]]) -> None:
    mixed, base = served[2]
    # Layers with four inputs each (q, k, v; o; gate, up; down), and lm_head.
    assert mixed.count("torch.ops.xpu_lora.native_add_slices.default(") == 4 * LAYERS + 1
    assert not re.search(r"xpu_lora\.(bgmv|lora_linear|shrink|expand)", mixed)
    assert "xpu_lora" not in base
    for copying in ("aten.clone", "aten.copy_", "aten._to_copy", ".contiguous("):
        assert mixed.count(copying) == base.count(copying)
    allocated = set(re.findall(r"empty_strided_cpu\(\((.*?)\)", mixed))
    assert allocated
    model = first_layers(LAYERS)
    bank = xlc.attach(model, slots=4, max_rank=8, target_modules=serve_many_adapters.TARGETS, vocab_size=49152)
    for path in bank.sites:
        layer = model.get_submodule(path)
        for stack in (layer.lora_a, layer.lora_b):
            assert ", ".join(map(str, stack.shape)) not in allocated


def test_padding_the_vocabulary_changes_no_token() -> None:
    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    prompt = tokenizer(smollm2.chat_prompt(tokenizer, "What is tea?"), return_tensors="pt")
    with torch.no_grad():
        before = model(**prompt).logits
        smollm2.pad_vocabulary(model, tokenizer)
        after = model(**prompt).logits
    assert (before.shape[-1], after.shape[-1]) == (49152, 49216)
    assert torch.equal(after[..., :49152], before)
    assert (after[..., 49152:].amax(-1) < before.amax(-1)).all()
    assert tokenizer.pad_token_id == 49152


def test_the_committed_adapters_are_small_and_hold_lora_alone() -> None:
    folders = sorted(ADAPTERS.iterdir())
    assert [folder.name for folder in folders] == ["haiku", "pirate", "telegram"]
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < 5_000_000
    for folder in folders:
        config = (folder / "adapter_config.json").read_text()
        assert json.loads(config)["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            assert all(".lora_A." in name or ".lora_B." in name for name in file.keys())  # noqa: SIM118


def test_an_adapter_can_be_trained_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train_adapters.py", "--only", "pirate", "--steps", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    train_adapters.main()
    bank = xlc.attach(smollm2.load_model(), slots=1, max_rank=8, target_modules=["q_proj", "v_proj"])
    bank.load("pirate", tmp_path / "pirate")
    assert bank.names == ("pirate",)


def test_three_styles_are_trained_in_one_batch_with_pefts_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_many.py", "--steps", "2", "--out", str(tmp_path)])
    monkeypatch.setattr(train_many, "load_model", lambda: first_layers(LAYERS))
    assert train_many.main() == 0
    assert "tokens/s" in capsys.readouterr().out
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    bank = xlc.attach(first_layers(LAYERS), adapters={name: tmp_path / name for name in train_many.RANKS})
    assert bank.names == ("pirate", "haiku", "telegram")


def test_a_thousand_assignments_of_adapters_compile_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # PEFT comes to Dynamo's limit, which is 8 and here 3, in the first batches, and runs the rest eagerly.
    pefts = recompiles.pefts
    monkeypatch.setattr(recompiles, "pefts", lambda folder, batches, tokens: pefts(folder, batches[:100], tokens))
    with torch._dynamo.config.patch(recompile_limit=3):
        assert recompiles.main() == 0
    rows = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    counts = {name.split(",")[0].strip(): (int(graphs), int(without)) for name, graphs, without in rows}
    assert counts["xpu-lora-compile"] == (1, 0)
    graphs, without = counts["PEFT"]
    assert graphs == 3
    assert without > 80
