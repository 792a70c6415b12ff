"""`fuse_lora`: what it rewrites, what it leaves alone and why, that the numbers agree, and that twice is once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support.cases import BF16, DEVICE
from support.snapshot import as_text, calls_in, compiled_with, graphs_of_compiling, only
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule

import xpu_lora_compile as xlc
from xpu_lora_compile.ops.budget import budget_of
from xpu_lora_compile.passes import Decision, find_sites, fuse_lora, resolve_width
from xpu_lora_compile.passes.editing import graphs_of
from xpu_lora_compile.passes.graph import Rewrite

fused = only(find_sites, resolve_width, fuse_lora)

T, D, R, K, W, H = 5, 6, 3, 4, 4, 16


class Operands:
    """What the calls of one site read; slot 2 is used by no row, and is NaN."""

    def __init__(self, slices: int = 1, width: int = W, rows: int = T, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE)

        self.a = tuple(random(K, R, D) for _ in range(slices))
        self.b = tuple(random(K, width, R) for _ in range(slices))
        self.x, self.y = random(rows, D).to(dtype), random(rows, H).to(dtype)
        for weights in (*self.a, *self.b):
            weights[2] = torch.nan
        self.indices = torch.tensor([0, -1, 3, K, 1], device=DEVICE).repeat(rows)[:rows]

    @property
    def offsets(self) -> list[int]:
        """The slices lie side by side."""
        return [s * self.b[0].shape[1] for s in range(len(self.a))]


Spelling = Callable[[Tensor, Tensor, Operands], Any]


def add_lora_linear(y: Tensor, x: Tensor, w: Operands, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """As vLLM does for its packed linear layers."""
    buffer = torch.zeros((len(w.a), x.shape[0], R), dtype=dtype or x.dtype, device=x.device)
    for s, a in enumerate(w.a):
        xlc.bgmv_shrink(buffer[s], x, a, w.indices, 0.5)
    for s, b in enumerate(w.b):
        xlc.bgmv_expand_slice(y, buffer[s], b, w.indices, w.offsets[s], b.shape[1])
    return y


def add_lora_linear_in_its_own_dtype(y: Tensor, x: Tensor, w: Operands) -> Tensor:
    return add_lora_linear(y, x, w, dtype=None)


def add_lora_logits(y: Tensor, x: Tensor, w: Operands) -> Tensor:
    """As vLLM does for its sampler: logits may be wider than the adapters' vocabulary, or narrower."""
    buffer = torch.zeros((x.shape[0], R), dtype=torch.float32, device=x.device)
    xlc.bgmv_shrink(buffer, x, w.a[0], w.indices, 0.5)
    xlc.bgmv_expand(y, buffer, w.b[0], w.indices)
    return y


def add_lora_on_xpu(y: Tensor, x: Tensor, w: Operands) -> Tensor:
    """Where shrink cannot write to a part of a buffer."""
    buffers = torch.zeros((len(w.a), x.shape[0], R), dtype=x.dtype, device=x.device)
    for s, a in enumerate(w.a):
        part = torch.zeros((x.shape[0], R), dtype=torch.float32, device=x.device)
        xlc.bgmv_shrink(part, x, a, w.indices, 0.5)
        buffers[s].copy_(part)
    for s, b in enumerate(w.b):
        xlc.bgmv_expand_slice(y, buffers[s], b, w.indices, w.offsets[s], b.shape[1], add_inputs=True)
    return y


def with_ranks_side_by_side(y: Tensor, x: Tensor, w: Operands) -> Tensor:
    buffer = x.new_zeros(x.shape[0], len(w.a) * R)
    for s, a in enumerate(w.a):
        xlc.bgmv_shrink(buffer[:, s * R : (s + 1) * R], x, a, w.indices, 0.5)
    for s, b in enumerate(w.b):
        xlc.bgmv_expand_slice(y, buffer[:, s * R : (s + 1) * R], b, w.indices, w.offsets[s], b.shape[1])
    return y


def slice_after_slice(y: Tensor, x: Tensor, w: Operands) -> Tensor:
    for a, b, offset in zip(w.a, w.b, w.offsets, strict=True):
        buffer = x.new_zeros(x.shape[0], R)
        xlc.bgmv_shrink(buffer, x, a, w.indices, 0.5)
        xlc.bgmv_expand_slice(y, buffer, b, w.indices, offset, b.shape[1])
    return y


