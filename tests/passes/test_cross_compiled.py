"""Graphs for an Intel GPU, traced here with fake tensors on device `xpu`, and run here on a double of the vendor's ops.

Nothing in this file has run on an Intel GPU. That one graph comes out of fake tensors, which hold no numbers, says that
nothing is decided by the indices.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support import xpu_c
from support.cases import DEVICE, KERNELS_HERE
from support.cross import Traced, for_intel
from support.snapshot import calls_in
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.nn.functional import linear

import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import force_kernel, vendor
from xpu_lora_compile.ops import VALID_SLOTS
from xpu_lora_compile.ops.budget import budget_of
from xpu_lora_compile.torch_internals import without_memory

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="it needs no device")

# The module, whose name its function has in the package.
lower: Any = importlib.import_module("xpu_lora_compile.passes.lower")

NEW, OLD, NONE = (xpu_c.LORA, xpu_c.BGMV), (xpu_c.BGMV,), ()
T, D, R, K, H = 7, 16, 4, 3, 10
# Rows without an adapter, and rows whose index is no slot, which one of the vendor's ops does not check.
INDICES = (0, -1, K, 2, K + 5, 1, 0)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def random(device: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def indices_on(device: str) -> Tensor:
    # Where torch was built without the device, no numbers can go there, not even fake ones.
    return torch.tensor(INDICES) if device == "cpu" else torch.zeros(T, dtype=torch.int64, device=device)


def one_slice(x: Tensor, w: Tensor, a: Tensor, b: Tensor, i: Tensor) -> Tensor:
    """As an engine writes it: the seed's two ops."""
    output, hidden = linear(x, w), x.new_empty(x.shape[0], a.shape[1], dtype=torch.float32)
    xlc.bgmv_shrink(hidden, x, a, i)
    xlc.bgmv_expand(output, hidden, b, i)
    return output


def operands(device: str, width: int, dtype: torch.dtype = BF16, rows: torch.dtype | None = None) -> list[Tensor]:
    rows = rows or dtype
    shapes = ((T, D), rows), ((H, D), rows), ((K, R, D), dtype), ((K, width, R), dtype)
    return [*(random(device, *shape, dtype=one) for shape, one in shapes), indices_on(device)]


def packed(
    x: Tensor, w: Tensor, aq: Tensor, ak: Tensor, av: Tensor, bq: Tensor, bk: Tensor, bv: Tensor, i: Tensor
) -> Tensor:
    return xlc.lora_linear(linear(x, w), x, [aq, ak, av], [bq, bk, bv], i, [0, 8, 12], 0.5)


def unpacked(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    aq: Tensor,
    ak: Tensor,
    av: Tensor,
    bq: Tensor,
    bk: Tensor,
    bv: Tensor,
    i: Tensor,
) -> tuple[Tensor, ...]:
    q = xlc.lora_linear(linear(x, wq), x, [aq], [bq], i, [0], 0.5)
    k = xlc.lora_linear(linear(x, wk), x, [ak], [bk], i, [0], 0.5)
    return q, k, xlc.lora_linear(linear(x, wv), x, [av], [bv], i, [0], 0.5)


WIDTHS = (8, 4, 4)


def qkv_operands(device: str, dtype: torch.dtype, rows: torch.dtype, *, is_packed: bool) -> list[Tensor]:
    bases = [random(device, width, D, dtype=rows) for width in ((sum(WIDTHS),) if is_packed else WIDTHS)]
    a = [random(device, K, R, D, dtype=dtype) for _ in WIDTHS]
    b = [random(device, K, width, R, dtype=dtype) for width in WIDTHS]
    return [random(device, T, D, dtype=rows), *bases, *a, *b, indices_on(device)]


def without_inputs(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not line.endswith("= input"))


def copies_no_weight(traced: Traced, *shapes: Sequence[int]) -> None:
    """No op makes a tensor of a weight's size, whatever it is called; views are not among the calls."""
    assert not re.search(r"(bf16|f16|f32)\[.*(clone|contiguous)|copy_\(|item|cond", traced.after_aot)
    made = [match[1] for line in traced.calls if (match := re.match(r"%\d+: \w+\[(.*?)\] = ", line))]
    assert not {", ".join(map(str, shape)) for shape in shapes} & set(made)


# One slice, by the relation of its widths.


