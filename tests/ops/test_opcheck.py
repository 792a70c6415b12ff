"""`torch.library.opcheck`: schemas tell the truth, fakes agree with kernels, and AOT traces every op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import BF16, DEVICE, F16, KERNELS_HERE, LORA_LINEAR, OPS, Case, build, cases_of
from torch.library import opcheck

from xpu_lora_compile.kernels import force_kernel
from xpu_lora_compile.ops import (
    ADD_LORA,
    EXPAND,
    EXPAND_SLICE,
    LINEAR_WITH_LORA,
    LORA_LINEARS,
    ROUTE,
    ROUTE_TILES,
    SHRINK,
    SORTED_INDICES,
)
from xpu_lora_compile.ops import (
    LORA_LINEAR as LORA_LINEAR_OP,
)
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


@pytest.mark.sweep
@_calls()
def test_schemas_tell_the_truth_and_fakes_agree_with_kernels(op: str, case: Case) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(getattr(torch.ops.xpu_lora, op).default, (), build(op, case).args, test_utils=checks)


@pytest.mark.sweep
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
    return {
        ADD_LORA: (outputs, inputs, a * 3, b * 3, indices, *rest, *ROUTE(indices, case.K)),
        LORA_LINEARS: (outputs, inputs, a * 3, b * 3, indices, *rest),
    }


@pytest.mark.parametrize("case", TRACED_INTERNAL, ids=str)
@pytest.mark.parametrize("op", _internal(Case()), ids=lambda op: op._schema.name.split("::")[1])
def test_internal_ops_pass_opcheck(op: Any, case: Case) -> None:
    opcheck(op, _internal(case)[op])


def _ranked(case: Case) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The ops that take tiles, ranks or both, each with its arguments; slices share no columns, as the kernels want."""
    base, inputs, (a,), (b,), indices, offsets, scaling = build(LORA_LINEAR, replace(case, H=10)).args.values()
    ranks = torch.tensor([case.R, 0, 1, case.R][: case.K], dtype=torch.int32, device=DEVICE)
    outputs, rest = [base.contiguous(), base.clone()], ([0, 1], [0, case.offset], 0.5)
    tiles = (None, None, None, None, ROUTE_TILES(indices, case.K))
    weights = [
        torch.ones(10, case.D, dtype=case.inputs, device=DEVICE),
        torch.ones(9, case.D, device=DEVICE).to(inputs),
    ]
    biases = [None, torch.ones(9, device=DEVICE).to(inputs)]
    lora = ([a, a], [b, b])
    return {
        "add_lora-tiles": (ADD_LORA, (outputs, inputs, *lora, indices, *rest, *tiles)),
        "add_lora-tiles-ranks": (ADD_LORA, (outputs, inputs, *lora, indices, *rest, *tiles, ranks)),
        "linear_with_lora": (LINEAR_WITH_LORA, (inputs, weights, biases, *lora, indices, *rest, *tiles)),
        "linear_with_lora-ranks": (LINEAR_WITH_LORA, (inputs, weights, biases, *lora, indices, *rest, *tiles, ranks)),
        "lora_linear-ranks": (LORA_LINEAR_OP, (base, inputs, [a], [b], indices, offsets, scaling, ranks)),
        "lora_linears-ranks": (LORA_LINEARS, (outputs, inputs, *lora, indices, *rest, ranks)),
    }


with_triton = pytest.mark.skipif("triton" not in KERNELS_HERE, reason="Triton is not installed")


@pytest.mark.sweep
@with_triton
@pytest.mark.parametrize("case", TRACED_INTERNAL, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "add_lora-tiles",
        "add_lora-tiles-ranks",
        "linear_with_lora",
        "linear_with_lora-ranks",
        "lora_linear-ranks",
        "lora_linears-ranks",
    ],
)
def test_ops_with_tiles_and_ranks_pass_opcheck(name: str, case: Case) -> None:
    with force_kernel("triton"):
        op, args = _ranked(case)[name]
        opcheck(op, args)


@with_triton
@pytest.mark.parametrize("case", [Case(), Case(T=0), Case(T=70, K=2)], ids=str)
def test_the_table_of_tiles_has_the_length_that_its_fake_says(case: Case) -> None:
    """Not its values: what no kernel reads is not written."""
    indices = build(LORA_LINEAR, case).args["lora_indices_tensor"]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ROUTE_TILES, (indices, case.K), test_utils=checks)
    groups = torch.arange(case.T, device=DEVICE) // 3
    codes = torch.arange(-1, case.T, device=DEVICE) % (case.K + 1) - 1
    ends = torch.searchsorted(groups, torch.arange(len(codes), device=DEVICE), right=True, out_int32=True)
    opcheck(SORTED_INDICES, (groups, codes, ends))
    opcheck(ROUTE_TILES, (codes[groups], case.K), {"ends": ends, "codes": codes}, test_utils=checks)
