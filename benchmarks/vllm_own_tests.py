"""vLLM's own LoRA tests, run on the plugin's wrapper: `python -m benchmarks.vllm_own_tests FOLDER 0.32.0 0.33.0`.

The tests are taken from the source distributions of vLLM into the folder; nothing of them is in this repository. They
run in an environment that has vLLM for a CPU and pytest, on the Python files of their own release: `vllm_release.py`
says what stands in for the compiled part of a release that is not installed. What is adapted:

- the plugin is registered before the first test, as vLLM itself does it in a server;
- the sweep of punica ops calls Triton kernels: here it calls the wrapper's `add_shrink` and `add_expand`, for every
  fourth of its cases (`--every 1` for all);
- the question whether a layer has vLLM's wrapper is whether it has ours;
- where layers have not prepared their weights for vLLM's product on a CPU, it is torch's;
- adapters of the hub are a local one that has the rank, alpha and modules that the tests expect; the worker is a CPU's,
  and its model a small random Qwen3. What needs another file of the hub is skipped;
- a package that the tests import, but do not use here, is an empty module where it is missing.

A test that fails is run again with vLLM's own wrapper: what fails there, too, is no failure of the plugin.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.vllm_release import importable, installed, sources

# Of `tests/lora`: those that need no GPU and no model of the hub.
FILES = ["layers", "layers_utils", "lora_manager", "lora_utils", "lora_weights", "peft_helper", "punica_ops"]
FILES += ["resolver", "utils", "worker"]
RESULTS, EVERY = "VLLM_OWN_TESTS_RESULTS", "VLLM_OWN_TESTS_EVERY"

Outcomes = dict[str, str]


def main() -> None:
    """Run the tests of each release, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for what is got from the registry; it is kept")
    parser.add_argument("versions", nargs="+", help="releases of vLLM")
    parser.add_argument("--every", type=int, default=4, help="run each nth case of the sweep of punica ops")
    parser.add_argument("--files", nargs="*", default=FILES, help=f"of {', '.join(FILES)}")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print("| vLLM | test file | passed | failed | of these without the plugin, too | skipped |")
    print("|---|---|---|---|---|---|")
    for version in options.versions:
        files = [f"tests/lora/test_{name}.py" for name in options.files]
        outcomes = _run(version, files, folder, options.every)
        failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
        stock = _run(version, failed, folder, options.every, XPU_LORA_VLLM="0") if failed else {}
        for file in files:
            count = Counter(outcome for test, outcome in outcomes.items() if test.startswith(file))
            too = sum(test.startswith(file) and outcome == "failed" for test, outcome in stock.items())
            cells = (version, Path(file).name, count["passed"], count["failed"], too, count["skipped"])
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _run(version: str, tests: list[str], folder: Path, every: int, **environment: str) -> Outcomes:
    """What became of each test, in a process of its own."""
    # The tests import `tests.utils`: a folder that has them and not the sources of vLLM beside them.
    root = folder / f"tests-{version}"
    root.mkdir(exist_ok=True)
    if not (root / "tests").exists():
        (root / "tests").symlink_to(sources(version, folder) / "tests")
    paths = [str(root), str(Path(__file__).parents[1])]
    if version != _installed_version():
        paths.insert(0, str(importable(version, folder)))
    log = folder / f"log-{version}{'-stock' if environment else ''}.txt"
    with tempfile.TemporaryDirectory() as scratch, log.open("a") as file:
        results = Path(scratch, "results.json")
        environment |= {"PYTHONPATH": os.pathsep.join(paths), RESULTS: str(results), EVERY: str(every)}
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": scratch}
        options = ["-q", "-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider", "-p", __spec__.name]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        done = subprocess.run(command, cwd=root, env=os.environ | environment, stdout=file, stderr=file)  # noqa: S603
        if not results.exists():
            raise SystemExit(f"benchmarks.vllm_own_tests: pytest ended with {done.returncode}: read {log}.")
        outcomes: Outcomes = json.loads(results.read_text())
        return outcomes


def _installed_version() -> str:
    text = (installed() / "_version.py").read_text()
    return text.split("__version__ = version = '")[1].split("'")[0]


# What follows is pytest's plugin in the process that runs the tests.

_outcomes: Outcomes = {}


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
    """Adapt the modules of the tests, and thin the sweep out."""
    for module in {item.module for item in items}:
        if module.__name__.endswith("test_punica_ops"):
            module.triton_ops = _OnTheWrapper(module.triton_ops)
            module.torch.accelerator.set_device_index = lambda _: None
        if module.__name__.endswith("test_layers") and os.environ.get("XPU_LORA_VLLM") != "0":
            wrapper = importlib.import_module("xpu_lora_compile.integrations.vllm_punica").XpuLoraPunicaWrapper
            module.check_punica_wrapper = lambda made, wrapper=wrapper: type(made) is wrapper
        if module.__name__.endswith("test_worker"):
            module.Worker = importlib.import_module("vllm.v1.worker.cpu_worker").CPUWorker
            module.MODEL_PATH = _small_model()
    sweep = [item for item in items if item.originalname in ("test_kernels", "test_kernels_hidden_size")]
    left_out = {id(item) for number, item in enumerate(sweep) if number % int(os.environ[EVERY])}
    items[:] = [item for item in items if id(item) not in left_out]


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


if __name__ == "__main__":
    main()