@pytest.mark.parametrize("width", [H, H - 1], ids=["equal", "narrower"])
def test_one_slice_is_two_calls_of_the_new_ops(width: int) -> None:
    traced = for_intel(one_slice, lambda device: operands(device, width), NEW)
    copies_no_weight(traced, (K, width, R), (K, R, D))
    assert traced.kernels == ["index conversion", "lora_shrink", "lora_expand"]
    if width == H:
        return
    assert_expected_inline(
        without_inputs(traced.text),
        """\
%5: bf16[7, 10] = linear(%0, %1)
%6: i32[7] = xpu_lora.valid_slots(%2, 3, True)
xpu_lora.vendor_add_lora((%5), %0, (%3), (%4), %6, (0), (0), 1.0, lora)
return (%5)""",
    )
    assert_expected_inline(
        "\n".join(traced.calls),
        """\
%7: b8[7] = aten.lt.Scalar(%2, 0)
%8: b8[7] = aten.ge.Scalar(%2, 3)
%9: b8[7] = aten.bitwise_or.Tensor(%7, %8)
%10: i64[7] = aten.masked_fill.Scalar(%2, %9, -1)
%11: i32[7] = aten._to_copy(%10, dtype=int32)
%12: f32[1, 7, 4] = aten.new_empty(%1, (1, 7, 4), dtype=float32, pin_memory=False)
_xpu_C.lora_shrink(%1, (%3), %12, %11, 1.0)
_xpu_C.lora_expand(%14, (%4), %6, %11, 0, True)""",
    )


@pytest.mark.parametrize("width", [H, H - 1], ids=["equal", "narrower"])
def test_the_old_ops_are_told_the_size_of_the_slice(width: int) -> None:
    traced = for_intel(one_slice, lambda device: operands(device, width), OLD)
    copies_no_weight(traced, (K, width, R), (K, R, D))
    assert traced.kernels == ["index conversion", "new_zeros", "bgmv_shrink", "bgmv_expand_slice"]
    if width == H:
        return
    assert_expected_inline(
        "\n".join(traced.calls),
        """\
%7: b8[7] = aten.lt.Scalar(%2, 0)
%8: b8[7] = aten.ge.Scalar(%2, 3)
%9: b8[7] = aten.bitwise_or.Tensor(%7, %8)
%10: i64[7] = aten.masked_fill.Scalar(%2, %9, -1)
%11: f32[7, 4] = aten.new_zeros(%1, (7, 4), dtype=float32, pin_memory=False)
_xpu_C.bgmv_shrink(%11, %1, %3, %10, 1.0)
_xpu_C.bgmv_expand_slice(%6, %11, %4, %10, 0, 9, True)""",
    )


def test_a_wider_stack_is_expanded_whole_into_a_scratch_and_trimmed() -> None:
    traced = for_intel(one_slice, lambda device: operands(device, H + 2), NEW)
    copies_no_weight(traced, (K, H + 2, R), (K, H, R), (K, R, D))
    # All rows that are in memory, as a view.
    assert f"bf16[{K}, {H + 2}, {R}] = aten.as_strided(" in traced.after_aot
    assert_expected_inline(
        without_inputs(traced.text),
        """\
%5: bf16[7, 10] = linear(%0, %1)
%6: bf16[3, 10, 4] = aten.slice.Tensor(%2, -2, 0, 10)
%7: i32[7] = xpu_lora.valid_slots(%3, 3, True)
xpu_lora.vendor_add_lora((%5), %0, (%4), (%6), %7, (0), (0), 1.0, lora)
return (%5)""",
    )
    assert_expected_inline(
        "\n".join(traced.calls),
        """\
%8: b8[7] = aten.lt.Scalar(%3, 0)
%9: b8[7] = aten.ge.Scalar(%3, 3)
%10: b8[7] = aten.bitwise_or.Tensor(%8, %9)
%11: i64[7] = aten.masked_fill.Scalar(%3, %10, -1)
%12: i32[7] = aten._to_copy(%11, dtype=int32)
%13: f32[1, 7, 4] = aten.new_empty(%1, (1, 7, 4), dtype=float32, pin_memory=False)
_xpu_C.lora_shrink(%1, (%4), %13, %12, 1.0)
%16: f32[7, 12] = aten.new_zeros(%1, (7, 12), dtype=float32, pin_memory=False)
_xpu_C.lora_expand(%17, (%15), %16, %12, 0, True)
%21: f32[7, 10] = aten.add.Tensor(%19, %20)
%22: bf16[7, 10] = aten._to_copy(%21, dtype=bfloat16, layout=torch.strided)
%23: bf16[7, 10] = aten.slice_scatter(%6, %22, 1, 0, 10)""",
    )


def test_a_wider_stack_works_with_the_old_ops_too() -> None:
    traced = for_intel(one_slice, lambda device: operands(device, H + 2), OLD)
    copies_no_weight(traced, (K, H + 2, R), (K, H, R), (K, R, D))
    assert f"bf16[{K}, {H + 2}, {R}] = aten.as_strided(" in traced.after_aot
    assert re.search(rf"_xpu_C\.bgmv_expand_slice\(%\d+, %\d+, %\d+, %\d+, 0, {H + 2}, True\)", traced.after_aot)


