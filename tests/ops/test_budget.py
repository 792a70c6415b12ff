"""The budget itself: sharp enough to tell a kernel that rounds once from one that rounds twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import BF16, DEVICE, EXPAND, F16, F32, LORA_LINEAR, OPS, SHRINK, Case, build
from torch import Tensor

from xpu_lora_compile.ops.budget import budget_of

# Every row has an adapter, and the sums are of an ordinary length.
HALF = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])


def _case(dtype: torch.dtype) -> Case:
    rows = tuple(t % 4 for t in range(16))
    return Case(T=16, D=129, R=17, W=64, H=64, inputs=dtype, weights=dtype, output=dtype, indices=rows)


def _worst(op: str, case: Case, kernel: Callable[[dict[str, Any]], Tensor]) -> float:
    """The largest error of a kernel, as a fraction of the budget."""
    call = build(op, case)
    budget = budget_of(op, call.args)
    return float(budget.excess(kernel(call.args))[call.written].max())


def _products(weights: Tensor, inputs: Tensor, indices: Tensor) -> Tensor:
    return torch.einsum("twr,tr->tw", weights[indices].float(), inputs.float())


@HALF
def test_a_kernel_that_rounds_once_is_within_the_budget(dtype: torch.dtype) -> None:
    def honest(args: dict[str, Any]) -> Tensor:
        output, inputs, weights, indices, _add = args.values()
        return (output.float() + _products(weights, inputs, indices)).to(dtype)

    assert 0.9 < _worst(EXPAND, _case(dtype), honest) <= 1


@HALF
def test_rounding_the_product_before_adding_it_is_over_the_budget(dtype: torch.dtype) -> None:
    def rounds_twice(args: dict[str, Any]) -> Tensor:
        output, inputs, weights, indices, _add = args.values()
        return output + _products(weights, inputs, indices).to(dtype)

    assert _worst(EXPAND, _case(dtype), rounds_twice) > 1.2


@HALF
def test_rounding_the_product_before_adding_it_is_within_the_budget_of_a_kernel_that_does(dtype: torch.dtype) -> None:
    call = build(EXPAND, _case(dtype))
    output, inputs, weights, indices, _add = call.args.values()
    budget = budget_of(EXPAND, call.args, rounds_before_adding=True)
    products = _products(weights, inputs, indices).to(dtype)
    assert 0.7 < float(budget.excess(output + products).max()) <= 1
    # Three quarters of an ulp more are not.
    ulp = products.abs() * torch.finfo(dtype).eps
    assert float(budget.excess(output + products + 3 * ulp).max()) > 1


@HALF
def test_each_slice_of_a_kernel_that_rounds_before_adding_is_allowed_its_own_rounding(dtype: torch.dtype) -> None:
    call = build(LORA_LINEAR, replace(_case(dtype), H=96, slices=2))
    args = call.args | {"slice_offsets": [0, 64]}
    base, inputs, lora_a, lora_b, indices, offsets, scaling = args.values()
    result = base.clone()
    for a, b, offset in zip(lora_a, lora_b, offsets, strict=True):
        columns = result[:, offset : offset + b.shape[1]]
        columns += _products(b, scaling * _products(a, inputs, indices), indices).to(dtype)
    strict, wide = (budget_of(LORA_LINEAR, args, rounds_before_adding=early) for early in (False, True))
    assert float(strict.excess(result).max()) > 1 >= float(wide.excess(result).max())


@HALF
def test_rounding_the_rank_vector_is_over_the_budget(dtype: torch.dtype) -> None:
    def rounds_twice(args: dict[str, Any]) -> Tensor:
        base, inputs, (a,), (b,), indices, _offsets, scaling = args.values()
        hidden = (scaling * _products(a, inputs, indices)).to(dtype)
        return (base.float() + _products(b, hidden, indices)).to(dtype)

    assert _worst(LORA_LINEAR, _case(dtype), rounds_twice) > 1.2


@HALF
def test_rounding_before_scaling_is_over_the_budget(dtype: torch.dtype) -> None:
    def rounds_twice(args: dict[str, Any]) -> Tensor:
        output, inputs, weights, indices, scaling = args.values()
        output[:, :17] = _products(weights, inputs, indices).to(dtype) * scaling
        return output

    assert _worst(SHRINK, _case(dtype), rounds_twice) > 1.2


@HALF
def test_accumulating_in_the_dtype_of_the_inputs_is_over_the_budget(dtype: torch.dtype) -> None:
    def sums_in_half(args: dict[str, Any]) -> Tensor:
        output, inputs, weights, indices, _add = args.values()
        value = torch.zeros_like(output)
        for r in range(inputs.shape[1]):
            value += weights[indices, :, r] * inputs[:, r, None]
        return output + value

    assert _worst(EXPAND, _case(dtype), sums_in_half) > 1.2


@HALF
def test_cutting_digits_off_instead_of_rounding_is_over_the_budget(dtype: torch.dtype) -> None:
    def truncates(args: dict[str, Any]) -> Tensor:
        output, inputs, weights, indices, _add = args.values()
        value = output.float() + _products(weights, inputs, indices)
        dropped = {BF16: 16, F16: 13}[dtype]
        return (value.view(torch.int32) >> dropped << dropped).view(torch.float32).to(dtype)

    assert _worst(EXPAND, _case(dtype), truncates) > 1.2


@HALF
def test_operands_rounded_to_half_precision_are_over_the_budget_of_float32(dtype: torch.dtype) -> None:
    def rounds_operands(args: dict[str, Any]) -> Tensor:
        output, inputs, weights, indices, _add = args.values()
        return output + _products(weights.to(dtype), inputs.to(dtype), indices)

    assert _worst(EXPAND, _case(F32), rounds_operands) > 10


@pytest.mark.parametrize("op", OPS)
def test_nan_is_over_the_budget(op: str) -> None:
    call = build(op, _case(F32))
    budget = budget_of(op, call.args)
    got = call.run().clone()
    got[3, 2] = torch.nan
    with pytest.raises(AssertionError, match="row 3, column 2"):
        budget.check(got, call.written)


@pytest.mark.parametrize("op", OPS)
def test_the_wrong_adapter_is_over_the_budget(op: str) -> None:
    call = build(op, _case(BF16))
    budget = budget_of(op, call.args)
    call.args["lora_indices_tensor"][5] = 3
    with pytest.raises(AssertionError, match="row 5"):
        budget.check(call.run(), call.written)


@pytest.mark.parametrize(
    ("dtype", "value", "half_ulp"),
    [
        (F32, 1.0, 2.0**-24),
        (BF16, 1.0, 2.0**-8),
        (BF16, 1.99, 2.0**-8),
        (BF16, 2.0, 2.0**-7),
        (F16, 3.0, 2.0**-10),
        (F16, 0.0, 2.0**-25),
        (F16, 2.0**-20, 2.0**-25),
        (BF16, 0.0, 2.0**-134),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_the_budget_of_an_untouched_value_is_half_an_ulp(dtype: torch.dtype, value: float, half_ulp: float) -> None:
    output = torch.full((1, 1), value, dtype=torch.float64, device=DEVICE).to(dtype)
    nothing = torch.zeros(1, 1, 1, device=DEVICE)
    args = {"output": output, "inputs": nothing[0], "weights": nothing, "indices": torch.tensor([-1], device=DEVICE)}
    allowed = float(budget_of(EXPAND, {**args, "add_inputs": True}).allowed)
    # What accumulation adds for one product is of the order of 2^-23 of the value.
    assert half_ulp <= allowed <= half_ulp + 2.0**-21 * value + 2.0**-140
