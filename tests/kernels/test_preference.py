"""Which kernel runs a call: the first of `KERNELS` that does not refuse it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from support import xpu_c
from support.cases import DEVICE
from torch import Tensor

from xpu_lora_compile.errors import KernelError
from xpu_lora_compile.kernels import (
    KERNELS,
    choice_for,
    force_kernel,
    forced_kernel,
    kernel_for,
    kernel_named,
    native,
    portable,
    preferred_on,
    reads_ranks,
    refusal_of,
    triton_launch,
)
from xpu_lora_compile.kernels.call import LoraCall
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.torch_internals import without_memory

NO_TRITON = "Triton is not installed"
without_a_gpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="a torch for another GPU makes no fake tensor on XPU")


def call_on(device: str, rows: int = 4, dtype: torch.dtype = torch.bfloat16) -> LoraCall:
    """A whole call that breaks no rule; on another device than the CPU to be made `without_memory`."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    indices = torch.zeros(rows, device=device, dtype=torch.int64)
    return LoraCall([empty(rows, 6)], empty(rows, 8), [empty(3, 2, 8)], [empty(3, 6, 2)], RowRouting(indices, 3))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "warned_problem", lambda: "there is no C++ compiler")


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "problem", lambda _device: NO_TRITON)


def test_the_order_of_preference() -> None:
    """A kernel that is not named here may stand anywhere."""
    order = ["vendor", "native", "triton", "grouped", "gather", "ipex"]
    assert [kernel.name for kernel in KERNELS if kernel.name in order] == order


@pytest.mark.parametrize("rows", [1, 4, 400])
def test_on_a_cpu_the_native_kernel_comes_first(rows: int, no_triton: None) -> None:
    choice = choice_for(call_on("cpu", rows))
    assert choice.kernel.name == "native"
    assert choice.because == "it is the first that takes this call"
    assert choice.others.keys() == {kernel.name for kernel in KERNELS} - {"native"}
    assert choice.others["vendor"] == "it is for xpu, not for cpu"
    assert choice.others["triton"] == NO_TRITON
    assert choice.others["grouped"] == choice.others["gather"] == "native comes first"


def test_without_a_compiler_groups_are_multiplied(no_compiler: None, no_triton: None) -> None:
    choice = choice_for(call_on("cpu"))
    assert choice.kernel.name == "grouped"
    assert choice.others["native"] == "there is no C++ compiler"