# Several slices.


def test_packed_qkv_is_at_most_three_device_calls() -> None:
    traced = for_intel(packed, lambda device: qkv_operands(device, BF16, BF16, is_packed=True), NEW)
    conversion, *calls = traced.kernels
    assert conversion == "index conversion"
    assert calls == ["lora_shrink", "lora_expand"]
    assert len(calls) <= 3
    copies_no_weight(traced, *((K, width, R) for width in WIDTHS), (K, R, D))
    assert_expected_inline(
        without_inputs(traced.text),
        """\
%9: bf16[7, 16] = linear(%0, %1)
%10: i32[7] = xpu_lora.valid_slots(%2, 3, True)
xpu_lora.vendor_add_lora((%9), %0, (%3, %4, %5), (%6, %7, %8), %10, (0, 0, 0), (0, 8, 12), 0.5, lora)
return (%9)""",
    )
    assert_expected_inline(
        "\n".join(line for line in traced.calls if "_xpu_C" in line),
        """\
_xpu_C.lora_shrink(%1, (%3, %4, %5), %16, %15, 0.5)
_xpu_C.lora_expand(%18, (%6, %7, %8), %10, %15, 0, True)""",
    )


def test_packed_qkv_with_the_old_ops_zeroes_each_rank_vector_and_copies_nothing() -> None:
    traced = for_intel(packed, lambda device: qkv_operands(device, BF16, BF16, is_packed=True), OLD)
    _, *calls = traced.kernels
    assert calls == [*["new_zeros"] * 3, *["bgmv_shrink"] * 3, *["bgmv_expand_slice"] * 3]
    copies_no_weight(traced, *((K, width, R) for width in WIDTHS), (K, R, D))
    assert_expected_inline(
        "\n".join(line for line in traced.calls if "_xpu_C" in line),
        """\
_xpu_C.bgmv_shrink(%15, %1, %3, %14, 0.5)
_xpu_C.bgmv_shrink(%16, %1, %4, %14, 0.5)
_xpu_C.bgmv_shrink(%17, %1, %5, %14, 0.5)
_xpu_C.bgmv_expand_slice(%10, %15, %6, %14, 0, 8, True)
_xpu_C.bgmv_expand_slice(%10, %16, %7, %14, 8, 4, True)
_xpu_C.bgmv_expand_slice(%10, %17, %8, %14, 12, 4, True)""",
    )


def test_unpacked_qkv_shrinks_once_and_expands_into_each_output() -> None:
    traced = for_intel(unpacked, lambda device: qkv_operands(device, BF16, BF16, is_packed=False), NEW)
    assert traced.kernels == ["index conversion", "lora_shrink", *["lora_expand"] * 3]
    copies_no_weight(traced, *((K, width, R) for width in WIDTHS), (K, R, D))
    assert_expected_inline(
        without_inputs(traced.text),
        """\
%11: bf16[7, 8] = linear(%0, %1)
%12: bf16[7, 4] = linear(%0, %2)
%13: bf16[7, 4] = linear(%0, %3)
%14: i32[7] = xpu_lora.valid_slots(%4, 3, True)
xpu_lora.vendor_add_lora((%11, %12, %13), %0, (%5, %6, %7), (%8, %9, %10), %14, (0, 1, 2), (0, 0, 0), 0.5, lora)
return (%11, %12, %13)""",
    )
    assert_expected_inline(
        "\n".join(line for line in traced.calls if "_xpu_C" in line),
        """\
_xpu_C.lora_shrink(%1, (%5, %6, %7), %22, %21, 0.5)
_xpu_C.lora_expand(%24, (%8), %12, %21, 0, True)
_xpu_C.lora_expand(%26, (%9), %14, %21, 0, True)
_xpu_C.lora_expand(%28, (%10), %16, %21, 0, True)""",
    )


@pytest.mark.parametrize("groups", [NEW, OLD], ids=["new", "old"])
def test_a_view_is_written_to_by_way_of_a_scratch(groups: tuple[dict[str, str], ...]) -> None:
    def into_a_part(x: Tensor, w: Tensor, a: Tensor, b: Tensor, i: Tensor) -> Tensor:
        both = linear(x, w).repeat(2, 1).view(2, T, H)
        hidden = x.new_empty(T, R, dtype=torch.float32)
        xlc.bgmv_shrink(hidden, x, a, i)
        xlc.bgmv_expand(both.select(0, 1), hidden, b, i)
        return both

    traced = for_intel(into_a_part, lambda device: operands(device, H), groups)
    rank_vectors = 0 if groups is NEW else 1
    assert traced.kernels.count("new_zeros") == rank_vectors + 1
    torch.manual_seed(0)
    x, w, a, b, i = values = operands("cpu", H)
    (got,) = traced.run_on(groups, named(into_a_part, values))
    assert torch.equal(got[0], linear(x, w))
    check(linear(x, w), x, [a], [b], i, [0], 1.0, got[1])


