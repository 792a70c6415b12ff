"""The real engine: every row of every batch gets its own adapter, and a row without one gets none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_the_plugin_is_in_charge(engine: Any) -> None:
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    from xpu_lora_compile.integrations.vllm_punica import XpuLoraPunicaWrapper

    wrappers = engine.runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
    assert [type(one) for one in wrappers] == [XpuLoraPunicaWrapper]
    assert all(isinstance(one, PunicaWrapperBase) for one in wrappers)


def test_every_row_equals_peft_with_its_adapter_alone(engine: Any, prompts: Any, peft_tokens: Any) -> None:
    rows = [(name, number) for number in range(len(prompts)) for name in (None, "haiku", "pirate")]
    tokens = engine.tokens([(name, prompts[number]) for name, number in rows])
    assert tokens == [peft_tokens[row] for row in rows]


# Every slot taken: what an index of -1 selects must be no adapter at all.
FULL = [("haiku", 1), (None, 1), ("pirate", 1), (None, 2)]


def test_a_base_row_is_nobody_elses_while_every_slot_is_taken(engine: Any, prompts: Any, peft_tokens: Any) -> None:
    tokens = engine.tokens([(name, prompts[number]) for name, number in FULL])
    assert tokens == [peft_tokens[row] for row in FULL]


def test_stock_vllm_0_32_answers_a_base_row_with_anothers_adapter(
    padded_model: Path, prompts: Any, peft_tokens: Any, tmp_path: Path
) -> None:
    import vllm

    from xpu_lora_compile.integrations.vllm_versions import RELEASES

    script = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from conftest import Engine
engine = Engine(Path(sys.argv[3]), max_loras=2, max_lora_rank=8, enforce_eager=True)
rows = json.loads(Path(sys.argv[4]).read_text())
Path(sys.argv[4]).write_text(json.dumps(engine.tokens(rows)))
"""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([(name, prompts[number]) for name, number in FULL]))
    here = Path(__file__).parent
    arguments = [str(here), str(here.parents[1] / "examples"), str(padded_model), str(file)]
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=os.environ | {"XPU_LORA_VLLM": "0"}, capture_output=True, text=True, timeout=300)  # noqa: S603
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Using PunicaWrapperCPU" in done.stdout + done.stderr
    haiku, base, pirate, other = json.loads(file.read_text())
    assert (haiku, pirate) == (peft_tokens["haiku", 1], peft_tokens["pirate", 1])
    if not RELEASES[vllm.__version__.split("+")[0]].base_rows_leak:
        assert [base, other] == [peft_tokens[None, 1], peft_tokens[None, 2]]
        return
    assert base != peft_tokens[None, 1]
    assert base in (haiku, pirate)
    assert other != peft_tokens[None, 2]


def test_logits_are_wider_than_the_lm_head_of_the_adapters(engine: Any, prompts: Any, peft_tokens: Any) -> None:
    processor = engine.runner.model.logits_processor
    assert processor.lora_b_stacked.shape[2] == 49153
    assert engine.runner.model.lm_head.weight.shape[0] == 49216
    config = Path(engine.requests["haiku"].lora_path) / "adapter_config.json"
    assert "lm_head" in json.loads(config.read_text())["target_modules"]
    rows = [("haiku", 1), (None, 2), ("haiku", 2)]
    assert engine.tokens([(name, prompts[number]) for name, number in rows]) == [peft_tokens[row] for row in rows]


def test_adapters_are_loaded_and_evicted_while_requests_run(engine: Any, prompts: Any, peft_tokens: Any) -> None:
    # Three adapters want two slots, and memory, so that some wait, and are read again.
    rows = [(name, number) for number in (2, 1, 2) for name in ("telegram", None, "pirate", "haiku")]
    for _ in range(2):
        tokens = engine.tokens([(name, prompts[number]) for name, number in rows])
        assert tokens == [peft_tokens[row] for row in rows]
    engine.llm.llm_engine.remove_lora(engine.requests["haiku"].lora_int_id)
    assert engine.tokens([("haiku", prompts[1])]) == [peft_tokens["haiku", 1]]


def test_a_cached_prefix_belongs_to_its_adapter(engine: Any, prompts: Any, peft_tokens: Any) -> None:
    # The long prompt came in pieces of 64 tokens; what is cached of it for one adapter is not another's.
    rows = [(name, 0) for name in ("pirate", None, "haiku")]
    assert len(prompts[0]) > 64
    outputs = engine.generate([(name, prompts[number]) for name, number in rows * 2])
    assert [list(one.outputs[0].token_ids) for one in outputs] == [peft_tokens[row] for row in rows * 2]
    assert all(one.num_cached_tokens >= 32 for one in outputs[3:])


def test_probabilities_of_a_prompt_are_its_adapters(engine: Any, prompts: Any) -> None:
    # A prompt after another, so that rows of the hidden states are not those of the sampled tokens.
    alone, mixed = (
        engine.generate(rows, prompt_logprobs=0, max_tokens=1)
        for rows in ([("haiku", prompts[2])], [(None, prompts[1]), ("haiku", prompts[2])])
    )

    def values(output: Any) -> list[float]:
        return [value for each in output.prompt_logprobs[1:] for value in [next(iter(each.values())).logprob]]

    assert values(mixed[1]) == pytest.approx(values(alone[0]), abs=1e-3)
    base = engine.generate([(None, prompts[2])], prompt_logprobs=0, max_tokens=1)[0]
    assert values(base) != pytest.approx(values(alone[0]), abs=1e-1)


def test_one_graph_serves_every_batch_that_came_before(engine: Any) -> None:
    from torch._dynamo.utils import counters
    from vllm.config import CompilationMode

    compilation = engine.llm.llm_engine.vllm_config.compilation_config
    assert compilation.mode == CompilationMode.DYNAMO_TRACE_ONCE
    assert not counters["graph_break"]
    assert engine.graphs == engine.compilations == 1
    # Of each layer qkv, o, gate and up, down; and the embedding.
    layers = engine.runner.model.config.num_hidden_layers
    assert len(engine.decisions) == layers * 4 + 1 > 20


def test_our_passes_are_in_the_key_of_vllms_caches(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compilation = engine.llm.llm_engine.vllm_config.compilation_config
    before = compilation.compute_hash()
    assert before == compilation.compute_hash()
    monkeypatch.setenv("XPU_LORA_FUEL", "3")
    assert before != compilation.compute_hash()