@pytest.mark.parametrize("device", ["cuda", pytest.param("xpu", marks=without_a_gpu)])
def test_on_a_gpu_triton_runs_where_it_can(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with without_memory():
        call = call_on(device)
        monkeypatch.setattr(triton_launch, "problem", lambda _device: "")
        assert kernel_for(call).name == "triton"
        monkeypatch.setattr(triton_launch, "problem", lambda _device: NO_TRITON)
        choice = choice_for(call)
    # The first that is for any device.
    assert choice.kernel is next(kernel for kernel in KERNELS if not kernel.devices)
    assert choice.others["grouped"] == f"it is for cpu, not for {device}"
    assert choice.others["triton"] == NO_TRITON


@without_a_gpu
@pytest.mark.parametrize("groups", [(xpu_c.LORA,), (xpu_c.BGMV,)], ids=["new", "old"])
def test_the_vendors_kernel_comes_first_on_an_intel_gpu_and_takes_whole_calls(
    groups: tuple[dict[str, str], ...],
) -> None:
    with xpu_c.installed(*groups), without_memory():
        call = call_on("xpu")
        assert kernel_for(call).name == "vendor"
        halves = LoraCall(call.outputs, call.inputs, call.lora_a, [], call.routing)
        assert choice_for(halves).others["vendor"] == "it takes calls that both shrink and expand"
        assert choice_for(call_on("xpu", dtype=torch.float32)).others["vendor"].startswith("weights must be float16")
        with force_kernel("vendor"), pytest.raises(KernelError, match="cannot: weights must be float16"):
            kernel_for(call_on("xpu", dtype=torch.float32))
        # Of a graph that was compiled for Triton, whose table of tiles is there.
        tiled = RowRouting(call.routing.indices, 3, tiles=call.routing.indices)
        compiled = LoraCall(call.outputs, call.inputs, call.lora_a, call.lora_b, tiled)
        assert kernel_for(compiled).name == "triton"


@pytest.mark.parametrize("kernel", ["native", "triton"])
def test_float64_is_not_for_the_kernels_that_compute_in_float32(kernel: str) -> None:
    with without_memory():
        call = call_on("cpu" if kernel == "native" else "cuda", dtype=torch.float64)
        choice = choice_for(call)
    assert choice.kernel.name != kernel
    assert kernel_named(kernel).refusal(call) == "it computes in float32"
    assert not any(kernel_named(name).refusal(call) for name in ("grouped", "gather"))


@pytest.mark.parametrize(
    ("device", "interpreted", "says"),
    [
        ("mtia", True, "Triton was tried on CUDA and XPU, not on mtia"),
        ("cpu", False, "Triton compiles for no CPU (TRITON_INTERPRET=1 has its interpreter run them, slowly)"),
        ("cpu", True, ""),
        ("cuda", False, ""),
        ("xpu", False, ""),
    ],
)
def test_where_triton_can_run(device: str, interpreted: bool, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not the function that remembers.
    problem = triton_launch.problem.__wrapped__
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    monkeypatch.setattr(triton_launch, "find_spec", lambda _name: object())
    assert problem(device) == says
    monkeypatch.setattr(triton_launch, "find_spec", lambda _name: None)
    assert problem(device) == NO_TRITON


def test_a_forced_kernel_is_taken() -> None:
    with force_kernel("gather"):
        choice = choice_for(call_on("cpu"))
    assert (choice.kernel.name, choice.because) == ("gather", "it was forced")
    assert choice.others["native"] == "another was forced"


@pytest.mark.parametrize(
    ("device", "forced", "message"),
    [
        ("cpu", "native", "'native', which cannot: there is no C++ compiler"),
        ("cpu", "triton", "'triton', which cannot: Triton is not installed"),
        ("cuda", "grouped", "'grouped', which cannot: it is for cpu, not for cuda"),
        ("cpu", "vendor", "'vendor', which cannot: it is for xpu, not for cpu"),
    ],
)
def test_a_forced_kernel_that_cannot_run_is_an_error(
    device: str, forced: str, message: str, no_compiler: None, no_triton: None
) -> None:
    with without_memory():
        call = call_on(device)
        able = [kernel.name for kernel in KERNELS if not refusal_of(kernel, call)]
        assert "gather" in able
        assert forced not in able
        message += f". Force none, or one of {', '.join(able)}."
        with force_kernel(forced), pytest.raises(KernelError, match=re.escape(message)):
            kernel_for(call)


def test_force_kernel_ends_with_its_block_and_refuses_unknown_names() -> None:
    with force_kernel("grouped"):
        with force_kernel("gather"):
            assert forced_kernel() == "gather"
        assert forced_kernel() == "grouped"
    names = ", ".join(kernel.name for kernel in KERNELS)
    message = f"wanted one of {names}; got 'fast'. Pass one of these names"
    with pytest.raises(KernelError, match=message), force_kernel("fast"):
        pass
    assert forced_kernel() is None


def test_the_environment_forces_a_kernel_for_the_whole_process() -> None:
    code = "from xpu_lora_compile.kernels import forced_kernel; print(forced_kernel())"
    environment = os.environ | {"XPU_LORA_KERNEL": "gather"}
    ran = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "gather\n"


def test_the_kernel_of_a_device_says_how_weights_are_stored() -> None:
    def by_rank(device: str) -> bool:
        return device not in preferred_on(device).ranks_of_b_together_on

    assert [device for device in ("cpu", "cuda", "xpu", "mtia") if by_rank(device)] == ["cpu", "cuda", "mtia"]
    with force_kernel("ipex"):
        assert not by_rank("cpu")
    with force_kernel("triton"):
        assert not by_rank("xpu")
        assert by_rank("cuda")
    assert [device for device in ("cpu", "cuda", "xpu") if reads_ranks(device)] == ["cuda", "xpu"]


def test_each_kernel_has_a_name_of_its_own_and_an_op_that_exists() -> None:
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    for kernel in KERNELS:
        assert hasattr(torch.ops.xpu_lora, kernel.op)
        assert not kernel.prepares or hasattr(torch.ops.xpu_lora, kernel.prepares)


def test_gather_copies_weights_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no call takes memory for the weights of all its rows."""
    weights, inputs = torch.randn(3, 5, 7), torch.randn(11, 7)
    routing = RowRouting(torch.tensor([0, 2, 1, 1, 0, 2, -1, 0, 3, 2, 1]), 3)
    whole = kernel_named("gather").products(inputs, weights, routing)  # type: ignore[attr-defined]
    monkeypatch.setattr(portable, "LARGEST_COPY", 3 * 5 * 7)
    largest = 0
    real = torch.bmm

    def watched(copied: Tensor, rows: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, copied.numel())
        return real(copied, rows)

    monkeypatch.setattr(torch, "bmm", watched)
    torch.testing.assert_close(kernel_named("gather").products(inputs, weights, routing), whole)  # type: ignore[attr-defined]
    assert largest == 3 * 5 * 7