@pytest.mark.skipif("triton" not in KERNELS_HERE, reason="Triton is not installed")
def test_without_the_wheel_the_triton_kernels_run() -> None:
    traced = for_intel(packed, lambda device: qkv_operands(device, BF16, BF16, is_packed=True), NONE)
    assert traced.kernels == ["xpu_lora.triton_route_tiles", "xpu_lora.triton_add_lora"]
    notes = traced.decisions[0].notes
    assert "lower: kernel vendor is not used: vllm-xpu-kernels is not installed" in notes
    assert "lower: Inductor launches its kernels" in notes
    assert_expected_inline(
        without_inputs(traced.text),
        """\
%9: bf16[7, 16] = linear(%0, %1)
%10: i32[4, 17] = xpu_lora.triton_route_tiles(%2, 3, 7)
xpu_lora.triton_add_lora((%9), %0, (%3, %4, %5), (%6, %7, %8), %2, (0, 0, 0), (0, 8, 12), 0.5, 7, %10)
return (%9)""",
    )


@pytest.mark.parametrize(
    ("groups", "op"),
    [
        (NEW, "valid_slots"),
        pytest.param(
            NONE,
            "triton_route_tiles",
            marks=pytest.mark.skipif("triton" not in KERNELS_HERE, reason="Triton is not installed"),
        ),
    ],
)
def test_the_report_counts_the_routing_computation_of_the_device(groups: tuple[dict[str, str], ...], op: str) -> None:
    torch._dynamo.reset()
    with xpu_c.installed(*groups), without_memory():
        report = xlc.explain(one_slice, bandwidth=1)(*operands("xpu", H))
    assert report.graphs[0].calls_after[op] == 1
    assert report.counts["routings"] == 1
    assert "1 site became 1 call, with 1 routing computation, in 1 graph." in str(report)


@pytest.mark.parametrize("groups", [NEW, OLD], ids=["new", "old"])
def test_layers_on_the_same_indices_share_one_conversion(groups: tuple[dict[str, str], ...]) -> None:
    def layers(x: Tensor, w: Tensor, a: Tensor, b: Tensor, i: Tensor) -> Tensor:
        first = one_slice(x, w, a, b, i)
        return one_slice(torch.relu(first.narrow(1, 0, 1)) * x, w, a, b, i) + one_slice(x * 2, w, a, b, i)

    traced = for_intel(layers, lambda device: operands(device, H), groups)
    assert (calls_in(traced.text, "valid_slots"), calls_in(traced.text, "vendor_add_lora")) == (1, 3)
    assert traced.after_aot.count("aten.masked_fill") == 1
    assert traced.kernels.count("index conversion") == 1


# A model with adapters attached.


class Model(nn.Module):
    """Three projections, and logits padded from 65 columns to 72."""

    def __init__(self, device: str) -> None:
        super().__init__()
        for name, width in (("q", 8), ("k", 4), ("v", 4), ("lm_head", 72)):
            # Random weights cannot be drawn for a device that torch was built without.
            layer = nn.Linear(D, width, bias=False, device="meta")
            layer.weight = nn.Parameter(torch.empty(width, D, device=device, dtype=BF16), requires_grad=False)
            setattr(self, name, layer)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.lm_head(x * 2), self.q(x), self.k(x), self.v(x)


def attached(device: str) -> tuple[Model, Tensor]:
    model = Model(device)
    xlc.attach(model, slots=K, max_rank=R, target_modules=["q", "k", "v", "lm_head"], vocab_size=65)
    # What `bank.use` sets, which takes real tensors.
    model.q.lora_routing.sequence_slots = torch.zeros(2, dtype=torch.int64, device=device)
    model.q.lora_routing.ranks = torch.zeros(K, dtype=torch.int32, device=device)
    return model, random(device, 2, 3, D)


def run_model(model: Model, x: Tensor) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = model(x)
    return result


def test_an_attached_model_stores_b_as_the_vendor_reads_it() -> None:
    traced = for_intel(run_model, attached, NEW)
    assert calls_in(traced.text, "valid_slots") == 1
    assert traced.kernels.count("lora_shrink") == 2
    assert traced.kernels.count("lora_expand") == 4
    copies_no_weight(traced, (K, 65, R), (K, 8, R), (K, 4, R), (K, R, D))
    assert not any("is not used" in note for decision in traced.decisions for note in decision.notes)
    # q, k and v are one call, and the padded logits another.
    outputs = [re.sub(r"\), %.*", ")", line) for line in traced.text.split("\n") if "vendor_add_lora" in line]
    assert_expected_inline(
        "\n".join(outputs),
        """\
xpu_lora.vendor_add_lora((%20)
xpu_lora.vendor_add_lora((%26, %29, %32)""",
    )