def into_views_of_columns(y: Tensor, x: Tensor, w: Operands) -> Tensor:
    for a, b, offset in zip(w.a, w.b, w.offsets, strict=True):
        buffer = torch.empty(x.shape[0], R, device=x.device)
        xlc.bgmv_shrink(buffer, x, a, w.indices, 0.5)
        xlc.bgmv_expand(y[:, offset : offset + b.shape[1]], buffer, b, w.indices)
    return y


def of_three_dimensions(y: Tensor, x: Tensor, w: Operands) -> Tensor:
    """Outputs and inputs of a batch of sequences, flattened for the call and used as they were afterwards."""
    y, x = y.unsqueeze(0), x.unsqueeze(0)
    rows = x.view(-1, x.shape[-1])
    flat = y.view(-1, y.shape[-1])
    add_lora_linear(flat, rows, w)
    return (flat.view_as(y) + 0 * y).squeeze(0)


def with_a_buffer_from(allocate: Callable[[Tensor], Tensor]) -> Spelling:
    def spelling(y: Tensor, x: Tensor, w: Operands) -> Tensor:
        buffer = allocate(x)
        xlc.bgmv_shrink(buffer, x, w.a[0], w.indices, 0.5)
        xlc.bgmv_expand_slice(y, buffer, w.b[0], w.indices, 0, w.b[0].shape[1])
        return y

    return spelling


SPELLINGS: dict[str, tuple[Spelling, Operands]] = {
    "1-slice": (add_lora_linear, Operands(1)),
    "2-slices": (add_lora_linear, Operands(2)),
    "3-slices": (add_lora_linear, Operands(3)),
    "4-slices": (add_lora_linear, Operands(4)),
    "own-dtype": (add_lora_linear_in_its_own_dtype, Operands(2)),
    "bf16": (add_lora_linear, Operands(2, dtype=BF16)),
    "logits-padded": (add_lora_logits, Operands(width=13)),
    "logits-equal": (add_lora_logits, Operands(width=16)),
    "logits-narrower": (add_lora_logits, Operands(width=19)),
    "on-xpu": (add_lora_on_xpu, Operands(3)),
    "side-by-side": (with_ranks_side_by_side, Operands(3)),
    "slice-after-slice": (slice_after_slice, Operands(3)),
    "views-of-columns": (into_views_of_columns, Operands(3)),
    "3-D": (of_three_dimensions, Operands(2)),
    "empty": (with_a_buffer_from(lambda x: torch.empty(x.shape[0], R, device=x.device)), Operands()),
    "new_empty": (with_a_buffer_from(lambda x: x.new_empty(x.shape[0], R)), Operands()),
    "empty_like": (with_a_buffer_from(lambda x: torch.empty_like(x[:, :R])), Operands()),
    "wider-than-R": (with_a_buffer_from(lambda x: x.new_zeros(x.shape[0], R + 2)[:, :R]), Operands()),
}


def check_numbers(got: Tensor, base: Tensor, w: Operands) -> None:
    """The budget of one `lora_linear`: a fused chain rounds once."""
    columns = H if w.b[0].shape[1] > H else w.b[0].shape[1]
    args = {
        "base": base,
        "inputs": w.x,
        "lora_a": list(w.a),
        "lora_b": [b[:, :columns] for b in w.b],
        "lora_indices_tensor": w.indices,
        "slice_offsets": w.offsets,
        "scaling": 0.5,
    }
    budget_of("lora_linear", args).check(got, torch.ones(got.shape, dtype=torch.bool))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_becomes_one_lora_linear_with_the_same_numbers(spelling: str) -> None:
    add_lora, w = SPELLINGS[spelling]
    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        fused(module)
        texts.append(as_text(module))

    with torch.no_grad():
        got = compiled_with(passes, lambda y, x: add_lora(y * 2, x, w))(w.y, w.x)
    assert [calls_in(texts[0], op) for op in ("lora_linear", "bgmv_shrink", "bgmv_expand_slice")] == [1, 0, 0]
    assert "expand" not in texts[0]
    assert "zeros" not in texts[0]
    check_numbers(got, w.y * 2, w)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_numbers_agree_through_all_passes(spelling: str) -> None:
    add_lora, w = SPELLINGS[spelling]
    torch._dynamo.reset()
    run = torch.compile(
        lambda y, x: add_lora(y * 2, x, w), backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": "eager"}
    )
    with torch.no_grad():
        check_numbers(run(w.y, w.x), w.y * 2, w)


