"""vllm-xpu-kernels: which of its ops are there, when they may be called; and that the double of them is as strict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import xpu_c
from torch import Tensor

from xpu_lora_compile.errors import KernelError
from xpu_lora_compile.kernels import vendor

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
T, D, R, K, W, H = 4, 6, 3, 2, 5, 8
OTHER = {"lora_shrink": "(Tensor inputs, Tensor[] lora_a_weights, Tensor! output_tensor) -> ()"}


def part(group: dict[str, str], *names: str) -> dict[str, str]:
    return {name: schema for name, schema in group.items() if name in names}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ((xpu_c.LORA,), "lora"),
        ((xpu_c.BGMV,), "bgmv"),
        ((xpu_c.BGMV, xpu_c.LORA), "lora"),
        ((xpu_c.BGMV, part(xpu_c.LORA, "lora_expand")), "bgmv"),
        ((xpu_c.BGMV, OTHER, part(xpu_c.LORA, "lora_expand")), "bgmv"),
    ],
    ids=["new", "old", "both", "half-of-new", "new-with-another-schema"],
)
def test_the_first_family_that_is_whole_is_found(groups: tuple[dict[str, str], ...], expected: str) -> None:
    with xpu_c.installed(*groups):
        assert vendor.family() == (expected, "")


def test_without_the_package_nothing_is_found() -> None:
    assert vendor.family() == ("", "it is not installed")


def test_a_missing_member_is_named() -> None:
    with xpu_c.installed(part(xpu_c.LORA, "lora_shrink"), part(xpu_c.BGMV, "bgmv_expand_slice")):
        assert vendor.family() == ("", "it has no lora_expand; it has no bgmv_shrink")


def test_another_schema_is_shown() -> None:
    with xpu_c.installed(OTHER, part(xpu_c.LORA, "lora_expand")):
        kind, why = vendor.family()
    assert kind == ""
    assert why.startswith("its lora_shrink has another schema: _xpu_C::lora_shrink(Tensor inputs, Tensor[] lora_a_w")


@pytest.mark.parametrize(
    "schema",
    [
        xpu_c.LORA["lora_expand"].replace("Tensor! output_tensor", "Tensor output_tensor"),
        xpu_c.LORA["lora_expand"].replace("-> ()", "-> Tensor"),
        xpu_c.LORA["lora_expand"].replace("int offset_start", "float offset_start"),
        xpu_c.LORA["lora_expand"].replace(", bool add_inputs", ""),
    ],
    ids=["no-write", "a-result", "another-type", "an-argument-less"],
)
def test_each_part_of_a_schema_counts(schema: str) -> None:
    with xpu_c.installed(part(xpu_c.LORA, "lora_shrink"), {"lora_expand": schema}):
        assert "its lora_expand has another schema" in vendor.family()[1]


def call_with(**changes: Any) -> dict[str, Any]:
    """Operands of a call that breaks no rule, but for the changes."""
    meta = {"device": "meta", "dtype": BF16}
    return {
        "outputs": [torch.empty(T, H, **meta)],
        "inputs": torch.empty(T, D, **meta),
        "lora_a": [torch.empty(K, R, D, **meta)],
        "lora_b": [torch.empty(K, W, R, **meta)],
        "indices": torch.empty(T, device="meta", dtype=torch.int64),
    } | changes


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


FAMILIES = pytest.mark.parametrize("kind", ["lora", "bgmv"])


@FAMILIES
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"inputs": meta(T, D, dtype=F32), "outputs": [meta(T, H, dtype=F32)]},
        {"lora_b": [meta(K, W, R, dtype=F16)]},
        {"lora_b": [meta(K, W + 3, R)[:, :W]]},
        {"indices": torch.empty(T, dtype=torch.int32, device="meta")},
    ],
    ids=["plain", "fp32-rows", "B-of-another-dtype", "leading-rows-of-B", "int32"],
)
def test_what_keeps_all_rules_is_not_refused(kind: str, changes: dict[str, Any]) -> None:
    assert vendor.refusal(kind, **call_with(**changes)) == ""


def test_the_two_families_differ_in_what_they_compare() -> None:
    other = call_with(lora_a=[meta(K, R, D, dtype=F16)])
    # The published rule is one of `bgmv_*`; nothing says what `lora_*` would read such an A as.
    assert vendor.refusal("bgmv", **other) == vendor.refusal("lora", **other) == "A must have the inputs' dtype"
    mixed = {"lora_b": [meta(K, W, R), meta(K, W, R, dtype=F16)], "lora_a": [meta(K, R, D)] * 2}
    mixed = call_with(**mixed, outputs=[meta(T, H)] * 2)
    assert vendor.refusal("bgmv", **mixed) == ""
    assert vendor.refusal("lora", **mixed) == "the slices of a call must have the same dtype"
    nine = call_with(lora_a=[meta(K, R, D)] * 9, lora_b=[meta(K, 1, R)] * 9, outputs=[meta(T, H)] * 9)
    assert vendor.refusal("bgmv", **nine) == ""
    assert vendor.refusal("lora", **nine) == "at most 8 slices"


MOST = 2**31


RULES: list[tuple[dict[str, Any], str]] = [
    ({"lora_a": [meta(K, R, D, dtype=F32)]}, "weights must be float16 or bfloat16"),
    ({"lora_b": [meta(K, W, R, dtype=F32)]}, "weights must be float16 or bfloat16"),
    ({"inputs": meta(T, D, dtype=F64)}, "inputs and outputs must be float16, bfloat16 or float32"),
    ({"outputs": [meta(T, H, dtype=torch.float64)]}, "inputs and outputs must be float16, bfloat16 or float32"),
    ({"inputs": meta(T, 2 * D)[:, :D]}, "inputs, outputs and indices must be contiguous"),
    ({"outputs": [meta(T, 2 * H)[:, :H]]}, "inputs, outputs and indices must be contiguous"),
    ({"indices": torch.empty(2 * T, dtype=torch.int64)[::2]}, "inputs, outputs and indices must be contiguous"),
    ({"lora_a": [meta(K, D, R).mT]}, "A must be contiguous, [K, R, D]"),
    ({"lora_b": [meta(K, R, W).mT]}, "B must be contiguous, [K, W, R], or the leading rows of such"),
    ({"lora_a": [meta(K, R, D), meta(K, R + 1, D)]}, "the slices of a call must have the same rank"),
    ({"inputs": meta(0, D)}, "no operand may be empty"),
    ({"inputs": meta(T, 0), "lora_a": [meta(K, R, 0)]}, "no operand may be empty"),
    ({"lora_a": [meta(K, 0, D)], "lora_b": [meta(K, W, 0)]}, "no operand may be empty"),
    ({"lora_b": [meta(K, 0, R)]}, "no operand may be empty"),
    ({"inputs": meta(MOST // 64, 64)}, "tensors must have less than 2**31 elements"),
    ({"outputs": [meta(1, MOST)]}, "tensors must have less than 2**31 elements"),
    ({"lora_a": [meta(2, MOST // 8, 4)]}, "tensors must have less than 2**31 elements"),
    ({"lora_b": [meta(2, MOST // 8, 4)]}, "tensors must have less than 2**31 elements"),
    ({"lora_b": [meta(2, MOST // 8, 4)[:, :W]]}, "tensors must have less than 2**31 elements"),
    # The rank vectors of both slices, and what a wider stack is expanded into before it is trimmed.
    (
        {"inputs": meta(MOST // 64, 1), "lora_a": [meta(K, 32, 1)] * 2, "lora_b": [meta(K, W, 32)] * 2},
        "tensors must have less than 2**31 elements",
    ),
    ({"inputs": meta(MOST // 64, 1), "lora_b": [meta(K, 64, R)[:, :W]]}, "tensors must have less than 2**31 elements"),
]


@FAMILIES
@pytest.mark.parametrize(
    ("changes", "rule"), RULES, ids=[f"{next(iter(changes))}-{at}" for at, (changes, _) in enumerate(RULES)]
)
def test_each_rule_refuses_alone(kind: str, changes: dict[str, Any], rule: str) -> None:
    assert vendor.refusal(kind, **call_with(**changes)).startswith(rule)


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": [meta(1, MOST - 1)]},
        {"inputs": meta(MOST // 64 - 1, 1), "lora_a": [meta(K, 32, 1)] * 2, "lora_b": [meta(K, W, 32)] * 2},
        {"inputs": meta(MOST // 64 - 1, 1), "lora_b": [meta(K, 64, R)[:, :W]]},
    ],
    ids=["output", "rank-vectors", "scratch"],
)
def test_a_little_less_is_not_too_many(changes: dict[str, Any]) -> None:
    assert vendor.refusal("lora", **call_with(**changes)) == ""


def test_rows_stored_are_those_of_the_stack_that_is_looked_into() -> None:
    stack = torch.empty(K, 9, R)
    for leading in (stack[:, :W], torch.empty(K, 1, 9, R).flatten(0, 1)[:, :W]):
        assert vendor.leads_a_stack(leading)
        assert vendor.rows_stored(leading) == 9
    # Contiguous as it is: of all rows, or of one slot alone.
    assert vendor.rows_stored(stack) == vendor.rows_stored(stack[:1, :W]) == 0
    # Slots that share rows, not the leading rows, other strides, or memory that ends too soon.
    assert not vendor.leads_a_stack(torch.empty(K * W * R).as_strided((K, W, R), ((W - 1) * R, R, 1)))
    assert not vendor.leads_a_stack(stack[:, 2 : 2 + W])
    assert not vendor.leads_a_stack(torch.empty(K, R, 9).mT[:, :W])
    assert not vendor.leads_a_stack(torch.empty(K, 9, R + 1)[:, :W, :R])
    assert not vendor.leads_a_stack(torch.empty(K, 18, R)[:, ::2])


@pytest.mark.parametrize(
    "view",
    [lambda b: b[:, ::2], lambda b: b[:1].expand(K, -1, -1), lambda b: b.mT.contiguous().mT],
    ids=["every-second-row", "one-slot-for-all", "by-rank"],
)
def test_what_is_stored_otherwise_than_the_graph_said_is_not_handed_over(view: Callable[[Tensor], Tensor]) -> None:
    a, b = torch.randn(K, R, D, dtype=BF16), view(torch.randn(K, 2 * W, R, dtype=BF16))
    output = torch.zeros(T, b.shape[1], dtype=BF16)
    slots = torch.zeros(T, dtype=torch.int32)
    with xpu_c.installed(xpu_c.LORA), pytest.raises(KernelError, match="stored as the graph said"):
        vendor.add_lora("lora", [output], torch.randn(T, D, dtype=BF16), [a], [b], slots, [0], [0], 1.0)
    assert not output.any()


# The double. Each op with a call that keeps all rules, and each rule broken alone.


def operands(name: str, **changes: Any) -> list[Any]:
    """A call of one op of the double that keeps its rules, but for the changes, by the names of its schema."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    i64 = torch.tensor([0, -1, 1, 0])
    given: dict[str, Any] = {
        "bgmv_shrink": {
            "outputs": random(T, R, dtype=F32),
            "inputs": random(T, D),
            "weights": random(K, R, D),
            "indices": i64,
            "scale": 0.5,
        },
        "bgmv_expand": {
            "outputs": random(T, W),
            "inputs": random(T, R, dtype=F32),
            "weights": random(K, W, R),
            "indices": i64,
            "add_to_output": True,
        },
        "bgmv_expand_slice": {
            "outputs": random(T, H),
            "inputs": random(T, R, dtype=F32),
            "weights": random(K, W, R),
            "indices": i64,
            "slice_offset": 2,
            "slice_size": W,
            "add_to_output": True,
        },
        "lora_shrink": {
            "inputs": random(T, D),
            "lora_a_weights": [random(K, R, D), random(K, R, D)],
            "output_tensor": random(2, T, R, dtype=F32),
            "lora_indices": i64.int(),
            "scaling": 0.5,
        },
        "lora_expand": {
            "inputs": random(2, T, R, dtype=F32),
            "lora_b_weights": [random(K, W, R), random(K, 2, R)],
            "output_tensor": random(T, H),
            "lora_indices": i64.int(),
            "offset_start": 1,
            "add_inputs": True,
        },
    }[name]
    assert set(changes) <= set(given)
    return list((given | changes).values())