# Numbers: the graph that was traced for `xpu`, run here on the double.

DTYPES = pytest.mark.parametrize(
    ("dtype", "rows"),
    [(BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)],
    ids=["bf16", "fp16", "bf16-fp32", "fp16-fp32"],
)
SETS = pytest.mark.parametrize("groups", [NEW, OLD], ids=["new", "old"])


def named(function: Callable[..., Any], values: Sequence[Tensor]) -> dict[str, Tensor]:
    code = function.__code__
    return dict(zip(code.co_varnames[: code.co_argcount], values, strict=True))


def check(
    base: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], i: Tensor, at: list[int], by: float, got: Tensor
) -> None:
    """Within the budget of the kernel `vendor`, and rows without an adapter as they were."""
    names = ("base", "inputs", "lora_a", "lora_b", "lora_indices_tensor", "slice_offsets", "scaling")
    given = dict(zip(names, (base, x, a, b, i, at, by), strict=True))
    budget = budget_of("lora_linear", given, rounds_before_adding=True)
    budget.check(got, torch.ones(got.shape, dtype=torch.bool))
    without = (i < 0) | (i >= K)
    assert torch.equal(got[without], base[without])
    assert not torch.equal(got[~without], base[~without])


@pytest.mark.sweep
@SETS
@DTYPES
@pytest.mark.parametrize("width", [H, H - 1, H + 2], ids=["equal", "narrower", "wider"])
def test_one_slice_computes_what_the_contract_says(
    groups: tuple[dict[str, str], ...], dtype: torch.dtype, rows: torch.dtype, width: int
) -> None:
    traced = for_intel(one_slice, lambda device: operands(device, width, dtype, rows), groups, after_aot=False)
    assert calls_in(traced.text, "vendor_add_lora") == 1
    torch.manual_seed(0)
    x, w, a, b, i = values = operands("cpu", width, dtype, rows)
    # What no row asks for must not be read, nor may the rows of B past the columns reach them.
    b[:, H:] = torch.nan
    (got,) = traced.run_on(groups, named(one_slice, values))
    check(linear(x, w), x, [a], [b[:, :H]], i, [0], 1.0, got)


@pytest.mark.sweep
@SETS
@DTYPES
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "unpacked"])
def test_qkv_computes_what_the_contract_says(
    groups: tuple[dict[str, str], ...], dtype: torch.dtype, rows: torch.dtype, is_packed: bool
) -> None:
    function = packed if is_packed else unpacked
    traced = for_intel(
        function, lambda device: qkv_operands(device, dtype, rows, is_packed=is_packed), groups, after_aot=False
    )
    assert calls_in(traced.text, "vendor_add_lora") == 1
    torch.manual_seed(0)
    values = qkv_operands("cpu", dtype, rows, is_packed=is_packed)
    results = traced.run_on(groups, named(function, values))
    x, *bases, aq, ak, av, bq, bk, bv, i = values
    if is_packed:
        check(linear(x, bases[0]), x, [aq, ak, av], [bq, bk, bv], i, [0, 8, 12], 0.5, results[0])
        return
    for base, a, b, got in zip(bases, (aq, ak, av), (bq, bk, bv), results, strict=True):
        check(linear(x, base), x, [a], [b], i, [0], 0.5, got)


def test_weights_with_a_slice_dimension_are_taken_as_they_are() -> None:
    def make(device: str) -> list[Tensor]:
        x, w, a, b, i = operands(device, H + 2)
        return [x, w, a.unsqueeze(1), b.unsqueeze(1), i]

    def with_slice_dim(x: Tensor, w: Tensor, a: Tensor, b: Tensor, i: Tensor) -> Tensor:
        output, hidden = linear(x, w), x.new_empty(x.shape[0], a.shape[-2], dtype=torch.float32)
        xlc.bgmv_shrink(hidden, x, a, i)
        xlc.bgmv_expand(output, hidden, b, i)
        return output

    traced = for_intel(with_slice_dim, make, NEW)
    copies_no_weight(traced, (K, H + 2, R), (K, 1, H + 2, R), (K, 1, H, R), (K, 1, R, D))
    torch.manual_seed(0)
    values = make("cpu")
    x, w, a, b, i = values
    (got,) = traced.run_on(NEW, named(with_slice_dim, values))
    check(linear(x, w), x, [a.squeeze(1)], [b.squeeze(1)[:, :H]], i, [0], 1.0, got)