@pytest.mark.parametrize("spelling", ["3-slices", "logits-narrower", "on-xpu"])
def test_numbers_agree_in_generated_code(spelling: str) -> None:
    add_lora, w = SPELLINGS[spelling]
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(lambda y, x: add_lora(y * 2, x, w), backend="xpu_lora", fullgraph=True)
        check_numbers(run(w.y, w.x), w.y * 2, w)


def test_slices_of_one_output_become_one_call() -> None:
    w = Operands(2)
    (text,) = graphs_of_compiling(lambda y, x: add_lora_linear(y * 2, x, w), w.y, w.x, passes=fused)
    assert_expected_inline(
        text,
        """\
%0: f32[5, 16] = input
%1: f32[5, 6] = input
%2: f32[4, 3, 6] = input
%3: f32[4, 3, 6] = input
%4: f32[4, 4, 3] = input
%5: f32[4, 4, 3] = input
%6: i64[5] = input
%7: f32[5, 16] = mul(%0, 2)
%8: f32[5, 16] = xpu_lora.lora_linear(%7, %1, (%2, %3), (%4, %5), %6, (0, 4), 0.5)
return (%8)""",
    )


def test_an_output_that_is_an_input_of_the_graph_is_written_back() -> None:
    w = Operands(1)
    (text,) = graphs_of_compiling(lambda y, x: add_lora_linear(y, x, w), w.y.clone(), w.x, passes=fused)
    assert_expected_inline(
        text,
        """\
%0: f32[5, 16] = input
%1: f32[5, 6] = input
%2: f32[4, 3, 6] = input
%3: f32[4, 4, 3] = input
%4: i64[5] = input
%5: f32[5, 16] = xpu_lora.lora_linear(%0, %1, (%2), (%3), %4, (0), 0.5)
%6: f32[5, 16] = aten.copy_(%0, %5)
return (%0)""",
    )


def test_a_caller_sees_its_output_change() -> None:
    w = Operands(2)
    y = w.y.clone()
    with torch.no_grad():
        result = compiled_with(xlc.rewrite, lambda y, x: add_lora_linear(y, x, w))(y, w.x)
    check_numbers(y, w.y, w)
    assert torch.equal(result, y)