def run(name: str, args: list[Any]) -> None:
    with xpu_c.installed(xpu_c.BGMV, xpu_c.LORA):
        getattr(torch.ops._xpu_C, name)(*args)


NAMES = [*xpu_c.BGMV, *xpu_c.LORA]
SIZE_RULE = "lora_b_weights.size(-2) must match slice_size"
MATCH = "inputs dtype must match lora_{}_weights dtype when inputs is not float32"


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_keeps_the_rules_runs(name: str) -> None:
    args = operands(name)
    run(name, args)
    run(
        name,
        [one.unsqueeze(1) if isinstance(one, Tensor) and one.dim() == 3 and one.dtype == BF16 else one for one in args],
    )


def half(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


I64, I32 = torch.zeros(T, dtype=torch.int64), torch.zeros(T, dtype=torch.int32)
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    # Sizes, of both sides, and in the op whose slice is the whole output.
    ("bgmv_expand", {"outputs": half(T, W + 1)}, SIZE_RULE),
    ("bgmv_expand", {"outputs": half(T, W - 1)}, SIZE_RULE),
    ("bgmv_expand_slice", {"slice_size": W - 1}, SIZE_RULE),
    ("bgmv_expand_slice", {"slice_size": W + 1}, SIZE_RULE),
    ("bgmv_expand_slice", {"slice_offset": H - W + 1}, ") is out of bounds for output dimension "),
    ("bgmv_shrink", {"inputs": half(T, D + 1)}, "inputs.size(1) must match lora_a_weights.size(-1)"),
    ("bgmv_shrink", {"outputs": half(T, R + 1)}, "output_tensor.size(1) must match lora_a_weights.size(-2)"),
    *[(name, {"indices": I32}, "lora_indices_tensor must be int64") for name in xpu_c.BGMV],
    *[(name, {"lora_indices": I64}, "lora_indices must be int32") for name in xpu_c.LORA],
    *[(name, {"indices": I64[:, None]}, "lora_indices_tensor must be 1D [batch_size]") for name in xpu_c.BGMV],
    *[(name, {"lora_indices": I32[:-1]}, ") must equal batch_size (") for name in xpu_c.LORA],
    *[(name, {"indices": I64.repeat(2)[::2]}, "lora_indices_tensor must be contiguous") for name in xpu_c.BGMV],
    *[(name, {"lora_indices": I32.repeat(2)[::2]}, "lora_indices must be contiguous XPU") for name in xpu_c.LORA],
    *[(name, {"indices": I64[:-1]}, "inputs.size(0) must match lora_indices_tensor.size(0)") for name in xpu_c.BGMV],
    ("bgmv_shrink", {"outputs": half(T + 1, R)}, "inputs.size(0) must match output_tensor.size(0)"),
    ("lora_shrink", {"output_tensor": half(2, T + 1, R)}, "output_tensor batch dim mismatch"),
    ("lora_expand", {"output_tensor": half(T + 1, H)}, ") must equal batch_size ("),
    ("bgmv_shrink", {"inputs": half(1, T, D)}, "inputs must be 2D [batch_size, hidden_size]"),
    ("bgmv_expand", {"inputs": half(1, T, R)}, "inputs must be 2D [batch_size, rank]"),
    ("bgmv_shrink", {"outputs": half(T, R, 1)}, "output_tensor must be 2D [batch_size, rank]"),
    ("lora_shrink", {"inputs": half(1, T, D)}, "inputs must be 2D [batch_size, hidden_size]"),
    ("lora_expand", {"output_tensor": half(T, H, 1)}, "output_tensor must be 2D [batch_size, total_output_dim]"),
    # Dtypes.
    ("bgmv_shrink", {"weights": half(K, R, D, dtype=F32)}, "lora_a_weights must be float16 or bfloat16"),
    ("bgmv_expand", {"weights": half(K, W, R, dtype=F32)}, "lora_b_weights must be float16 or bfloat16"),
    ("bgmv_expand_slice", {"weights": half(K, W, R, dtype=F32)}, "lora_b_weights must be float16 or bfloat16"),
    ("lora_shrink", {"lora_a_weights": [half(K, R, D, dtype=F32)] * 2}, "Unsupported weight type: "),
    ("lora_expand", {"lora_b_weights": [half(K, 2, R, dtype=F32)] * 2}, "Unsupported weight type: "),
    ("lora_shrink", {"lora_a_weights": [half(K, R, D), half(K, R, D, dtype=F16)]}, "] dtype mismatches slice 0"),
    ("lora_expand", {"lora_b_weights": [half(K, W, R), half(K, 2, R, dtype=F16)]}, "expected scalar type "),
    ("bgmv_shrink", {"weights": half(K, R, D, dtype=F16)}, MATCH.format("a")),
    ("bgmv_expand", {"inputs": half(T, R, dtype=F16)}, MATCH.format("b")),
    ("bgmv_expand_slice", {"inputs": half(T, R, dtype=F16)}, MATCH.format("b")),
    (
        "bgmv_shrink",
        {"outputs": half(T, R, dtype=F64)},
        "output_tensor must be float16, bfloat16, or float32",
    ),
    ("bgmv_expand_slice", {"inputs": half(T, R, dtype=F64)}, "inputs must be float16, bfloat16, or float32"),
    ("lora_shrink", {"inputs": half(T, D, dtype=F64)}, "lora_shrink_input"),
    ("lora_shrink", {"output_tensor": half(2, T, R, dtype=F64)}, "lora_shrink_output"),
    ("lora_expand", {"inputs": half(2, T, R, dtype=F64)}, "lora_expand_input"),
    ("lora_expand", {"output_tensor": half(T, H, dtype=F64)}, "Unsupported output type: "),
    # Contiguity.
    ("bgmv_shrink", {"outputs": half(T, 2 * R)[:, :R]}, "output_tensor must be contiguous"),
    ("bgmv_shrink", {"weights": half(K, D, R).mT}, "lora_a_weights must be contiguous"),
    ("bgmv_expand", {"weights": half(K, R, W).mT}, "lora_b_weights must be contiguous"),
    ("bgmv_expand_slice", {"weights": half(K, W + 1, R)[:, :W]}, "lora_b_weights must be contiguous"),
    ("bgmv_expand_slice", {"inputs": half(T, 2 * R)[:, :R]}, "inputs must be contiguous"),
    ("lora_shrink", {"inputs": half(T, 2 * D)[:, :D]}, "inputs must be contiguous XPU tensor"),
    ("lora_expand", {"lora_b_weights": [half(K, W, R), half(K, R, 2).mT]}, "] must be contiguous XPU tensor"),
    ("lora_expand", {"output_tensor": half(T, 2 * H)[:, :H]}, "output_tensor must be contiguous XPU tensor"),
    # Weights of other ranks than three, or four with a 1.
    ("bgmv_expand", {"weights": half(W, R)}, "lora_b_weights must be 3D [lora_num, slice_size, rank]"),
    ("bgmv_shrink", {"weights": half(K, 2, R, D)}, "lora_a_weights.size(1) must be 1"),
    ("lora_shrink", {"lora_a_weights": [half(R, D)] * 2}, "] must be 3D after squeeze"),
    ("lora_shrink", {"lora_a_weights": [half(K, 2, R, D)] * 2}, "].size(1) must be 1"),
    # Indices past the weights: only here does the double raise where the original reads on.
    ("bgmv_expand", {"indices": I64 + K}, "refuses an index >= K"),
    ("bgmv_expand_slice", {"indices": I64 + K}, "refuses an index >= K"),
    # Slices.
    ("lora_shrink", {"lora_a_weights": [half(K, R, D)] * 9}, "Too many slices ("),
    ("lora_expand", {"lora_b_weights": [half(K, 1, R)] * 9}, "Too many slices ("),
    ("lora_shrink", {"lora_a_weights": []}, "lora_a_weights must be non-empty"),
    ("lora_expand", {"lora_b_weights": []}, "lora_b_weights must be non-empty"),
    ("lora_shrink", {"output_tensor": half(3, T, R)}, "output_tensor.size(0) must match number of weight slices"),
    ("lora_shrink", {"output_tensor": half(2, T, R + 1)}, "output_tensor rank dim mismatch"),
    ("lora_shrink", {"lora_a_weights": [half(K, R, D), half(K, R + 1, D)]}, "] rank mismatch: expected "),
    ("lora_shrink", {"lora_a_weights": [half(K, R, D), half(K + 1, R, D)]}, "] num_loras mismatch: expected "),
    ("lora_expand", {"lora_b_weights": [half(K, W, R), half(K + 1, 2, R)]}, "] num_loras mismatch: expected "),
    ("lora_shrink", {"inputs": half(T, D + 1)}, "weight hidden dim mismatch at slice "),
    ("lora_expand", {"inputs": half(3, T, R)}, "inputs.size(0) must match num_slices"),
    ("lora_expand", {"lora_b_weights": [half(K, W, R), half(K, 2, R + 1)]}, "weight rank dim mismatch at slice "),
    ("bgmv_expand", {"weights": half(K, W, R + 1)}, "inputs.size(1) must match lora_b_weights.size(-1)"),
    ("bgmv_expand_slice", {"weights": half(K, W, R + 1)}, "inputs.size(1) must match lora_b_weights.size(-1)"),
    ("lora_expand", {"offset_start": H - W - 1}, ") exceeds output_tensor.size(1) ("),
    ("lora_expand", {"offset_start": -1}, ") out of range [0, "),
]


