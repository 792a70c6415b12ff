"""The contract, with each kernel forced in turn: what the other tests ask of the one that was chosen."""

from __future__ import annotations

import pytest
import torch
from support.cases import (
    BF16,
    CASES,
    DEVICE,
    F32,
    F64,
    FLOAT32_KERNELS,
    KERNELS_HERE,
    LORA_LINEAR,
    OPS,
    Case,
    build,
    cases_of,
    same_bits,
)
from torch import Tensor

from xpu_lora_compile.errors import KernelError
from xpu_lora_compile.kernels import force_kernel
from xpu_lora_compile.kernels.triton_launch import is_interpreting
from xpu_lora_compile.ops import bgmv_shrink
from xpu_lora_compile.ops.budget import budget_of

every_kernel = pytest.mark.parametrize("kernel", KERNELS_HERE)


def can_run(kernel: str, case: Case) -> bool:
    return kernel not in FLOAT32_KERNELS or F64 not in (case.inputs, case.weights, case.output)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("kernel", "op", "case"),
    [
        pytest.param(kernel, op, case, id=f"{kernel}-{op}-{case}")
        for kernel in KERNELS_HERE
        for op in OPS
        for case in cases_of(op)
        if can_run(kernel, case)
    ],
)
def test_values_are_within_the_budget_and_nothing_else_is_written(kernel: str, op: str, case: Case) -> None:
    call = build(op, case)
    budget, outside, before = budget_of(op, call.args), call.outside(), call.buffer.clone()
    with force_kernel(kernel), torch.no_grad():
        result = call.run()
    budget.check(result, call.written)
    assert same_bits(call.buffer[outside], before[outside])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@every_kernel
@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), -1.0])
def test_a_rank_vector_without_an_adapter_is_0_however_it_is_scaled(kernel: str, scaling: float) -> None:
    output = torch.ones(3, 2, device=DEVICE)
    operands = torch.ones(3, 5, device=DEVICE), torch.ones(1, 2, 5, device=DEVICE)
    with force_kernel(kernel), torch.no_grad():
        bgmv_shrink(output, *operands, torch.tensor([-1, 0, 1], device=DEVICE), scaling)
    zeros = torch.zeros(2, device=DEVICE)
    assert same_bits(output[0], zeros)
    assert same_bits(output[2], zeros)


@every_kernel
def test_gradients_are_right(kernel: str) -> None:
    """Of float32, since that is what all kernels take: against the formula in float64."""

    def grads(dtype: torch.dtype) -> list[Tensor]:
        call = build(LORA_LINEAR, Case(T=9, D=65, R=5, W=33, H=40, indices=(0, 1, 2, 3, 0, -1, 0, 4, 3)))
        base, inputs, (a,), (b,), indices, offsets, scaling = call.args.values()
        operands = [one.to(dtype).requires_grad_() for one in (base, inputs, a, b)]
        result = getattr(torch.ops.xpu_lora, LORA_LINEAR)(
            operands[0], operands[1], [operands[2]], [operands[3]], indices, offsets, scaling
        )
        return [one.double() for one in torch.autograd.grad(result.square().sum(), operands)]

    exact = grads(F64)
    with force_kernel(kernel):
        for got, wanted in zip(grads(torch.float32), exact, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@every_kernel
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_a_row_is_the_same_in_every_batch(kernel: str, dtype: torch.dtype) -> None:
    """To the bit in the native kernel, and in compiled Triton kernels; else products may sum in another order.

    PyTorch's do, and those of numpy, which Triton's interpreter calls.
    """
    indices, dtypes = tuple(t % 3 for t in range(41)), {"inputs": dtype, "weights": dtype, "output": dtype}
    call = build(LORA_LINEAR, Case(T=41, D=129, R=17, K=3, W=131, H=131, indices=indices, **dtypes))
    base, inputs, a, b, indices, offsets, scaling = call.args.values()

    def run(rows: slice) -> Tensor:
        op = getattr(torch.ops.xpu_lora, LORA_LINEAR)
        result: Tensor = op(base[rows], inputs[rows], a, b, indices[rows], offsets, scaling)
        return result

    with force_kernel(kernel), torch.no_grad():
        together = run(slice(None))
        for rows in (slice(0, 1), slice(3, 5), slice(2, 9), slice(0, 41, 3)):
            if kernel == "native" or (kernel == "triton" and not is_interpreting()):
                assert same_bits(run(rows), together[rows])
            else:
                least = 1e-4 if dtype == F32 else torch.finfo(dtype).eps
                torch.testing.assert_close(run(rows), together[rows], rtol=least, atol=least)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS_HERE if kernel in FLOAT32_KERNELS])
def test_a_forced_kernel_that_cannot_run_a_call_is_an_error(kernel: str) -> None:
    call = build(LORA_LINEAR, Case(H=10, inputs=F64, weights=F64, output=F64))
    able = ", ".join(one for one in KERNELS_HERE if one not in FLOAT32_KERNELS)
    with force_kernel(kernel), torch.no_grad(), pytest.raises(KernelError, match=rf"in float32.*one of {able}\."):
        call.run()


def test_all_cases_are_run_by_some_kernel() -> None:
    assert {case for kernel in KERNELS_HERE for case in CASES if can_run(kernel, case)} == set(CASES)
