"""Random contracts: any shapes, dtypes, strides and indices, against the reference, with its budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import (
    BF16,
    DEVICE,
    EXPAND,
    EXPAND_SLICE,
    F16,
    F32,
    I32,
    I64,
    LAYOUTS,
    LORA_LINEAR,
    OPS,
    SHRINK,
    WINDOWS,
    Case,
    build,
    same_bits,
)

from xpu_lora_compile.ops.budget import budget_of

DTYPES = st.sampled_from([F32, BF16, F16])
SIZES = st.integers(0, 9)


@st.composite
def contracts(draw: st.DrawFn, op: str) -> Case:
    """Any case that the op takes."""
    slots, index, width = draw(st.integers(1, 9)), draw(st.sampled_from([I32, I64])), draw(SIZES)
    limits = torch.iinfo(index)
    near, far = st.integers(-2, slots + 1), st.integers(limits.min, limits.max)
    indices = draw(st.lists(st.integers(0, slots - 1) | near | far, max_size=9))
    spare = draw(SIZES)
    return Case(
        T=len(indices),
        D=draw(SIZES),
        R=draw(SIZES),
        K=slots,
        W=width,
        H=width + spare if op in (EXPAND_SLICE, LORA_LINEAR) else spare,
        inputs=draw(DTYPES),
        weights=draw(DTYPES),
        output=draw(DTYPES),
        second=draw(DTYPES),
        index=index,
        indices=tuple(indices),
        layout=draw(st.sampled_from(LAYOUTS)),
        window=draw(st.sampled_from(WINDOWS)),
        with_slice_dim=draw(st.booleans()),
        add=draw(st.booleans()),
        scaling=draw(st.floats(-4, 4)),
        slices=draw(st.integers(1, 2)) if op == LORA_LINEAR and 0 < width < width + spare else 1,
    )


def _keeps_its_contract(op: str, case: Case, seed: int) -> None:
    call = build(op, case, seed=seed)
    budget, outside, before = budget_of(op, call.args), call.outside(), call.buffer.clone()
    result = call.run()
    budget.check(result, call.written)
    assert same_bits(call.buffer[outside], before[outside])
    if op == LORA_LINEAR:
        keep = ~call.written.to(DEVICE)
        assert same_bits(result[keep], call.output[keep])


SEEDS = st.integers(0, 2**31)
thoroughly = settings(max_examples=500, deadline=None, derandomize=True, database=None)


@thoroughly
@given(contracts(SHRINK), SEEDS)
def test_shrink_keeps_its_contract(case: Case, seed: int) -> None:
    _keeps_its_contract(SHRINK, case, seed)


@thoroughly
@given(contracts(EXPAND), SEEDS)
def test_expand_keeps_its_contract(case: Case, seed: int) -> None:
    _keeps_its_contract(EXPAND, case, seed)


@thoroughly
@given(contracts(EXPAND_SLICE), SEEDS)
def test_expand_slice_keeps_its_contract(case: Case, seed: int) -> None:
    _keeps_its_contract(EXPAND_SLICE, case, seed)


@thoroughly
@given(contracts(LORA_LINEAR), SEEDS)
def test_lora_linear_keeps_its_contract(case: Case, seed: int) -> None:
    _keeps_its_contract(LORA_LINEAR, case, seed)


@pytest.mark.parametrize("op", OPS)
def test_every_kind_of_contract_is_drawn(op: str) -> None:
    seen: set[str] = set()

    @settings(thoroughly, max_examples=100)
    @given(contracts(op))
    def draw(case: Case) -> None:
        relation = "narrower" if case.W < case.H else "equal" if case.W == case.H else "wider"
        rows = "no rows" if case.T == 0 else "few rows" if case.T <= case.K else "many rows"
        adapters = "with adapter" if any(case.has_adapter) else "without adapter"
        seen.update((relation, rows, adapters, case.layout, case.window, "4-D" if case.with_slice_dim else "3-D"))

    draw()
    wider = {"wider"} if op in (SHRINK, EXPAND) else set()
    kinds = {"narrower", "equal", "no rows", "few rows", "many rows", "with adapter", "without adapter", "3-D", "4-D"}
    assert seen == kinds | wider | set(LAYOUTS) | set(WINDOWS)
