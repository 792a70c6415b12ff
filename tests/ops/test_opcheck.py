"""`torch.library.opcheck`: schemas tell the truth, fakes agree with kernels, and AOT traces every op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import BF16, DEVICE, F16, LORA_LINEAR, OPS, Case, build, cases_of
from torch.library import opcheck

from xpu_lora_compile.ops import ADD_LORA, EXPAND, EXPAND_SLICE, LORA_LINEARS, ROUTE, SHRINK
from xpu_lora_compile.ops.internal import OUTER_BY_SLOT, SLOT_PRODUCTS

# A trace costs half a second: one case for each relation of W and H, edge of T, dtype, layout and form of weights.
TRACED = (
    Case(),
    Case(T=3, H=10, inputs=BF16),
    Case(W=11, H=6, weights=F16),
    Case(T=0),
    Case(T=1, K=1),
    Case(H=10, layout="strided", window="transposed"),
    Case(layout="expanded", with_slice_dim=True, window="rows"),
    Case(H=10, slices=2),
)
TRACED_GRADIENTS = (Case(), Case(T=3, H=10, slices=2, with_slice_dim=True, inputs=BF16))
TRACED_INTERNAL = (Case(), Case(T=3, H=10, inputs=BF16, layout="strided"), Case(T=0, with_slice_dim=True))


def _calls(cases: tuple[Case, ...] | None = None) -> pytest.MarkDecorator:
    listed = [(op, case) for op in OPS for case in (cases_of(op) if cases is None else cases_of(op, cases))]
    return pytest.mark.parametrize(("op", "case"), [pytest.param(*call, id=f"{call[0]}-{call[1]}") for call in listed])


@_calls()
def test_schemas_tell_the_truth_and_fakes_agree_with_kernels(op: str, case: Case) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(getattr(torch.ops.xpu_lora, op).default, (), build(op, case).args, test_utils=checks)


@_calls(TRACED)
def test_public_ops_pass_opcheck(op: str, case: Case) -> None:
    opcheck(getattr(torch.ops.xpu_lora, op).default, (), build(op, case).args)


@pytest.mark.parametrize("case", TRACED_GRADIENTS, ids=str)
def test_the_functional_op_passes_opcheck_where_all_operands_need_gradients(case: Case) -> None:
    args = build(LORA_LINEAR, case).args
    for name in ("base", "inputs"):
        args[name] = args[name].detach().requires_grad_()
    for name in ("lora_a", "lora_b"):
        args[name] = [weights.nan_to_num().detach().requires_grad_() for weights in args[name]]
    opcheck(torch.ops.xpu_lora.lora_linear.default, (), args)


def _internal(case: Case) -> dict[Any, tuple[Any, ...]]:
    """The arguments of each internal op."""
    output, inputs, weights, indices, *_ = build("bgmv_expand", case).args.values()
    # What slot_products makes of a row without an adapter is arbitrary.
    slots = torch.arange(case.T, device=DEVICE) % case.K
    return {
        SHRINK: (output, inputs, weights, indices, 0.5),
        EXPAND: (output[:, : case.W], inputs, weights, indices, True),
        EXPAND_SLICE: (output, inputs, weights, indices, case.offset, case.W, False),
        SLOT_PRODUCTS: (inputs, weights.flatten(0, -3).nan_to_num(), slots),
        OUTER_BY_SLOT: (inputs, inputs.clone(), indices, case.K),
        ROUTE: (indices, case.K),
        **_several(case),
    }


def _several(case: Case) -> dict[Any, tuple[Any, ...]]:
    """The arguments of the ops with several outputs; two slices of the first output overlap."""
    base, inputs, a, b, indices, *_ = build(LORA_LINEAR, replace(case, H=10)).args.values()
    outputs = [base.contiguous(), base.clone()]
    rest = ([0, 0, 1], [0, 1, case.offset], 0.5)
    routing = [indices, *ROUTE(indices, case.K)]
    return {
        ADD_LORA: (outputs, inputs, a * 3, b * 3, routing, *rest),
        LORA_LINEARS: (outputs, inputs, a * 3, b * 3, indices, *rest),
    }


@pytest.mark.parametrize("case", TRACED_INTERNAL, ids=str)
@pytest.mark.parametrize("op", _internal(Case()), ids=lambda op: op._schema.name.split("::")[1])
def test_internal_ops_pass_opcheck(op: Any, case: Case) -> None:
    opcheck(op, _internal(case)[op])
