"""Families of models in vLLM's engine: adapters on all linear layers, two of them and base rows in one batch.

Mixtures of experts are in test_experts.py; audio and images in test_encoders.py.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from typing import Any

import pytest
from integrations.conftest import Engine
from integrations.served import Served, started

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 515}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# By transformers' names, with what each has besides; windows are shorter than two of the three prompts.
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32},
    "Mistral": {"sliding_window": 12},
    "Phi3": {"sliding_window": 12},
    "Gemma3": {"head_dim": 32, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    import transformers

    name = request.param
    kind = f"{name}Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**(SIZES | FAMILIES[name]))
    # PEFT's own choice of layers; those of attention alone; and one linear layer of all.
    adapters = {
        "all": "all-linear",
        "attention": r".*self_attn\.\w+_proj",
        "one": r".*layers\.1\.self_attn\.o_proj",
    }
    options = {adapter: {"target_modules": modules} for adapter, modules in adapters.items()}
    return Served(getattr(transformers, f"{name}ForCausalLM")(config), options, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def engine(served: Served) -> Iterator[Engine]:
    from vllm import ModelRegistry

    # A class that is there already is not looked at in a process of its own, which would import vLLM again.
    (name,) = json.loads((served.folder / "config.json").read_text())["architectures"]
    ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    made = started(served)
    yield made
    # vLLM's state is one for the process, and the next engine has its own.
    made.llm.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.mark.parametrize("pair", [("all", "attention"), ("one", "all")], ids="-".join)
def test_every_row_is_its_adapters(served: Served, engine: Engine, pair: tuple[str, str]) -> None:
    """Both slots are taken."""
    assert served.differing(engine, served.rows(None, *pair)) == []
    assert served.differing(engine, served.rows(pair[1], None)) == []