def test_the_seeds_own_call_fails_where_the_rewritten_graph_runs() -> None:
    torch.manual_seed(0)
    x, w, a, b, i = values = operands("cpu", H - 1)
    # The vendor reads past the weights at K, and the double says so: not what this is about.
    i = i.clamp(max=K - 1)
    with xpu_c.installed(xpu_c.BGMV):
        output, hidden = linear(x, w), torch.zeros(T, R)
        torch.ops._xpu_C.bgmv_shrink(hidden, x, a, i, 1.0)
        with pytest.raises(RuntimeError, match=r"^lora_b_weights\.size\(-2\) must match slice_size$"):
            torch.ops._xpu_C.bgmv_expand(output, hidden, b, i, True)
    traced = for_intel(one_slice, lambda device: operands(device, H - 1), OLD, after_aot=False)
    (got,) = traced.run_on(OLD, named(one_slice, values))
    assert torch.equal(got[:, -1], linear(x, w)[:, -1])


# Where a rule fails, another kernel runs, and the decision says which rule.


def changed(at: int, change: Callable[[Tensor], Tensor]) -> Callable[[str], list[Tensor]]:
    def make(device: str) -> list[Tensor]:
        values = operands(device, H)
        values[at] = change(values[at])
        return values

    return make


BROKEN: dict[str, tuple[Callable[[str], list[Tensor]], str]] = {
    "fp32-weights": (lambda device: operands(device, H, F32), "weights must be float16 or bfloat16"),
    "float64-rows": (
        lambda device: operands(device, H, BF16, torch.float64),
        "inputs and outputs must be float16, bfloat16 or float32",
    ),
    "strided-inputs": (
        changed(0, lambda x: x.new_empty(T, 2 * D).narrow(1, 0, D)),
        "inputs, outputs and indices must be contiguous",
    ),
    "strided-indices": (
        changed(4, lambda i: i.new_empty(T, 2).select(1, 0)),
        "inputs, outputs and indices must be contiguous",
    ),
    "A-transposed": (changed(2, lambda a: a.new_empty(K, D, R).mT), "A must be contiguous, [K, R, D]"),
    "B-transposed": (
        changed(3, lambda b: b.new_empty(K, R, H).mT),
        "B must be contiguous, [K, W, R], or the leading rows of such a stack",
    ),
}


@SETS
@pytest.mark.parametrize("make_and_rule", BROKEN.values(), ids=list(BROKEN))
def test_the_decision_says_which_rule_fails(
    groups: tuple[dict[str, str], ...], make_and_rule: tuple[Callable[[str], list[Tensor]], str]
) -> None:
    make, rule = make_and_rule
    traced = for_intel(one_slice, make, groups, after_aot=False)
    assert calls_in(traced.text, "vendor_add_lora") == calls_in(traced.text, "valid_slots") == 0
    # Whoever launches: where Triton is, Inductor; what Triton refuses too is for an op that chooses.
    assert calls_in(traced.text, "triton_add_lora") + calls_in(traced.text, "add_lora") == 1
    (reason,) = [note for note in traced.decisions[0].notes if note.startswith("lower: kernel vendor is not used: ")]
    assert reason.removeprefix("lower: kernel vendor is not used: ").startswith(rule)


def test_the_families_own_rules_are_told_too() -> None:
    def other_a(device: str) -> list[Tensor]:
        x, w, a, b, i = operands(device, H)
        return [x, w, a.to(F16), b, i]

    old, new = (for_intel(one_slice, other_a, groups, after_aot=False) for groups in (OLD, NEW))
    for traced in (old, new):
        assert "lower: kernel vendor is not used: A must have the inputs' dtype" in traced.decisions[0].notes

    def nine(x: Tensor, w: Tensor, a: Tensor, b: Tensor, i: Tensor) -> Tensor:
        return xlc.lora_linear(linear(x, w), x, [a] * 9, [b] * 9, i, list(range(9)))

    old, new = (for_intel(nine, lambda d: operands(d, 1), groups, after_aot=False) for groups in (OLD, NEW))
    assert calls_in(old.text, "vendor_add_lora") == 1
    assert "lower: kernel vendor is not used: at most 8 slices" in new.decisions[0].notes


def test_slices_that_share_columns_are_left_to_other_kernels() -> None:
    def overlapping(x: Tensor, w: Tensor, a: Tensor, b: Tensor, i: Tensor) -> Tensor:
        return xlc.lora_linear(linear(x, w), x, [a, a], [b, b], i, [0, 3])

    traced = for_intel(overlapping, lambda device: operands(device, 5), NEW, after_aot=False)
    assert "lower: kernel vendor is not used: slices must not share columns" in traced.decisions[0].notes


