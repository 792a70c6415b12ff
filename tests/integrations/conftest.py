"""vLLM's real engine on a CPU, with layers of SmolLM2 and of the example's adapters. Collected where vLLM is installed.

A few of the layers; `test_processes.py` runs the example, which has all.
"""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

_CACHE = tempfile.TemporaryDirectory(prefix="xpu-lora-vllm-", ignore_cleanup_errors=True)
# Before vLLM is imported, and for the processes that it starts. One thread an engine: threads that wait for each other
# by spinning take a hundred times as long as soon as anything else runs on the machine's cores.
if find_spec("vllm"):
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": _CACHE.name,
        "OMP_NUM_THREADS": "1",
        # Otherwise two processes that share a model each ask for a NUMA node.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }

NEW_TOKENS = 20
# Of 30.
LAYERS = 6


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What vLLM, transformers and PEFT warn of is not ours to mend."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Questions as tokens; the first is longer than an engine here takes in one step."""
    import smollm2

    tokenizer = smollm2.load_tokenizer()
    questions = ["Tell me about the sea, and all that is in it. " * 8, "Tell me about the sea.", "What is tea?"]
    return [tokenizer(smollm2.chat_prompt(tokenizer, question))["input_ids"] for question in questions]


@pytest.fixture(scope="session")
def peft_tokens(prompts: list[list[int]], padded_model: Path) -> dict[tuple[str | None, int], list[int]]:
    """What PEFT decodes greedily with one adapter alone, of each adapter, or none, and each prompt's number."""
    import torch
    from peft import PeftModel
    from support.first_layers import first_layers

    folders = adapters_in(padded_model)
    model: Any = PeftModel.from_pretrained(first_layers(LAYERS), folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    # Past the end of an answer, too: a least number of tokens would keep the end from being chosen.
    model.generation_config.eos_token_id = model.base_model.model.generation_config.eos_token_id = None
    length = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    tokens = {}
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with model.disable_adapter():
            tokens[None, number] = model.generate(**inputs, **length)[0, len(prompt) :].tolist()
        for folder in folders:
            model.set_adapter(folder.name)
            tokens[folder.name, number] = model.generate(**inputs, **length)[0, len(prompt) :].tolist()
    # Every adapter shows, and none is another.
    assert len({tuple(row) for row in tokens.values()}) == len(tokens)
    return tokens


def adapters_in(model: Path) -> list[Path]:
    """The folders of the adapters that are saved in a model's folder."""
    return sorted(file.parent for file in model.glob("*/adapter_config.json"))


@pytest.fixture(scope="session")
def padded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with 49153 tokens, as a pad token makes it: vLLM pads its logits to 49216 columns. And its adapters."""
    import smollm2
    import torch
    from serve_many_adapters import ADAPTERS
    from support.first_layers import first_layers, save_first_layers

    folder = tmp_path_factory.mktemp("smollm2")
    for adapter in ADAPTERS.iterdir():
        save_first_layers(adapter, folder / adapter.name, LAYERS, strength=6)
    model = first_layers(LAYERS)
    model.resize_token_embeddings(smollm2.ORIGINAL_VOCAB + 1, mean_resizing=False)
    embedding = model.model.embed_tokens.weight
    with torch.no_grad():
        # Of the added token: never above the largest of the others.
        embedding[smollm2.ORIGINAL_VOCAB :] = embedding[: smollm2.ORIGINAL_VOCAB].mean(dim=0)
    model.save_pretrained(folder)
    smollm2.load_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers and 515 tokens, whose heads two processes can share, and three adapters in it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from xpu_lora_compile.bench.layer import peft_adapters

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 515}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))
    model.save_pretrained(folder)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft_adapters(model, folder, [*linears, "lm_head", "embed_tokens"], 4, 3)
    return folder


@pytest.fixture(scope="session")
def engine(padded_model: Path) -> Engine:
    """Two slots, two adapters in memory; prompts in pieces, prefixes cached; compiled, as by default."""
    from torch._dynamo.utils import counters
    from vllm.compilation.counter import compilation_counter

    import xpu_lora_compile as xlc

    # Other engines of this process may have been compiled before.
    before, compiled = counters["stats"]["unique_graphs"], compilation_counter.num_aot_compiles
    with xlc.record_decisions() as decisions:
        made = Engine(
            padded_model,
            max_loras=2,
            max_cpu_loras=2,
            max_lora_rank=8,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            block_size=32,
        )
    made.decisions, made.graphs = decisions, counters["stats"]["unique_graphs"] - before
    made.compilations = compilation_counter.num_aot_compiles - compiled
    return made


class Engine:
    """An engine of vLLM in this process, greedy, in float32."""

    # Of its compilation, how many graphs that were, and how many vLLM counts.
    decisions: list[Any]
    graphs: int
    compilations: int

    def __init__(self, model: Path, **options: Any) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        defaults = {"dtype": "float32", "max_model_len": 256, "enable_lora": True, "skip_tokenizer_init": True}
        self.llm = LLM(model=str(model), **(defaults | options))
        self.requests = {
            folder.name: LoRARequest(folder.name, number, str(folder))
            for number, folder in enumerate(adapters_in(model), start=1)
        }

    @property
    def runner(self) -> Any:
        """vLLM's model runner."""
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    def generate(self, rows: list[tuple[str | None, list[int]]], **sampling: Any) -> list[Any]:
        """One output for each row: an adapter's name, or none, and a prompt."""
        from vllm import SamplingParams

        length = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "detokenize": False}
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in rows],
            SamplingParams(**(length | sampling)),
            lora_request=[self.requests.get(name or "") for name, _ in rows],
            use_tqdm=False,
        )

    def tokens(self, rows: list[tuple[str | None, list[int]]]) -> list[list[int]]:
        """Of each row."""
        return [list(one.outputs[0].token_ids) for one in self.generate(rows)]