def test_a_dynamic_batch_is_fused_and_compiled_once() -> None:
    graphs = 0

    def passes(module: GraphModule) -> None:
        nonlocal graphs
        graphs += 1
        fused(module)
        assert calls_in(as_text(module), "lora_linear") == 1

    w = Operands(3)

    def run(y: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        w.indices = indices
        return add_lora_linear(y * 2, x, w)

    compiled = compiled_with(passes, run, dynamic=True)
    for rows in (5, 2, 9):
        of_rows = Operands(3, rows=rows)
        with torch.no_grad():
            got = compiled(of_rows.y, of_rows.x, of_rows.indices)
        check_numbers(got, of_rows.y * 2, of_rows)
    assert graphs == 1


def recompiled_with(**sizes: Any) -> list[str]:
    """Of the seed's two ops the graphs for slots a = b = 4 and rank 3, and then for these, whose numbers agree."""

    def run(y: Tensor, x: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        # As wide as B says, so that nothing but a guard knows that A is, too.
        y, buffer = y * 2, x.new_zeros(x.shape[0], b.shape[2])
        xlc.bgmv_shrink(buffer, x, a, indices)
        xlc.bgmv_expand(y, buffer, b, indices)
        return y

    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        fused(module)
        texts.append(as_text(module))

    w, compiled = Operands(), compiled_with(passes, run)
    for size in ({}, sizes):
        a, b, rank = (size.get(name, default) for name, default in (("a", K), ("b", K), ("rank", R)))
        weights = torch.ones(a, rank, D, device=DEVICE), torch.ones(b, W, rank, device=DEVICE)
        with torch.no_grad():
            torch.testing.assert_close(compiled(w.y, w.x, *weights, w.indices), run(w.y, w.x, *weights, w.indices))
    return texts


@pytest.mark.parametrize("sizes", [{"a": 6, "b": 6}, {"rank": 2}, {"a": 6, "b": 6, "rank": 2}], ids=["K", "R", "both"])
def test_sizes_that_have_become_symbols_are_fused_too(sizes: dict[str, int]) -> None:
    assert [calls_in(text, "lora_linear") for text in recompiled_with(**sizes)] == [1, 1]


def test_numbers_of_slots_that_come_to_differ_are_told_apart() -> None:
    with xlc.record_decisions() as decisions:
        assert [calls_in(text, "lora_linear") for text in recompiled_with(a=6, b=7)] == [1, 0]
    assert "A and B must have the same number of slots, and have s" in decisions[-1].notes[-1]


def test_a_call_inside_cond_is_fused() -> None:
    w = Operands(2)

    def branch(y: Tensor, x: Tensor) -> Tensor:
        return torch.cond(x.sum() < 99, lambda y, x: add_lora_linear(y * 2, x, w), lambda y, x: y + 1, (y, x))

    (text,) = graphs_of_compiling(branch, w.y, w.x, passes=fused)
    assert calls_in(text, "lora_linear") == 1
    with torch.no_grad():
        check_numbers(compiled_with(xlc.rewrite, branch)(w.y, w.x), w.y * 2, w)


class Layer(torch.nn.Module):
    def __init__(self, w: Operands) -> None:
        super().__init__()
        self.w = w

    def forward(self, y: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        self.w.indices = indices
        return add_lora_linear(y * 2, x, self.w)


def test_an_exported_program_is_fused() -> None:
    w = Operands(2)
    rows = {0: Dim("rows", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(Layer(w), (w.y, w.x, w.indices), dynamic_shapes=(rows, rows, rows))
    fused(program.graph_module)
    assert calls_in(as_text(program.graph_module), "lora_linear") == 1
    other = Operands(2, rows=7)
    other.a, other.b = w.a, w.b
    check_numbers(program.module()(other.y, other.x, other.indices), other.y * 2, other)


def test_a_loaded_program_does_not_know_its_views_and_is_left_alone(tmp_path) -> None:
    w = Operands(2)
    with torch.no_grad():
        program = torch.export.export(Layer(w), (w.y, w.x, w.indices))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    xlc.rewrite(loaded)
    assert calls_in(as_text(loaded.graph_module), "expand_slice") == 2
    torch.testing.assert_close(loaded.module()(w.y, w.x, w.indices), program.module()(w.y, w.x, w.indices))


# Each with the reason that its decisions give, and with how many calls of lora_linear there are nevertheless.


def buffer_is_returned(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(x.shape[0], R)
    xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
    xlc.bgmv_expand(y, buffer, w.b[0], w.indices)
    return y, buffer


def buffer_is_read(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(x.shape[0], R)
    xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
    xlc.bgmv_expand(y, buffer, w.b[0], w.indices)
    return y, buffer.sum()


def buffer_is_written(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(x.shape[0], R)
    xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
    buffer.mul_(2)
    xlc.bgmv_expand(y, buffer, w.b[0], w.indices)
    return y


def buffer_is_part_of_x(y: Tensor, x: Tensor, w: Operands) -> Any:
    xlc.bgmv_shrink(x[:, :R], x, w.a[0], w.indices)
    xlc.bgmv_expand(y, x[:, :R], w.b[0], w.indices)
    return y, x


def inputs_are_changed(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(x.shape[0], R)
    xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
    x.add_(1)
    xlc.bgmv_expand(y, buffer, w.b[0], w.indices)
    return y, x


def indices_are_changed(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer, indices = x.new_zeros(x.shape[0], R), w.indices + 0
    xlc.bgmv_shrink(buffer, x, w.a[0], indices)
    indices.fill_(1)
    xlc.bgmv_expand(y, buffer, w.b[0], indices)
    return y


def indices_are_different(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(x.shape[0], R)
    xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
    xlc.bgmv_expand(y, buffer, w.b[0], w.indices.flip(0))
    return y


def columns_are_replaced(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(x.shape[0], R)
    xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
    xlc.bgmv_expand(y, buffer, w.b[0], w.indices, add_inputs=False)
    return y


def part_of_what_was_shrunk(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(x.shape[0], R)
    xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
    xlc.bgmv_expand(y, buffer[:, :2], w.b[0][..., :2], w.indices)
    return y


def numbers_of_slots_differ(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(x.shape[0], R)
    xlc.bgmv_shrink(buffer, x, w.a[0][:2], w.indices)
    xlc.bgmv_expand(y, buffer, w.b[0], w.indices)
    return y


def a_reader_of_the_buffer_is_refused(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(x.shape[0], R)
    xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
    xlc.bgmv_expand(y, buffer, w.b[0], w.indices)
    z = torch.zeros_like(y)
    xlc.bgmv_expand(z, buffer, w.b[0], w.indices, add_inputs=False)
    return y, z


def autocast_ends_between(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(x.shape[0], R)
    with torch.autocast(x.device.type, torch.bfloat16):
        xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
    xlc.bgmv_expand(y, buffer, w.b[0], w.indices)
    return y


def bits_are_read_as_another_dtype(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = torch.zeros(x.shape[0], R, dtype=torch.float16, device=x.device)
    xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
    xlc.bgmv_expand(y, buffer.view(torch.bfloat16), w.b[0], w.indices)
    return y


UNFUSED: dict[str, tuple[Spelling, str]] = {
    "buffer-returned": (buffer_is_returned, "used by the result of the graph, too"),
    "buffer-read": (buffer_is_read, "used by sum, too"),
    "buffer-written": (buffer_is_written, "not, whole and unchanged, what a bgmv_shrink"),
    "buffer-is-part-of-x": (buffer_is_part_of_x, "used by bgmv_shrink"),
    "inputs-changed": (inputs_are_changed, "not, whole and unchanged, what a bgmv_shrink"),
    "indices-changed": (indices_are_changed, "not, whole and unchanged, what a bgmv_shrink"),
    "indices-differ": (indices_are_different, "shrink and expand have different indices"),
    "replaces": (columns_are_replaced, "it replaces its columns instead of adding"),
    "part-of-the-rank": (part_of_what_was_shrunk, "not, whole and unchanged, what a bgmv_shrink"),
    "slots-differ": (numbers_of_slots_differ, "A and B must have the same number of slots, and have 2 and 4"),
    "reader-refused": (a_reader_of_the_buffer_is_refused, "read by a call that cannot be fused: it replaces"),
    "autocast-ends-between": (autocast_ends_between, "not, whole and unchanged, what a bgmv_shrink"),
    "other-dtype": (bits_are_read_as_another_dtype, "not, whole and unchanged, what a bgmv_shrink"),
}


def outcome_of(passes: Callable[[GraphModule], Any] | None, function: Spelling, w: Operands) -> list[Tensor]:
    def call(y: Tensor, x: Tensor) -> Any:
        return function(y * 2, x * 1, w)

    with torch.no_grad():
        result = (compiled_with(passes, call) if passes else call)(w.y.clone(), w.x.clone())
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("case", UNFUSED)
def test_a_chain_is_left_alone_with_the_reason_in_its_decision(case: str) -> None:
    function, reason = UNFUSED[case]
    w = Operands(width=H)
    for weights in (*w.a, *w.b):
        weights.nan_to_num_()
    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        fused(module)
        texts.append(as_text(module))
        xlc.rewrite(module)

    with xlc.record_decisions() as decisions:
        got = outcome_of(passes, function, w)
    assert calls_in(texts[0], "lora_linear") == 0
    assert any(reason in note for note in decisions[0].notes), decisions[0].notes
    for left, right in zip(got, outcome_of(None, function, w), strict=True):
        torch.testing.assert_close(left, right)


def output_is_read_between(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(2, x.shape[0], R)
    for s in range(2):
        xlc.bgmv_shrink(buffer[s], x, w.a[s], w.indices)
    xlc.bgmv_expand_slice(y, buffer[0], w.b[0], w.indices, 0, W)
    seen = y + 1
    xlc.bgmv_expand_slice(y, buffer[1], w.b[1], w.indices, W, W)
    return y, seen


def scalings_differ(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(2, x.shape[0], R)
    for s, scaling in enumerate((0.5, 2.0)):
        xlc.bgmv_shrink(buffer[s], x, w.a[s], w.indices, scaling)
    for s in range(2):
        xlc.bgmv_expand_slice(y, buffer[s], w.b[s], w.indices, s * W, W)
    return y


def output_is_overwritten_between(y: Tensor, x: Tensor, w: Operands) -> Any:
    buffer = x.new_zeros(2, x.shape[0], R)
    for s in range(2):
        xlc.bgmv_shrink(buffer[s], x, w.a[s], w.indices)
    xlc.bgmv_expand_slice(y, buffer[0], w.b[0], w.indices, 0, W)
    y.mul_(2)
    xlc.bgmv_expand_slice(y, buffer[1], w.b[1], w.indices, 0, W)
    return y


def grad_mode_is_switched_between(y: Tensor, x: Tensor, w: Operands) -> Any:
    first, second = x.new_zeros(x.shape[0], R), x.new_zeros(x.shape[0], R)
    xlc.bgmv_shrink(first, x, w.a[0], w.indices)
    xlc.bgmv_expand_slice(y, first, w.b[0], w.indices, 0, W)
    with torch.enable_grad():
        xlc.bgmv_shrink(second, x, w.a[1], w.indices)
        xlc.bgmv_expand_slice(y, second, w.b[1], w.indices, W, W)
    return y


def another_output_is_written_that_the_shrink_reads(y: Tensor, x: Tensor, w: Operands) -> Any:
    first, second = x.new_zeros(x.shape[0], R), x.new_zeros(x.shape[0], R)
    xlc.bgmv_shrink(first, x, w.a[0], w.indices)
    xlc.bgmv_expand(x, first, w.b[0][:, :D], w.indices)
    xlc.bgmv_shrink(second, x, w.a[1], w.indices)
    xlc.bgmv_expand_slice(y, second, w.b[1], w.indices, W, W)
    return y, x


APART: dict[str, Spelling] = {
    "output-read-between": output_is_read_between,
    "scalings-differ": scalings_differ,
    "output-overwritten-between": output_is_overwritten_between,
    "grad-mode-switched-between": grad_mode_is_switched_between,
    "the-second-reads-the-first": another_output_is_written_that_the_shrink_reads,
}


@pytest.mark.parametrize("case", APART)
def test_chains_that_must_not_meet_become_separate_calls(case: str) -> None:
    w = Operands(2, width=D if case == "the-second-reads-the-first" else W)
    w.b = tuple(b[:, :W] if s else b for s, b in enumerate(w.b))
    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        fused(module)
        texts.append(as_text(module))
        xlc.rewrite(module)

    got = outcome_of(passes, APART[case], w)
    assert calls_in(texts[0], "lora_linear") == 2
    for left, right in zip(got, outcome_of(None, APART[case], w), strict=True):
        torch.testing.assert_close(left, right)


def test_undecided_widths_are_left_to_the_op_that_decides_at_run_time() -> None:
    w = Operands(width=H)

    def cut(y: Tensor, x: Tensor) -> Tensor:
        width = w.indices.max().item()
        torch._check(width >= 2)
        torch._check(width <= H)
        buffer = x.new_zeros(x.shape[0], R)
        xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
        y = y * 2
        xlc.bgmv_expand(y, buffer, w.b[0][:, :width], w.indices)
        return y

    decisions: list[Decision] = []
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        got = compiled_with(lambda module: decisions.extend(xlc.rewrite(module)), cut)(w.y, w.x)
    assert "not fused: its width is decided when it runs" in decisions[0].notes
    torch.testing.assert_close(got, cut(w.y, w.x))


def test_a_buffer_that_is_an_input_of_the_graph_stays() -> None:
    w = Operands(width=H)

    def into(y: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
        y = y * 2
        xlc.bgmv_shrink(buffer, x, w.a[0], w.indices)
        xlc.bgmv_expand(y, buffer, w.b[0], w.indices)
        return y

    decisions: list[Decision] = []
    buffers = [torch.full((T, R), torch.nan, device=DEVICE) for _ in range(2)]
    with torch.no_grad():
        got = compiled_with(lambda module: decisions.extend(xlc.rewrite(module)), into)(w.y, w.x, buffers[0])
        torch.testing.assert_close(got, into(w.y, w.x, buffers[1]))
    torch.testing.assert_close(buffers[0], buffers[1])
    assert "not fused: the rank buffer is an input of the graph" in decisions[0].notes


def test_a_gradient_passes_through_the_output() -> None:
    w = Operands(2)
    grads = []
    for function in (compiled_with(xlc.rewrite, lambda y: add_lora_linear(y * 2, w.x, w)), lambda y: y * 2):
        y = w.y.clone().requires_grad_()
        function(y).sum().backward()
        grads.append(y.grad)
    assert torch.equal(*grads)


def test_every_fused_call_keeps_its_decision() -> None:
    w = Operands(3)
    decisions: list[Decision] = []
    compiled = compiled_with(lambda module: decisions.extend(xlc.rewrite(module)), add_lora_linear_of(w))
    with torch.no_grad():
        compiled(w.y, w.x)
    assert [decision.op for decision in decisions] == ["bgmv_expand_slice"] * 3
    assert all("fuse_lora: 3 shrink and 3 expand became one lora_linear" in one.notes for one in decisions)


def add_lora_linear_of(w: Operands) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda y, x: add_lora_linear(y * 2, x, w)


def test_running_twice_changes_nothing() -> None:
    w = Operands(3)
    texts: list[str] = []

    def twice(module: GraphModule) -> None:
        fused(module)
        texts.append(as_text(module))
        for graph in graphs_of(module):
            fuse_lora(graph, Rewrite())

    assert graphs_of_compiling(add_lora_linear_of(w), w.y, w.x, passes=twice) == texts