@pytest.mark.parametrize(
    ("name", "changes", "message"), BROKEN, ids=[f"{name}-{at}" for at, (name, *_) in enumerate(BROKEN)]
)
def test_the_double_raises_for_each_rule(name: str, changes: dict[str, Any], message: str) -> None:
    args = operands(name, **changes)
    with pytest.raises(RuntimeError) as error:
        run(name, args)
    assert message in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_double_refuses_what_32_bits_cannot_count(name: str) -> None:
    def run_with(elements: int) -> None:
        weights = meta(1, 1, elements)
        key = {"lora_shrink": "lora_a_weights", "lora_expand": "lora_b_weights"}.get(name, "weights")
        getattr(xpu_c, name)(*operands(name, **{key: [weights] * 2 if name in xpu_c.LORA else weights}))

    with pytest.raises(RuntimeError, match="the double refuses 2147483648 elements"):
        run_with(MOST)
    with pytest.raises(RuntimeError, match=r"must match|mismatch"):
        run_with(MOST - 1)


def test_bgmv_shrink_adds_to_what_is_there() -> None:
    outputs, *rest = operands("bgmv_shrink", outputs=torch.zeros(T, R))
    run("bgmv_shrink", [outputs, *rest])
    once = outputs.clone()
    run("bgmv_shrink", [outputs, *rest])
    torch.testing.assert_close(outputs, 2 * once)
    assert once[0].abs().sum() > 0


