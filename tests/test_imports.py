"""What an import of the package loads; each in a process of its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import xpu_lora_compile


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


# What may be imported: by each part of the package those in front of it, also for annotations. `xpu_lora_compile` is
# the package's own `__init__`.
DIRECTION = (
    *("errors", "terminal", "torch_internals", "inductor_internals"),
    *(
        "kernels",
        "ops",
        "passes",
        "backend",
        "rows",
        "adapters",
        "generation",
        "layers",
        "artifacts",
        "inspect",
        "__init__",
    ),
    *("command", "integrations", "bench", "cli"),
)
ROOT = Path(xpu_lora_compile.__file__).parent


def imports() -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports, somewhere in its source."""
    files = {
        ".".join(("xpu_lora_compile", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in ROOT.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                # A name of a package may be one of its modules.
                several = (f"{node.module}.{name.name}" for name in node.names)
                names |= {name if name in files else node.module for name in several}
            elif isinstance(node, ast.Import):
                names |= {name.name for name in node.names}
        found[module] = names & set(files) - {module}
    return found


def part_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_imports_go_in_one_direction() -> None:
    wrong = {
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if part_of(other) != part_of(module) and DIRECTION.index(part_of(other)) > DIRECTION.index(part_of(module))
    }
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = imports()
    # What the package offers comes from all over it.
    root = "xpu_lora_compile"
    TopologicalSorter({module: others - {root} for module, others in graph.items() if module != root}).prepare()
