"""`choose`: one pure function over the committed table."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from xpu_lora_compile.kernels.choose import KERNELS, TABLE, Call, choose, force_kernel, forced_kernel

from xpu_lora_compile.errors import KernelError
from xpu_lora_compile.kernels import triton_launch

CALL = Call("cpu", "float32", 8, 8, 16, 4096, 4096)
NO_TRITON = "Triton is not installed"


def test_each_measured_point_gets_the_kernel_that_was_fastest_there() -> None:
    points = json.loads(TABLE.read_text(encoding="utf-8"))["points"]
    assert len(points) >= 90
    for point in points:
        us = point["us"]
        sizes = {name: point[name] for name in Call._fields if name in point}
        assert us[choose(Call(**sizes)).kernel] == min(us.values())


def test_the_table_says_where_it_was_measured() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for device in {point["device"] for point in table["points"]}:
        assert "xpu-lora bench ops --tune" in table["provenance"][device]
        assert "torch" in table["provenance"][device]


def test_a_choice_says_why_and_why_not_the_others() -> None:
    choice = choose(CALL, "", None, NO_TRITON)
    assert choice.because.startswith("measured fastest at the nearest point, T = 8")
    assert set(choice.others) == set(KERNELS) - {choice.kernel}
    assert choice.others["triton"] == NO_TRITON
    measured = [kernel for kernel in choice.others if kernel not in ("triton", "ipex")]
    assert all("times slower there" in choice.others[kernel] for kernel in measured)


def test_a_kernel_that_was_not_measured_at_a_point_is_not_chosen_there() -> None:
    choice = choose(CALL)
    assert choice.kernel != "triton"
    assert choice.others["triton"] == "not measured there"


def test_without_a_compiler_another_kernel_is_chosen_and_the_reason_is_given() -> None:
    choice = choose(CALL, "there is no C++ compiler")
    assert choice.kernel != "native"
    assert choice.others["native"] == "there is no C++ compiler"


@pytest.mark.parametrize("kernel", ["native", "triton"])
def test_float64_is_not_for_the_kernels_that_compute_in_float32(kernel: str) -> None:
    choice = choose(CALL._replace(dtype="float64"))
    assert choice.kernel != kernel
    assert choice.others[kernel] == "it computes in float32"


@pytest.mark.parametrize(("rows", "kernel"), [(2, "gather"), (64, "dense")])
def test_on_a_device_that_nothing_was_measured_on_rows_and_slots_decide(rows: int, kernel: str) -> None:
    choice = choose(CALL._replace(device="mtia", rows=rows), "", None, NO_TRITON)
    assert choice.kernel == kernel
    assert choice.because.startswith("nothing was measured on mtia")
    assert choice.others["grouped"] == "it is for a CPU, not for mtia"
    assert choice.others["triton"] == NO_TRITON


@pytest.mark.parametrize("rows", [2, 64])
def test_on_a_device_that_nothing_was_measured_on_triton_runs_where_it_can(rows: int) -> None:
    choice = choose(CALL._replace(device="xpu", rows=rows))
    assert choice.kernel == "triton"
    assert choice.because.startswith("nothing was measured on xpu")


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
    choice = choose(CALL, "", "dense")
    assert (choice.kernel, choice.because) == ("dense", "it was forced")


@pytest.mark.parametrize(
    ("call", "problem", "forced", "message"),
    [
        (CALL, "", "fast", "wanted one of native, triton, gather, grouped, dense, ipex; got 'fast'"),
        (CALL, "no compiler", "native", "'native', which cannot: no compiler. Force none, or one of gather"),
        (CALL, "", "triton", "'triton', which cannot: Triton is not installed. Force none, or one of native, gather"),
        (CALL._replace(device="cuda"), "", "grouped", "'grouped', which cannot: it is for a CPU, not for cuda"),
    ],
)
def test_a_forced_kernel_that_cannot_run_is_an_error(call: Call, problem: str, forced: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        choose(call, problem, forced, NO_TRITON)


def test_force_kernel_ends_with_its_block_and_refuses_unknown_names() -> None:
    with force_kernel("gather"):
        with force_kernel("gather"):
            assert forced_kernel() == "gather"
        assert forced_kernel() == "dense"
    with pytest.raises(KernelError, match="Correct the name"), force_kernel("fast"):
        pass
    assert forced_kernel() is None


def test_the_environment_forces_a_kernel_for_the_whole_process() -> None:
    code = "from xpu_lora_compile.kernels.choose import forced_kernel; print(forced_kernel())"
    environment = os.environ | {"XPU_LORA_KERNEL": "dense"}
    ran = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "dense\n"