def test_lora_shrink_zeroes_first_and_then_writes() -> None:
    args = operands("lora_shrink", output_tensor=torch.full((2, T, R), torch.nan))
    run("lora_shrink", args)
    assert args[2].isfinite().all()
    # Row 1 has no adapter.
    assert args[2][:, 1].abs().sum() == 0


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("name", ["bgmv_expand", "bgmv_expand_slice", "lora_expand"])
def test_rows_without_an_adapter_keep_their_value_also_when_not_adding(name: str, add: bool) -> None:
    flag = "add_inputs" if name == "lora_expand" else "add_to_output"
    args = operands(name, **{flag: add})
    output = args[2] if name == "lora_expand" else args[0]
    before = output.clone()
    run(name, args)
    assert torch.equal(output[1], before[1])
    assert not torch.equal(output[0], before[0])


@pytest.mark.parametrize("name", ["bgmv_shrink", "lora_shrink", "lora_expand"])
def test_an_index_past_the_slots_is_skipped_by_the_others(name: str) -> None:
    index = I64 + K if name in xpu_c.BGMV else I32 + K
    args = operands(name, **{"indices" if name in xpu_c.BGMV else "lora_indices": index})
    output = args[0] if name in xpu_c.BGMV else args[2]
    before = torch.zeros_like(output) if name == "lora_shrink" else output.clone()
    run(name, args)
    assert torch.equal(output, before)


