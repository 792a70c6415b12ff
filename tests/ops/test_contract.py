"""The contract, line by line: values, and what is left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.cases import (
    BF16,
    DEVICE,
    EXPAND,
    EXPAND_SLICE,
    F16,
    F32,
    F64,
    LORA_LINEAR,
    MUTATING,
    OPS,
    SHRINK,
    Case,
    build,
    cases_of,
    same_bits,
)
from torch import Tensor

from xpu_lora_compile.ops.budget import budget_of

every_call = pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=f"{op}-{case}") for op in OPS for case in cases_of(op)]
)
every_op = pytest.mark.parametrize("op", OPS)
every_mutating_op = pytest.mark.parametrize("op", MUTATING)
both_kernels = pytest.mark.parametrize("rows", [3, 5], ids=["T<=K", "T>K"])
adding_or_not = pytest.mark.parametrize("add", [True, False], ids=["add", "replace"])


@pytest.mark.sweep
@every_call
def test_values_are_within_the_budget(op: str, case: Case) -> None:
    call = build(op, case)
    budget = budget_of(op, call.args)
    budget.check(call.run(), call.written)


@pytest.mark.sweep
@every_call
def test_nothing_but_the_output_is_written(op: str, case: Case) -> None:
    call = build(op, case)
    outside, before = call.outside(), call.buffer.clone()
    call.run()
    assert same_bits(call.buffer[outside], before[outside])


@every_op
@both_kernels
def test_autocast_changes_nothing(op: str, rows: int) -> None:
    case = Case(T=rows, D=129, H=10)
    plain = build(op, case).run()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert same_bits(build(op, case).run(), plain)


@pytest.mark.sweep
@every_call
def test_operands_are_not_changed(op: str, case: Case) -> None:
    call = build(op, case)
    before = [operand.clone() for operand in _operands(call.args)]
    call.run()
    assert all(map(same_bits, _operands(call.args), before))


@pytest.mark.sweep
@pytest.mark.parametrize("case", cases_of(LORA_LINEAR), ids=str)
def test_a_functional_result_equals_its_base_where_there_is_nothing_to_add(case: Case) -> None:
    call = build(LORA_LINEAR, case)
    keep = ~call.written.to(DEVICE)
    assert same_bits(call.run()[keep], call.output[keep])


@pytest.mark.sweep
@pytest.mark.parametrize("case", cases_of(LORA_LINEAR), ids=str)
def test_a_functional_result_is_new_contiguous_and_of_the_dtype_of_its_base(case: Case) -> None:
    call = build(LORA_LINEAR, case)
    result = call.run()
    assert result.untyped_storage().data_ptr() != call.buffer.untyped_storage().data_ptr()
    assert (result.shape, result.dtype, result.is_contiguous()) == (call.output.shape, case.output, True)


@both_kernels
@adding_or_not
@pytest.mark.parametrize("op", [EXPAND, EXPAND_SLICE])
def test_rows_without_an_adapter_keep_their_value(op: str, rows: int, add: bool) -> None:
    call = build(op, Case(T=rows, H=10, add=add, indices=(-1, 1, 4, -7, 9)[:rows]))
    call.output[0, 0], call.output[0, 4] = torch.nan, -0.0
    before = call.output.clone()
    call.run()
    without = [t for t in range(rows) if t != 1]
    assert same_bits(call.output[without], before[without])
    assert not torch.equal(call.output[1], before[1])


@both_kernels
def test_shrink_zeroes_rows_without_an_adapter(rows: int) -> None:
    call = build(SHRINK, Case(T=rows, indices=(-1, 1, 4, -7, 9)[:rows]))
    without = [t for t in range(rows) if t != 1]
    assert torch.count_nonzero(call.run()[without, :3]) == 0
    assert torch.count_nonzero(call.output[1, :3]) == 3


@both_kernels
def test_shrink_zeroes_a_row_without_an_adapter_even_if_it_holds_nan(rows: int) -> None:
    call = build(SHRINK, Case(T=rows, indices=(1, -1, 2, 4, 3)[:rows]))
    call.args["inputs"][1] = torch.nan
    assert torch.count_nonzero(call.run()[1, :3]) == 0


@both_kernels
def test_shrink_leaves_columns_from_the_rank_on_untouched(rows: int) -> None:
    call = build(SHRINK, Case(T=rows, R=3, H=9))
    before = call.output[:, 3:].clone()
    assert same_bits(call.run()[:, 3:], before)


@both_kernels
@adding_or_not
def test_expand_leaves_columns_past_a_narrow_adapter_untouched(rows: int, add: bool) -> None:
    call = build(EXPAND, Case(T=rows, W=6, H=10, add=add))
    before = call.output[:, 6:].clone()
    assert same_bits(call.run()[:, 6:], before)


@both_kernels
@adding_or_not
def test_expand_drops_what_a_wide_adapter_has_past_the_output(rows: int, add: bool) -> None:
    wide = build(EXPAND, Case(T=rows, W=11, H=6, add=add))
    cut = build(EXPAND, Case(T=rows, W=11, H=6, add=add))
    cut.args["lora_b_weights"] = cut.args["lora_b_weights"][:, :6]
    wide.args["lora_b_weights"][:, 6:] = torch.nan
    assert same_bits(wide.run(), cut.run())


@both_kernels
def test_replacing_does_not_read_the_output(rows: int) -> None:
    call = build(EXPAND, Case(T=rows, indices=(0, 1, 2, 3, 0)[:rows], add=False))
    call.output[:] = torch.nan
    assert call.run().isfinite().all()


@pytest.mark.parametrize("op", [EXPAND, EXPAND_SLICE])
def test_adding_is_the_default(op: str) -> None:
    named, default = build(op, Case(add=True)), build(op, Case(add=True))
    del default.args["add_inputs"]
    assert same_bits(named.run(), default.run())


@pytest.mark.parametrize("op", [SHRINK, LORA_LINEAR])
def test_scaling_is_one_by_default(op: str) -> None:
    named, default = build(op, Case(scaling=1.0)), build(op, Case(scaling=1.0))
    del default.args["scaling"]
    assert same_bits(named.run(), default.run())


@both_kernels
@every_op
def test_nan_in_slots_that_no_row_uses_never_leaks(op: str, rows: int) -> None:
    case = Case(T=rows, H=10, indices=(2, -1, 2, 2**62, 2)[:rows])
    call = build(op, case)
    assert all(weights[[0, 1, 3]].isnan().all() for weights in call.weights())
    assert call.run()[call.written.to(DEVICE)].isfinite().all()


@both_kernels
@every_op
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_nan_and_infinity_of_one_row_never_reach_another(op: str, rows: int, value: float) -> None:
    case = Case(T=rows, H=10, indices=(0, 1, 0, 1, 0)[:rows])
    clean, dirty = build(op, case), build(op, case)
    dirty.args["inputs"][1] = value
    others = [t for t in range(rows) if t != 1]
    assert same_bits(dirty.run()[others], clean.run()[others])


@both_kernels
@every_op
def test_nan_in_the_weights_of_one_slot_stays_in_its_rows(op: str, rows: int) -> None:
    case = Case(T=rows, H=10, indices=(0, 1, 0, -1, 0)[:rows])
    clean, dirty = build(op, case), build(op, case)
    for weights in dirty.weights():
        weights[1] = torch.nan
    others = [t for t in range(rows) if t != 1]
    assert same_bits(dirty.run()[others], clean.run()[others])


@every_op
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["i32", "i64"])
def test_each_row_uses_its_own_adapter(op: str, index: torch.dtype) -> None:
    order = (3, 0, 2, 1)
    case = Case(T=4, index=index, indices=order)
    together = build(op, case).run()
    for t, i in enumerate(order):
        alone = build(op, case)
        alone.args["lora_indices_tensor"][:] = -1
        alone.args["lora_indices_tensor"][t] = i
        assert same_bits(alone.run()[t], together[t])


@every_op
def test_no_rows_are_fine(op: str) -> None:
    call = build(op, Case(T=0, H=10))
    assert call.run().shape == (0, 10)


@every_op
@pytest.mark.parametrize("empty", ["D", "R", "W"])
@both_kernels
def test_an_empty_dimension_adds_nothing(op: str, empty: str, rows: int) -> None:
    call = build(op, replace(Case(T=rows, H=10), **{empty: 0}))
    budget = budget_of(op, call.args)
    budget.check(call.run(), call.written)


# Fails where it is the output: all four ops then accumulate in float32. Reported.
@every_op
@pytest.mark.parametrize("position", range(3), ids=["inputs", "weights", "output"])
@both_kernels
def test_one_float64_operand_makes_all_float64(op: str, position: int, rows: int) -> None:
    dtypes = dict.fromkeys(("inputs", "weights", "output"), F32)
    dtypes[list(dtypes)[position]] = F64
    call = build(op, Case(T=rows, D=130, R=65, H=10, **dtypes))
    budget = budget_of(op, call.args)
    budget.check(call.run(), call.written)


@every_op
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_one_call_in_half_precision_accumulates_in_float32(op: str, dtype: torch.dtype) -> None:
    call = build(op, Case(D=1000, R=300, H=10, inputs=dtype, weights=dtype, output=F32))
    budget = budget_of(op, call.args)
    budget.check(call.run(), call.written)


@every_op
def test_the_op_the_overload_and_the_python_function_give_the_same_bits(op: str) -> None:
    case = Case(H=10, inputs=BF16, weights=F16)
    packet = getattr(torch.ops.xpu_lora, op)
    by_function, by_packet, by_overload = (build(op, case) for _ in range(3))
    wanted = by_function.run()
    for call, spelling in ((by_packet, packet), (by_overload, packet.default)):
        result = spelling(*call.args.values())
        assert same_bits(call.output if result is None else result, wanted)


@every_op
def test_arguments_may_be_named(op: str) -> None:
    case = Case(H=10)
    packet = getattr(torch.ops.xpu_lora, op)
    by_position, by_name, by_mixture = (build(op, case) for _ in range(3))
    wanted = packet(*by_position.args.values())
    wanted = by_position.output if wanted is None else wanted
    result = packet.default(**by_name.args)
    assert same_bits(by_name.output if result is None else result, wanted)
    (_, output), *named = by_mixture.args.items()
    result = packet.default(output, **dict(named))
    assert same_bits(output if result is None else result, wanted)


@every_mutating_op
def test_mutating_ops_return_nothing(op: str) -> None:
    call = build(op, Case())
    assert getattr(torch.ops.xpu_lora, op)(**call.args) is None


@every_mutating_op
def test_mutating_ops_bump_the_version_of_their_output(op: str) -> None:
    call = build(op, Case())
    before = call.output._version
    call.run()
    assert call.output._version > before


def test_lists_of_slices_may_be_tuples() -> None:
    listed, tupled = build(LORA_LINEAR, Case(H=10, slices=2)), build(LORA_LINEAR, Case(H=10, slices=2))
    tupled.args |= {name: tuple(tupled.args[name]) for name in ("lora_a", "lora_b", "slice_offsets")}
    assert same_bits(listed.run(), tupled.run())


def test_slices_of_a_functional_call_add_up() -> None:
    call = build(LORA_LINEAR, Case(H=10, slices=2, inputs=F64, weights=F64, output=F64))
    whole = call.run()
    step_by_step = call.output
    for a, b, offset in zip(call.args["lora_a"], call.args["lora_b"], call.args["slice_offsets"], strict=True):
        step_by_step = _one_slice(call.args, step_by_step, a, b, offset)
    torch.testing.assert_close(step_by_step, whole)


def test_a_functional_call_is_a_shrink_and_an_expand_in_full_precision() -> None:
    call = build(LORA_LINEAR, Case(H=10))
    hidden = torch.full((5, 3), torch.nan, device=DEVICE)
    chained = call.output.clone()
    indices, offset = call.args["lora_indices_tensor"], call.args["slice_offsets"][0]
    (a,), (b,) = call.args["lora_a"], call.args["lora_b"]
    torch.ops.xpu_lora.bgmv_shrink(hidden, call.args["inputs"], a, indices, call.args["scaling"])
    torch.ops.xpu_lora.bgmv_expand_slice(chained, hidden, b, indices, offset, b.shape[-2])
    budget = budget_of(LORA_LINEAR, call.args)
    budget.check(chained, call.written)


def _one_slice(args: dict[str, object], base: Tensor, a: Tensor, b: Tensor, offset: int) -> Tensor:
    indices, scaling = args["lora_indices_tensor"], args["scaling"]
    return torch.ops.xpu_lora.lora_linear(base, args["inputs"], [a], [b], indices, [offset], scaling)


def _operands(args: dict[str, object]) -> list[Tensor]:
    """The tensors of a call but its output."""
    _output, *rest = args.values()
    return [t for arg in rest for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, Tensor)]
