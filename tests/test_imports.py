"""What an import of the package loads; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys


def modules_after(statement: str) -> set[str]:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", f"{statement}\nimport sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavier_than_torch() -> None:
    ours = modules_after("import xpu_lora_compile") - modules_after("import torch")
    top = {name.split(".")[0] for name in ours}
    assert not top & {"triton", "transformers", "peft", "accelerate", "numpy", "sympy"}
    assert not {name for name in ours if name.startswith(("torch._inductor", "torch._dynamo", "torch.fx.experimental"))}
    assert top <= {"xpu_lora_compile", "safetensors", "torch", *sys.stdlib_module_names}


def test_importing_the_package_registers_the_ops() -> None:
    statement = "import xpu_lora_compile, torch; torch.ops.xpu_lora.bgmv_expand.default; torch.ops.xpu_lora.shrink"
    assert "xpu_lora_compile.ops.bgmv" in modules_after(statement)


def test_the_ops_do_not_know_what_stands_on_them() -> None:
    loaded = modules_after("import xpu_lora_compile.ops, xpu_lora_compile.passes")
    sources = {name: sys.modules.get(name) for name in loaded if name.startswith("xpu_lora_compile")}
    assert "xpu_lora_compile.backend" not in sources


def test_the_backend_is_listed_without_being_loaded() -> None:
    statement = "import torch._dynamo.backends.registry as r; assert 'xpu_lora' in r.list_backends()"
    assert not {name for name in modules_after(statement) if name.startswith("xpu_lora_compile")}