def test_slices_of_different_ranks_are_left_to_other_kernels() -> None:
    def two_ranks(x: Tensor, w: Tensor, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, i: Tensor) -> Tensor:
        return xlc.lora_linear(linear(x, w), x, [a, a2], [b, b2], i, [0, 5])

    def make(device: str) -> list[Tensor]:
        *values, i = operands(device, 5)
        return [*values, random(device, K, 2, D), random(device, K, 5, 2), i]

    (decision,) = for_intel(two_ranks, make, NEW, after_aot=False).decisions
    assert "lower: kernel vendor is not used: the slices of a call must have the same rank" in decision.notes


def test_a_forced_kernel_is_what_runs() -> None:
    with force_kernel("gather"):
        traced = for_intel(one_slice, lambda device: operands(device, H), NEW, after_aot=False)
    assert "vendor" not in traced.text
    assert "lower: kernel vendor is not used: gather was forced" in traced.decisions[0].notes


def test_the_same_call_for_a_cpu_knows_nothing_of_the_vendor() -> None:
    with xpu_c.installed(*NEW), torch.no_grad(), xlc.record_decisions() as decisions:
        torch._dynamo.reset()
        torch.compile(one_slice, backend="xpu_lora", options={"xpu_lora.execute": "eager"})(*operands("cpu", H))
    assert not any("vllm-xpu-kernels" in note for one in decisions for note in one.notes)


def test_rewriting_twice_changes_nothing() -> None:
    texts: list[str] = []

    def twice(module: torch.fx.GraphModule) -> list[Any]:
        from xpu_lora_compile.passes.text import as_text

        decisions = xlc.rewrite(module)
        texts.append(as_text(module))
        xlc.rewrite(module)
        return decisions

    traced = for_intel(one_slice, lambda device: operands(device, H), NEW, after_aot=False, passes=twice)
    assert [traced.text] == texts


# Any number of rows.


