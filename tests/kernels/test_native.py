"""The native kernel: how it is made, what it does where it cannot be, and what it holds in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import entry, native
from xpu_lora_compile.ops import ADD_LORA

ONE_CALL = """
import torch
import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import native
torch.set_num_threads(1)
output = torch.zeros(2, 3)
with torch.no_grad():
    xlc.bgmv_expand(output, torch.ones(2, 1), torch.full((1, 3, 1), 5.0), torch.tensor([0, -1]))
assert output.tolist() == [[5.0] * 3, [0.0] * 3], output
print(native.problem() or "native")
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", ONE_CALL],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_may_compile_it_at_once_and_a_third_finds_it(tmp_path: Path) -> None:
    for process in [start(tmp_path), start(tmp_path)]:
        said, errors = process.communicate()
        assert (said, errors) == ("native\n", "")
    (library,) = (tmp_path / "xpu-lora-compile").iterdir()
    made = library.stat().st_mtime_ns
    assert start(tmp_path).communicate() == ("native\n", "")
    assert library.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("false", "false could not make it"),
        ("no-such-compiler", "no-such-compiler could not make it"),
        ("", "there is no"),
    ],
)
def test_without_a_compiler_plain_pytorch_runs_and_says_so(tmp_path: Path, compiler: str, reason: str) -> None:
    said, errors = start(tmp_path, CXX=compiler).communicate()
    assert said.startswith(reason)
    assert errors.count("the fast CPU kernel is not used") == 1
    assert "Plain PyTorch runs instead." in errors


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert start(file).communicate() == ("native\n", "")


def test_a_compiler_that_works_is_no_warning() -> None:
    entry._native_problem.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert entry._native_problem() == ""


def test_a_long_batch_takes_no_memory_of_the_size_of_its_products() -> None:
    """T = 4096: not even a hundredth of `[T, W, R]`, by PyTorch's allocator and by the process's own count."""
    rows, features, width, rank, slots = 4096, 512, 2048, 64, 8
    inputs, output = torch.randn(rows, features), torch.zeros(rows, width)
    a, b = torch.randn(slots, rank, features), torch.randn(slots, width, rank)
    indices = torch.randint(-1, slots, (rows,))

    def call() -> None:
        ADD_LORA([output], inputs, [a], [b], [indices], [0], [0], 1.0)

    call()
    limit = 4 * rows * width * rank // 100
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) < limit
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    call()
    assert peak_memory() - before < limit
    assert native.scratch_bytes(rows, rank, rank) < limit


def peak_memory() -> int:
    """Bytes, since the count was last cleared."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def test_a_write_past_the_dispatcher_is_seen_by_autograd() -> None:
    output = torch.zeros(1, 2)
    product = torch.ones(1, 2, requires_grad=True) * output
    with torch.no_grad():
        xlc.bgmv_expand(output, torch.ones(1, 1), torch.ones(1, 2, 1), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_inference_tensors_are_written_to() -> None:
    with torch.inference_mode():
        output = torch.zeros(1, 2)
        xlc.bgmv_expand(output, torch.ones(1, 1), torch.ones(1, 2, 1), torch.tensor([0]))
        assert output.tolist() == [[1.0, 1.0]]