def test_lora_expand_takes_weights_that_are_narrower_than_the_output() -> None:
    args = operands("lora_expand")
    before = args[2].clone()
    run("lora_expand", args)
    # Slices of five and of two columns, from column 1 on.
    changed = (args[2] != before).any(0)
    assert changed.tolist() == [False, *[True] * (W + 2)]


@pytest.mark.parametrize("name", ["bgmv_shrink", "bgmv_expand", "bgmv_expand_slice", "lora_expand"])
def test_what_is_added_to_a_half_is_rounded_before_and_after(name: str) -> None:
    """1 + 2**-8 is a tie, which goes to the even 1; more of it would go up, had it not been rounded first."""
    more, there = 2**-8 * (1 + 2**-9), 1.0
    inputs, weights = torch.full((1, 1), more), torch.ones(1, 1, 1, dtype=BF16)
    indices = torch.zeros(1, dtype=torch.int64)
    output = torch.full((1, 1), there, dtype=BF16)
    args: dict[str, list[Any]] = {
        "bgmv_shrink": [output, inputs, weights, indices, 1.0],
        "bgmv_expand": [output, inputs, weights, indices, True],
        "bgmv_expand_slice": [output, inputs, weights, indices, 0, 1, True],
        "lora_expand": [inputs[None], [weights], output, indices.int(), 0, True],
    }
    run(name, args[name])
    assert output.item() == 1.0
    assert torch.tensor(there + more).bfloat16().item() > 1.0


def test_expanding_without_adding_replaces() -> None:
    outputs, inputs, weights, *rest = operands("bgmv_expand_slice", add_to_output=False)
    run("bgmv_expand_slice", [outputs, inputs, weights, *rest])
    torch.testing.assert_close(outputs[0, 2 : 2 + W], (weights[0].float() @ inputs[0]).bfloat16())