@SETS
@pytest.mark.parametrize("function", [one_slice, packed])
def test_one_graph_for_any_number_of_rows_calls_the_same_ops(
    groups: tuple[dict[str, str], ...], function: Callable[..., Any]
) -> None:
    """T is a symbol, with a guard that keeps the 32 bits of the vendor's index arithmetic; and a different T runs."""

    def make(device: str) -> list[Tensor]:
        return operands(device, H) if function is one_slice else qkv_operands(device, BF16, BF16, is_packed=True)

    def make_symbolic(device: str) -> list[Tensor]:
        given = make(device)
        for one in (given[0], given[-1]):
            torch._dynamo.mark_dynamic(one, 0)
        return given

    fixed = for_intel(function, make, groups)
    traced = for_intel(function, make_symbolic, groups)
    assert f"bf16[T, {D}] = input" in traced.text
    assert traced.kernels == fixed.kernels
    assert calls_in(traced.text, "vendor_add_lora") == calls_in(traced.text, "valid_slots") == 1
    torch.manual_seed(0)
    x, w, *stacks, i = make("cpu")
    x, i = x[:4], i[:4]
    (got,) = traced.run_on(groups, named(function, [x, w, *stacks, i]) | {"size().0": len(x)})
    a, b = stacks[: len(stacks) // 2], stacks[len(stacks) // 2 :]
    offsets, scaling = ([0], 1.0) if function is one_slice else ([0, 8, 12], 0.5)
    check(linear(x, w), x, a, b, i, offsets, scaling, got)


def with_symbols(width: int, **dims: int) -> Callable[[str], list[Tensor]]:
    """Operands of `one_slice`, some of w, a and b with a dimension that is a symbol."""

    def make(device: str) -> list[Tensor]:
        x, w, a, b, i = operands(device, width)
        for name, dim in dims.items():
            torch._dynamo.mark_dynamic({"w": w, "a": a, "b": b}[name], dim)
        return [x, w, a, b, i]

    return make


@pytest.mark.parametrize(
    ("groups", "dims"),
    [
        *[(groups, dims) for groups in (NEW, OLD) for dims in ({"w": 0}, {"a": 0, "b": 0}, {"a": 1, "b": 2})],
        (NEW, {"b": 1}),
        (NEW, {"w": 0, "b": 1}),
    ],
    ids=["H-new", "K-new", "R-new", "H-old", "K-old", "R-old", "W-new", "H-W-new"],
)
def test_a_wider_stack_is_the_vendors_also_where_sizes_are_symbols(
    groups: tuple[dict[str, str], ...], dims: dict[str, int]
) -> None:
    """And the graph computes what it should where those sizes are other ones."""
    traced = for_intel(one_slice, with_symbols(H + 2, **dims), groups)
    assert calls_in(traced.text, "vendor_add_lora") == 1
    copies_no_weight(traced, (K, H + 2, R), (K, H, R), (K, R, D))
    torch.manual_seed(0)
    sizes = {"w": [H, D], "a": [K, R, D], "b": [K, H + 2, R]}
    for name, dim in dims.items():
        sizes[name][dim] -= 1
    x, *_, i = operands("cpu", H)
    w, a, b = (random("cpu", *size) for size in sizes.values())
    i = torch.where(i < len(a), i, -1)
    given = {f"size().{dim}": sizes[name][dim] for name, dim in dims.items()}
    (got,) = traced.run_on(groups, named(one_slice, [x, w, a, b, i]) | given)
    check(linear(x, w), x, [a], [b[:, : len(w)]], i, [0], 1.0, got)


@pytest.mark.parametrize("width", [H - 1, H + 2], ids=["narrower", "wider"])
def test_a_width_that_is_a_symbol_is_not_frozen_into_the_old_ops(width: int) -> None:
    traced = for_intel(one_slice, with_symbols(width, b=1), OLD, after_aot=False)
    assert calls_in(traced.text, "vendor_add_lora") == 0
    why = "W must be known while compiling, since bgmv_expand_slice takes it as an int"
    assert f"lower: kernel vendor is not used: {why}" in traced.decisions[0].notes


def test_without_rows_another_kernel_runs() -> None:
    def make(device: str) -> list[Tensor]:
        _, *weights, _ = operands(device, H)
        return [random(device, 0, D), *weights, torch.zeros(0, dtype=torch.int64, device=device)]

    traced = for_intel(one_slice, make, NEW, after_aot=False)
    assert calls_in(traced.text, "vendor_add_lora") == 0
    assert "lower: kernel vendor is not used: no operand may be empty" in traced.decisions[0].notes


def test_inductor_makes_one_kernel_of_the_index_conversion() -> None:
    """For a CPU: Inductor generates no code for a device that torch was built without; its scheduler is the same."""

    def convert(i: Tensor) -> Tensor:
        return VALID_SLOTS(i, K, True)

    torch._dynamo.reset()
    converted, (code,) = run_and_get_code(torch.compile(convert, fullgraph=True), torch.tensor(INDICES))
    assert converted.tolist() == [index if 0 <= index < K else -1 for index in INDICES]
    assert converted.dtype == torch.int32
    assert len(re.findall(r"^ +cpp_fused\w+\(", code, re.MULTILINE)) == 1
    assert "xpu_lora" not in code


# Views of B that come in from outside.


def lowered_on(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Callable[..., Tensor]]:
    """A call compiled here as for `xpu`, for the vendor's ops alone: views cannot be made on a device torch lacks."""
    monkeypatch.setattr(vendor.Vendor, "devices", ("cpu",))
    notes: list[str] = []

    def backend(module: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        notes.extend(note for decision in xlc.rewrite(module) for note in decision.notes)
        return module.forward

    torch._dynamo.reset()
    return notes, torch.compile(with_b, backend=backend, fullgraph=True)


def with_b(x: Tensor, w: Tensor, a: Tensor, b: Tensor, i: Tensor) -> Tensor:
    return xlc.lora_linear(linear(x, w), x, [a], [b], i, [0])


@SETS
def test_a_view_from_outside_is_left_to_other_kernels_whatever_follows_it_in_memory(
    groups: tuple[dict[str, str], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards of one stack, with the same sizes and strides: of the second, the rows end where the memory does."""
    torch.manual_seed(0)
    x, w, a, whole, i = operands("cpu", 2 * H)
    notes, compiled = lowered_on(monkeypatch)
    with torch.no_grad(), xpu_c.installed(*groups):
        for shard in (whole[:, :H], whole[:, H:]):
            check(linear(x, w), x, [a], [shard], i, [0], 1.0, compiled(x, w, a, shard, i))
    assert notes[0].startswith("lower: kernel vendor is not used: B must be contiguous, or the leading rows of a")


@SETS
def test_a_stack_from_outside_that_is_contiguous_is_the_vendors(
    groups: tuple[dict[str, str], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, w, a, b, i = operands("cpu", H)
    notes, compiled = lowered_on(monkeypatch)
    with torch.no_grad(), xpu_c.installed(*groups):
        check(linear(x, w), x, [a], [b], i, [0], 1.0, compiled(x, w, a, b, i))
    assert not any("is not used" in note for note in notes)


def test_a_wheel_that_cannot_be_loaded_is_not_used_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_name: str) -> None:
        raise RuntimeError("level_zero: no device")

    monkeypatch.setattr(vendor, "find_spec", lambda _name: object())
    monkeypatch.setattr(vendor.importlib, "import_module", broken)
    vendor._load.cache_clear()
    assert vendor.family() == ("", "it cannot be loaded: RuntimeError: level_zero: no device")
    vendor._load.cache_clear()
