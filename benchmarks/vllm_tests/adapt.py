"""The plugin of pytest that adapts vLLM's tests, in the process that runs them, and notes what becomes of them."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

# What the environment tells the process: where to write what became of the tests, and which part of the sweep runs.
RESULTS, EVERY = "VLLM_TESTS_RESULTS", "VLLM_TESTS_EVERY"

_outcomes: dict[str, str] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Prepare what the tests import, and register the plugin."""
    import huggingface_hub
    from torch.nn.functional import linear

    importlib.import_module("xpu_lora_compile.integrations.vllm").register()
    for name in ("anthropic", "cloudpickle", "openai", "ray", "tblib"):
        if find_spec(name) is None:
            sys.modules[name] = _Empty(name)
    layers: Any = importlib.import_module("vllm.model_executor.layers.utils")
    own = layers.cpu_unquantized_gemm
    layers.cpu_unquantized_gemm = lambda layer, x, weight, bias=None: (
        own(layer, x, weight, bias) if hasattr(layer, "cpu_linear") else linear(x, weight, bias)
    )
    hub: Any = huggingface_hub.HfApi
    hub.snapshot_download = _adapter_of_the_hub


class _Empty(ModuleType):
    """A module of which every name is a function that does nothing, or a module of such functions."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name)

    def __call__(self, *_: Any) -> None:
        """Nothing."""


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Adapt the modules of the tests, and thin the two large files out."""
    for module in {item.module for item in items}:
        if module.__name__.endswith("test_punica_ops"):
            module.triton_ops = _OnTheWrapper(module.triton_ops)
            module.torch.accelerator.set_device_index = lambda _: None
        if module.__name__.endswith("test_layers") and os.environ.get("XPU_LORA_VLLM") != "0":
            wrapper = importlib.import_module("xpu_lora_compile.integrations.vllm_punica").XpuLoraPunicaWrapper
            module.check_punica_wrapper = lambda made, wrapper=wrapper: type(made) is wrapper
        if module.__name__.endswith("test_lora_manager"):
            module.ModelConfig = functools.partial(module.ModelConfig, _small_model())
        if module.__name__.endswith("test_worker"):
            module.Worker = importlib.import_module("vllm.v1.worker.cpu_worker").CPUWorker
            module.MODEL_PATH = _small_model()
    fixtures: Any = sys.modules["tests.lora.conftest"]
    fixtures.MagicMock = functools.partial(fixtures.MagicMock, is_encoder_decoder=False)
    large = ("test_layers", "test_punica_ops")
    sweep = [item for item in items if item.module.__name__.endswith(large) and hasattr(item, "callspec")]
    left_out = {id(item) for number, item in enumerate(sweep) if number % int(os.environ[EVERY])}
    items[:] = [item for item in items if id(item) not in left_out]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> bool | None:
    """Run a coroutine, for which the tests have a plugin of their own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


def pytest_runtest_logreport(report: Any) -> None:
    """Keep the worst that became of a test's set-up, call and end."""
    order = ("passed", "skipped", "failed")
    before = _outcomes.get(report.nodeid, "passed")
    _outcomes[report.nodeid] = max(before, report.outcome, key=order.index)


def pytest_collectreport(report: Any) -> None:
    """Count a file that cannot be imported as a failure."""
    if report.failed:
        _outcomes[report.nodeid] = "failed"


def pytest_sessionfinish() -> None:
    """Hand over what became of the tests."""
    Path(os.environ[RESULTS]).write_text(json.dumps(_outcomes))


class _OnTheWrapper:
    """`vllm.lora.ops.triton_ops`, whose two LoRA kernels are methods of the wrapper that vLLM would take."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def lora_shrink(self, inputs: Any, stacks: list[Any], output: Any, mapping: Any, *rest: Any) -> None:
        """`add_shrink`, with the scaling that comes last."""
        self._wrapper(mapping, stacks).add_shrink(output, inputs, [stack.unsqueeze(1) for stack in stacks], rest[-1])

    def lora_expand(self, inputs: Any, stacks: list[Any], output: Any, mapping: Any, *_: Any, **options: Any) -> None:
        """`add_expand`."""
        widths = [stack.shape[-2] for stack in stacks]
        stacks = [stack.unsqueeze(1) for stack in stacks]
        self._wrapper(mapping, stacks).add_expand(output, inputs, stacks, widths, **options)

    def _wrapper(self, mapping: Any, stacks: list[Any]) -> Any:
        from vllm.lora.layers import LoRAMapping
        from vllm.lora.punica_wrapper import get_punica_wrapper

        slots, rows = stacks[0].shape[0], mapping.tolist()
        config = SimpleNamespace(max_loras=slots)
        wrapper = get_punica_wrapper(len(rows), len(rows), mapping.device, lora_config=config)
        adapters = [slot + 1 for slot in rows]
        wrapper.update_metadata(LoRAMapping(adapters, adapters, is_prefill=True), [*range(1, slots + 1)], slots, 512)
        return wrapper


def _adapter_of_the_hub(_: Any, repo_id: str, **__: Any) -> str:
    """A folder with an adapter of the shapes that the tests expect of this one; or the test is skipped."""
    import torch
    from safetensors.torch import save_file

    if repo_id not in ("charent/self_cognition_Alice", "jeeejeee/llama32-3b-text2sql-spider"):
        pytest.skip(f"needs {repo_id} of the hub")
    folder = Path(tempfile.mkdtemp(prefix="adapter-"))
    sizes = {"q_proj": (64, 128), "k_proj": (64, 64), "v_proj": (64, 64), "o_proj": (128, 64)}
    sizes |= {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}
    tensors = {}
    for layer in range(2):
        for name, (features, width) in sizes.items():
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, features)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(width, 8)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "bias": "none", "use_rslora": False, "use_dora": False}
    config |= {"target_modules": [*sizes, "embed_tokens", "lm_head"], "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def _small_model() -> str:
    from transformers import Qwen3Config

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    folder = tempfile.mkdtemp(prefix="qwen3-")
    Qwen3Config(**sizes, **heads, architectures=["Qwen3ForCausalLM"]).save_pretrained(folder)
    return folder
