"""The Triton kernels as Intel's compiler makes them for a Data Center GPU Max, executed: see `opencl`.

Each test is one of `tests/kernels`, on calls chosen to take all paths through the kernels and few of the compiler's
minutes. A kernel is compiled anew for other dtypes, for other strides of 1, and for sizes that 16 divides.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from intel import opencl
from intel.toolchain import compiling_for
from kernels import test_every_kernel, test_triton
from kernels.test_triton import _new_memory_is_poisoned  # noqa: F401
from support.cases import CASES, F64, OPS, Case, cases_of

from xpu_lora_compile.kernels import triton_launch
from xpu_lora_compile.kernels.sizes import Sizes

# Small tiles are compiled faster.
SMALL = Sizes()._replace(
    expand_columns=32, shrink_columns=32, shrink_warps=4, linear_rows=0, linear_rows_if_small=0, linear_rank=64
)


@pytest.fixture(autouse=True)
def _executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_launch, "problem", lambda _device: "")
    test_triton.use(SMALL, monkeypatch)
    with compiling_for("pvc", driver=opencl.Driver):
        opencl.launched.clear()
        yield


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op}-{case}")
        for op in OPS
        for case in cases_of(op, CASES)
        if F64 not in (case.inputs, case.weights, case.output)
    ],
)
def test_values(op: str, case: Case) -> None:
    test_every_kernel.test_values_are_within_the_budget_and_nothing_else_is_written("triton", op, case)
