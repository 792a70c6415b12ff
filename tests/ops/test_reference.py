"""The oracle of all tests, against numbers worked out by hand and against another way to write the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import DEVICE, EXPAND, F64, LORA_LINEAR, OPS, SHRINK, Case, build, cases_of
from torch import Tensor

from xpu_lora_compile.ops import reference

# Two adapters, three rows: adapter 1, none, adapter 0.
INDICES = torch.tensor([1, -1, 0])
A = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]])
B = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]])
INPUTS = torch.tensor([[1.0, 1.0], [5.0, 5.0], [1.0, -1.0]])


def test_shrink_by_hand() -> None:
    output = torch.full((3, 3), 9.0)
    assert reference.bgmv_shrink(output, INPUTS, A, INDICES, 0.5).tolist() == [
        [15.0, 35.0, 9.0],
        [0.0, 0.0, 9.0],
        [-0.5, -0.5, 9.0],
    ]


@pytest.mark.parametrize(
    ("columns", "add", "wanted"),
    [
        (3, True, [[3.0, 3.0, 5.0], [1.0, 1.0, 1.0], [2.0, 0.0, 1.0]]),
        (3, False, [[2.0, 2.0, 4.0], [1.0, 1.0, 1.0], [1.0, -1.0, 0.0]]),
        (4, True, [[3.0, 3.0, 5.0, 1.0], [1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 1.0, 1.0]]),
        (2, True, [[3.0, 3.0], [1.0, 1.0], [2.0, 0.0]]),
    ],
    ids=["equal", "replace", "narrower", "wider"],
)
def test_expand_by_hand(columns: int, add: bool, wanted: list[list[float]]) -> None:
    assert reference.bgmv_expand(torch.ones(3, columns), INPUTS, B, INDICES, add).tolist() == wanted


def test_expand_slice_by_hand() -> None:
    assert reference.bgmv_expand_slice(torch.ones(3, 5), INPUTS, B, INDICES, 1, 3).tolist() == [
        [1.0, 3.0, 3.0, 5.0, 1.0],
        [1.0, 1.0, 1.0, 1.0, 1.0],
        [1.0, 2.0, 0.0, 1.0, 1.0],
    ]


def test_lora_linear_by_hand() -> None:
    base = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(3, 4)
    result = reference.lora_linear(base, INPUTS, [A, A], [B, B[:, :1]], INDICES, [0, 3], 0.1)
    # Row 0: A x = (30, 70), scaled (3, 7), B gives (6, 14, 20), and B's first row 6.
    torch.testing.assert_close(
        result, torch.tensor([[7.0, 16.0, 23.0, 10.0], [1.0, 2.0, 3.0, 4.0], [0.9, 1.9, 2.8, 3.9]])
    )


def test_the_reference_rounds_once_to_the_dtype_of_the_output() -> None:
    output = torch.ones(1, 1, dtype=torch.bfloat16)
    # The sum is just above the middle of 1 and its neighbour; with the product rounded first it would be the middle.
    product = torch.tensor([[2.0**-8 + 2.0**-17]], dtype=F64)
    one = torch.ones(1, 1, 1)
    assert reference.bgmv_expand(output, product, one, torch.tensor([0])).item() == 1 + 2.0**-7


@pytest.mark.parametrize("op", OPS)
def test_the_reference_changes_nothing(op: str) -> None:
    call = build(op, Case(H=10))
    before = call.buffer.clone()
    getattr(reference, op)(*call.args.values())
    torch.testing.assert_close(call.buffer, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=f"{op}-{case}") for op in OPS for case in cases_of(op)]
)
def test_the_reference_agrees_with_one_product_over_a_one_hot_routing(op: str, case: Case) -> None:
    args = _in_float64(build(op, case).args)
    torch.testing.assert_close(getattr(reference, op)(*args.values()), _one_hot(op, args), equal_nan=True)


def _one_hot(op: str, args: dict[str, Any]) -> Tensor:
    """The contract without any loop over rows: a routing matrix `[T, K]` picks each row's adapter."""
    first, inputs, *_ = args.values()
    indices = args["lora_indices_tensor"]
    if op == LORA_LINEAR:
        result = first.clone()
        for a, b, offset in zip(args["lora_a"], args["lora_b"], args["slice_offsets"], strict=True):
            hidden = args["scaling"] * _routed(a, inputs, indices)
            result[:, offset : offset + b.shape[-2]] += _routed(b, hidden, indices)
        return result
    weights = args["lora_a_weights" if op == SHRINK else "lora_b_weights"]
    value, has_adapter = _routed(weights, inputs, indices), _routing(indices, len(weights)).any(1)
    if op == SHRINK:
        return torch.cat([args["scaling"] * value, first[:, value.shape[1] :]], 1)
    start = 0 if op == EXPAND else args["slice_offset"]
    columns = first[:, start : start + value.shape[1]]
    value = value[:, : columns.shape[1]]
    if not args["add_inputs"]:
        value = value - columns * has_adapter[:, None]
    return torch.cat([first[:, :start], columns + value, first[:, start + value.shape[1] :]], 1)


def _routed(weights: Tensor, inputs: Tensor, indices: Tensor) -> Tensor:
    routing = _routing(indices, len(weights)).double()
    return torch.einsum("tk,kwr,tr->tw", routing, weights.flatten(0, -3).nan_to_num(), inputs)


def _routing(indices: Tensor, slots: int) -> Tensor:
    return indices[:, None] == torch.arange(slots, device=DEVICE)


def _in_float64(args: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: convert(arg) for name, arg in args.items()}
