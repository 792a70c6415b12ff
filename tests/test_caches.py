"""Compile caches on disk: a second process hits, and a changed pass, kernel or option never gets a stale answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import xpu_lora_compile

PROGRAM = """
import json, sys
import torch
import xpu_lora_compile as xlc
from torch._dynamo.utils import counters

indices = torch.tensor([0, 1])

def expand(output, hidden, b):
    output = output * 2
    xlc.bgmv_expand(output, hidden, b, indices)
    return output.relu()

def call(**how):
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        result = torch.compile(expand, fullgraph=True, **how)(torch.ones(2, 6), torch.ones(2, 1), torch.ones(2, 4, 1))
    return {
        "first": result[0, 0].item(),
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"],
        "outer_hits": counters["aot_autograd"]["autograd_cache_hit"],
    }

options = json.loads(sys.argv[1])
print(json.dumps({
    "backend": call(backend="xpu_lora", options=options),
    "inductor": call(options=xlc.inductor_options(options)),
    "place": xlc.__file__,
}))
"""

THROUGH = ["backend", "inductor"]


def run(
    cache: Path, package: Path | None = None, options: dict[str, object] | None = None, **variables: str
) -> dict[str, dict]:
    """Compile the program in a fresh process, with the package from another folder if one is given."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **variables}
    if package:
        environment["PYTHONPATH"] = str(package)
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", PROGRAM, json.dumps(options or {})],
        env=environment, cwd=package or cache, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert package is None or result["place"].startswith(str(package))
    return result


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that one process has filled."""
    folder = tmp_path_factory.mktemp("cache")
    filled = run(folder)
    for through in THROUGH:
        assert (filled[through]["first"], filled[through]["hits"]) == (3.0, 0)
    return folder


def edited_package(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the package in which one place of one file reads otherwise."""
    shutil.copytree(Path(xpu_lora_compile.__file__).parent, folder / "xpu_lora_compile")
    path = folder / "xpu_lora_compile" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return folder


def test_a_second_process_hits(cache: Path) -> None:
    second = run(cache)
    for through in THROUGH:
        assert second[through] == {"first": 3.0, "hits": 1, "misses": 0, "outer_hits": 1}


def test_a_changed_pass_is_not_answered_from_the_cache(cache: Path, tmp_path: Path) -> None:
    old, new = "0, columns, call.add)", "0, columns, False)"
    changed = run(cache, edited_package(tmp_path, "passes/resolve_width.py", old, new))
    for through in THROUGH:
        # Replaced instead of added: the changed pass took effect.
        assert changed[through] == {"first": 1.0, "hits": 0, "misses": 1, "outer_hits": 0}


CHANGE = ("add ? to_float(output[m][w]) + sum", "add ? 2 * to_float(output[m][w]) + sum")


def test_a_changed_kernel_is_not_answered_from_the_cache(cache: Path, tmp_path: Path) -> None:
    changed = run(cache, edited_package(tmp_path, "kernels/native_kernels.h", *CHANGE))
    for through in THROUGH:
        assert changed[through] == {"first": 5.0, "hits": 0, "misses": 1, "outer_hits": 0}


def test_a_changed_option_is_not_answered_from_the_cache(cache: Path) -> None:
    changed = run(cache, options={"epilogue_fusion": False})
    for through in THROUGH:
        assert changed[through] == {"first": 3.0, "hits": 0, "misses": 1, "outer_hits": 0}


def test_a_forced_kernel_is_not_answered_from_the_cache(cache: Path) -> None:
    forced = run(cache, XPU_LORA_KERNEL="gather")
    for through in THROUGH:
        assert forced[through] == {"first": 3.0, "hits": 0, "misses": 1, "outer_hits": 0}
