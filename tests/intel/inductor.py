"""The module that Inductor writes for an Intel GPU, run on CPU tensors.

Inductor's kernels and ours in it are compiled by Intel's Triton compiler and run by its OpenCL for CPUs (`opencl`).
The wrapper runs as it was written, but for its few calls of `torch.xpu`, and its memory is the CPU's. Base products are
plain PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from intel import opencl
from intel.toolchain import compiling_for
from support.visible_driver import Written, pretend
from torch import Tensor
from torch._inductor import config
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch.utils import _triton

# The lines that name what a torch without xpu does not have, and what stands for it.
REPLACED = {
    "from torch._C import _xpu_getCurrentRawStream as get_raw_stream": "get_raw_stream = lambda _device: 0",
    "empty_strided_xpu = torch._C._dynamo.guards._empty_strided_xpu": "from intel.inductor import empty_strided_xpu",
}


def empty_strided_xpu(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """New memory, of what a kernel must not read: NaN, or a large number."""
    made = torch.empty_strided(size, stride, dtype=dtype)
    return made.fill_(torch.nan if made.is_floating_point() else 2**30)


@contextmanager
def executing() -> Iterator[None]:
    """Have Inductor find a Data Center GPU Max in the block; what it writes for that runs on the CPU."""
    quiet = config.patch(compile_threads=1, autotune_local_cache=False, use_static_triton_launcher=False)
    with pytest.MonkeyPatch.context() as patch, compiling_for("pvc", driver=opencl.Driver) as driver, quiet:
        pretend(patch.setattr, driver.properties)
        patch.setattr(torch.xpu, "_DeviceGuard", lambda _device: nullcontext())
        patch.setattr(torch.xpu, "set_device", lambda _device: None)
        # SPIR-V, as for torch's own `TORCHINDUCTOR_XPU_KERNEL_FORMAT=spv`: native code is for a GPU alone.
        patch.setattr(triton_heuristics, "XPU_KERNEL_FORMAT", "spv")
        # The driver is ours.
        patch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
        patch.setattr(triton_heuristics.CachingAutotuner, "_precompile_worker", _compile_the_first)
        _forget_triton()
        yield
    _forget_triton()


def _forget_triton() -> None:
    """Have torch ask once more whether there is a Triton, which it keeps the answer of."""
    for answer in (_triton.has_triton, _triton.has_triton_package):
        answer.cache_clear()


_compile_all = triton_heuristics.CachingAutotuner._precompile_worker


def _compile_the_first(kernel: triton_heuristics.CachingAutotuner) -> None:
    """Compile one configuration of a kernel, so that none is timed."""
    kernel.configs = kernel.configs and kernel.configs[:1]
    _compile_all(kernel)


def loaded(written: Written, folder: Path) -> ModuleType:
    """Import what Inductor has written, which compiles its kernels."""
    code = written.code
    for line, other in REPLACED.items():
        assert line in code
        code = code.replace(line, other)
    file = folder / "written.py"
    file.write_text(code)
    module = ModuleType("written")
    module.__file__ = str(file)
    exec(compile(code, file, "exec"), module.__dict__)  # noqa: S102
    return module


def run(module: ModuleType, written: Written, named: Mapping[str, Tensor | int]) -> list[Tensor]:
    """Call it, with tensors and sizes by the names of the function's arguments."""
    results: Any = module.call([named[source] for source in written.inputs])
    return list(results)
