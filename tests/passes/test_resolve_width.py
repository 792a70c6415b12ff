"""`resolve_width`: what it rewrites, what it leaves alone, that the numbers agree, and that twice is once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from support.cases import DEVICE
from support.snapshot import as_text, graphs_of_compiling
from torch import Tensor
from torch.export import Dim

import xpu_lora_compile as xlc
from xpu_lora_compile.ops import BGMV_EXPAND, reference
from xpu_lora_compile.passes.decisions import decisions_on

T, R, K, H = 5, 3, 4, 10
INDICES = torch.tensor([0, 3, -1, 9, 1], device=DEVICE)


def operands(width: int, columns: int = H, rows: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    return random(rows, columns), random(rows, R), random(K, width, R), INDICES.repeat(rows)[:rows]


def expand(output: Tensor, hidden: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    output = output * 2
    xlc.bgmv_expand(output, hidden, b, indices)
    return output


def test_equal_widths_become_expand() -> None:
    (text,) = graphs_of_compiling(expand, *operands(10))
    assert_expected_inline(
        text,
        """\
%0: f32[5, 10] = input
%1: f32[5, 3] = input
%2: f32[4, 10, 3] = input
%3: i64[5] = input
%4: f32[5, 10] = mul(%0, 2)
xpu_lora.expand(%4, %1, %2, %3, True)
return (%4)""",
    )


def test_narrower_weights_become_a_slice_of_the_output() -> None:
    (text,) = graphs_of_compiling(expand, *operands(8))
    assert_expected_inline(
        text,
        """\
%0: f32[5, 10] = input
%1: f32[5, 3] = input
%2: f32[4, 8, 3] = input
%3: i64[5] = input
%4: f32[5, 10] = mul(%0, 2)
xpu_lora.expand_slice(%4, %1, %2, %3, 0, 8, True)
return (%4)""",
    )


def test_wider_weights_become_a_view_and_never_a_copy() -> None:
    (text,) = graphs_of_compiling(expand, *operands(13))
    assert_expected_inline(
        text,
        """\
%0: f32[5, 10] = input
%1: f32[4, 13, 3] = input
%2: f32[5, 3] = input
%3: i64[5] = input
%4: f32[5, 10] = mul(%0, 2)
%5: f32[4, 10, 3] = aten.slice.Tensor(%1, -2, 0, 10)
xpu_lora.expand_slice(%4, %2, %5, %3, 0, 10, True)
return (%4)""",
    )


def test_a_symbolic_batch_needs_no_decision() -> None:
    (text,) = graphs_of_compiling(expand, *mark_dynamic(operands(8), 0))
    assert_expected_inline(
        text,
        """\
%0: f32[T, 10] = input
%1: f32[T, 3] = input
%2: f32[4, 8, 3] = input
%3: i64[T] = input
%4: T = input
%5: f32[T, 10] = mul(%0, 2)
xpu_lora.expand_slice(%5, %1, %2, %3, 0, 8, True)
return (%5)""",
    )


def test_a_symbolic_width_is_settled_by_a_guard() -> None:
    output, hidden, b, indices = operands(8)
    torch._dynamo.mark_dynamic(b, 1)
    (text,) = graphs_of_compiling(expand, output, hidden, b, indices)
    assert_expected_inline(
        text,
        """\
%0: f32[5, 10] = input
%1: f32[4, T, 3] = input
%2: f32[5, 3] = input
%3: i64[5] = input
%4: T = input
%5: f32[5, 10] = mul(%0, 2)
%6: T = aten.sym_size.int(%1, -2)
xpu_lora.expand_slice(%5, %2, %1, %3, 0, %6, True)
return (%5)""",
    )


def test_a_symbolic_width_that_is_wider_is_cut_to_a_symbolic_size() -> None:
    output, hidden, b, indices = operands(13)
    torch._dynamo.mark_dynamic(output, 1)
    (text,) = graphs_of_compiling(expand, output, hidden, b, indices)
    assert_expected_inline(
        text,
        """\
%0: f32[5, T] = input
%1: f32[4, 13, 3] = input
%2: f32[5, 3] = input
%3: i64[5] = input
%4: T = input
%5: f32[5, T] = mul(%0, 2)
%6: T = aten.sym_size.int(%5, 1)
%7: f32[4, T, 3] = aten.slice.Tensor(%1, -2, 0, %6)
xpu_lora.expand_slice(%5, %2, %7, %3, 0, %6, True)
return (%5)""",
    )


def test_a_slice_of_a_view_as_output() -> None:
    def expand_into_columns(output: Tensor, hidden: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        output = output * 2
        xlc.bgmv_expand(output.view(T, 2, 5)[:, 1], hidden, b, indices)
        return output

    (text,) = graphs_of_compiling(expand_into_columns, *operands(4))
    assert_expected_inline(
        text,
        """\
%0: f32[5, 10] = input
%1: f32[5, 3] = input
%2: f32[4, 4, 3] = input
%3: i64[5] = input
%4: f32[5, 10] = mul(%0, 2)
%5: f32[5, 2, 5] = .view(%4, 5, 2, 5)
%6: f32[5, 5] = getitem(%5, (slice(None, None, None), 1))
xpu_lora.expand_slice(%6, %1, %2, %3, 0, 4, True)
return (%4)""",
    )


def test_weights_with_a_slice_dimension() -> None:
    output, hidden, b, indices = operands(13)
    (text,) = graphs_of_compiling(expand, output, hidden, b.unsqueeze(1), indices)
    assert_expected_inline(
        text,
        """\
%0: f32[5, 10] = input
%1: f32[4, 1, 13, 3] = input
%2: f32[5, 3] = input
%3: i64[5] = input
%4: f32[5, 10] = mul(%0, 2)
%5: f32[4, 1, 10, 3] = aten.slice.Tensor(%1, -2, 0, 10)
xpu_lora.expand_slice(%4, %2, %5, %3, 0, 10, True)
return (%4)""",
    )


def test_a_call_inside_cond() -> None:
    def branch(x: Tensor, hidden: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda: expand(x, hidden, b, indices), lambda: x + 1)

    (text,) = graphs_of_compiling(branch, *operands(8))
    assert_expected_inline(
        text,
        """\
%0: f32[5, 10] = input
%1: f32[4, 8, 3] = input
%2: f32[5, 3] = input
%3: i64[5] = input
%4: f32[] = .sum(%0)
%5: b8[] = gt(%4, 0)
%6 = attribute cond_true_0
%7 = attribute cond_false_0
cond(%5, %6, %7, (%0, %1, %2, %3))
%9: f32[5, 10] = getitem(%8, 0)
return (%9)
cond_true_0:
  %0: f32[5, 10] = input
  %1: f32[5, 3] = input
  %2: f32[4, 8, 3] = input
  %3: i64[5] = input
  %4: f32[5, 10] = mul(%0, 2)
  xpu_lora.expand_slice(%4, %1, %2, %3, 0, 8, True)
  return (%4)
cond_false_0:
  %0: f32[5, 10] = input
  %1: f32[4, 8, 3] = input
  %2: f32[5, 3] = input
  %3: i64[5] = input
  %4: f32[5, 10] = add(%0, 1)
  return (%4)""",
    )


def test_a_model_without_our_ops_is_untouched() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    before = graphs_of_compiling(model, torch.ones(2, 4), passes=lambda _module: None)
    assert graphs_of_compiling(model, torch.ones(2, 4)) == before


SPELLINGS: dict[str, Callable[..., None]] = {
    "function": xlc.bgmv_expand,
    "packet": torch.ops.xpu_lora.bgmv_expand,
    "overload": torch.ops.xpu_lora.bgmv_expand.default,
    "kwargs": lambda y, h, b, i: torch.ops.xpu_lora.bgmv_expand(
        lora_indices_tensor=i, lora_b_weights=b, inputs=h, output_tensor=y
    ),
    "mixed": lambda y, h, b, i: torch.ops.xpu_lora.bgmv_expand.default(y, h, lora_indices_tensor=i, lora_b_weights=b),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_call_is_found(spelling: str) -> None:
    def call(output: Tensor, hidden: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        output = output * 2
        SPELLINGS[spelling](output, hidden, b, indices)
        return output

    (text,) = graphs_of_compiling(call, *operands(8))
    assert "bgmv_expand" not in text
    assert "xpu_lora.expand_slice(" in text
    assert "0, 8, True)" in text


def test_replacing_instead_of_adding_is_kept() -> None:
    def replace(output: Tensor, hidden: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        output = output * 2
        xlc.bgmv_expand(output, hidden, b, indices, add_inputs=False)
        return output

    (text,) = graphs_of_compiling(replace, *operands(8))
    assert "0, 8, False)" in text


@pytest.mark.parametrize("execute", ["inductor", "eager"])
@pytest.mark.parametrize("four", [False, True], ids=["3-D", "4-D"])
@pytest.mark.parametrize("width", [8, 10, 13])
def test_numbers_agree_with_the_reference(width: int, four: bool, execute: str) -> None:
    output, hidden, b, indices = operands(width)
    b = b.unsqueeze(1) if four else b
    torch._dynamo.reset()
    compiled = torch.compile(expand, backend="xpu_lora", fullgraph=True, options={"xpu_lora.execute": execute})
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(output, hidden, b, indices), reference.bgmv_expand(output * 2, hidden, b, indices)
        )


@pytest.mark.usefixtures("without_caches")
@pytest.mark.parametrize("with_our_backend", [True, False], ids=["backend", "options"])
def test_each_relation_of_symbolic_widths_compiles_once(with_our_backend: bool) -> None:
    torch._dynamo.reset()
    compiled = (
        torch.compile(expand, backend="xpu_lora", dynamic=True)
        if with_our_backend
        else torch.compile(expand, dynamic=True, options=xlc.inductor_options())
    )
    with torch.no_grad(), xlc.record_decisions() as decisions:
        for columns, width in ((48, 32), (50, 32), (50, 34), (40, 40), (33, 33), (40, 44), (40, 43), (48, 31)):
            output, hidden, b, indices = operands(width, columns)
            expected = reference.bgmv_expand(output * 2, hidden, b, indices)
            torch.testing.assert_close(compiled(output, hidden, b, indices), expected)
    assert [decision.relation for decision in decisions] == ["narrower", "equal", "wider"]


def test_a_size_that_depends_on_data_keeps_the_op_that_decides_at_run_time() -> None:
    def cut(output: Tensor, hidden: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        width = indices.max().item()
        torch._check(width >= 2)
        torch._check(width <= b.shape[1])
        return expand(output, hidden, b[:, :width], indices)

    torch._dynamo.reset()
    output, hidden, b, indices = operands(20)
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        with xlc.record_decisions() as decisions:
            result = torch.compile(cut, backend="xpu_lora", fullgraph=True)(output, hidden, b, indices)
        torch.testing.assert_close(result, cut(output, hidden, b, indices))
    assert [decision.relation for decision in decisions] == ["undecided"]


class Expand(torch.nn.Module):
    def forward(self, output: Tensor, hidden: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        return expand(output, hidden, b, indices)


@pytest.mark.parametrize("width", [8, 10, 13])
def test_an_exported_program_is_rewritten_and_can_be_saved(width: int, tmp_path) -> None:
    arguments = operands(width)
    program = torch.export.export(Expand(), arguments)
    (decision,) = xlc.rewrite(program)
    assert decision.relation == {8: "narrower", 10: "equal", 13: "wider"}[width]
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    torch.testing.assert_close(loaded.module()(*arguments), Expand()(*arguments))


def test_an_exported_program_with_dynamic_widths_is_left_alone() -> None:
    dynamic = {"output": {1: Dim.AUTO}, "hidden": None, "b": {1: Dim.AUTO}, "indices": None}
    program = torch.export.export(Expand(), operands(8), dynamic_shapes=dynamic)
    (decision,) = xlc.rewrite(program)
    assert (decision.relation, decision.guard) == ("undecided", None)
    for width in (8, 10, 13):
        torch.testing.assert_close(program.module()(*operands(width)), Expand()(*operands(width)))


def test_a_rewritten_program_still_refuses_to_lose_a_gradient() -> None:
    output, hidden, b, indices = operands(8)
    with torch.no_grad():
        program = torch.export.export(Expand(), (output, hidden, b, indices))
    xlc.rewrite(program)
    with pytest.raises(xlc.LoraError, match="expand_slice: inputs: wanted a tensor that needs no gradient"):
        program.module()(output, hidden.requires_grad_(), b, indices)


def test_running_twice_changes_nothing() -> None:
    texts: list[str] = []

    def twice(module: torch.fx.GraphModule) -> None:
        xlc.rewrite(module)
        texts.append(as_text(module))
        assert xlc.rewrite(module) == []

    assert graphs_of_compiling(expand, *operands(13), passes=twice) == texts


def test_a_decision_names_its_source_line_module_and_guard() -> None:
    class Head(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return expand(*arguments)

    model = torch.nn.ModuleDict({"head": Head()})
    output, hidden, b, indices = operands(8)
    torch._dynamo.mark_dynamic(b, 1)
    kept: list[object] = []

    def keep(module: torch.fx.GraphModule) -> None:
        kept.extend(xlc.rewrite(module))
        assert [one for node in module.graph.nodes for one in decisions_on(node)] == kept

    graphs_of_compiling(lambda *arguments: model["head"](*arguments), output, hidden, b, indices, passes=keep)
    (decision,) = kept
    line = expand.__code__.co_firstlineno + 2
    assert decision.source == f"{__file__}:{line}"
    assert "head" in decision.module
    assert decision.guard is not None
    assert decision.guard.endswith("< 10")
    assert str(decision).count("<") == 2


def test_nothing_is_recorded_outside_the_block() -> None:
    with xlc.record_decisions() as decisions:
        graphs_of_compiling(expand, *operands(8))
    graphs_of_compiling(expand, *operands(8))
    assert len(decisions) == 1


def test_a_graph_without_shapes_is_left_alone() -> None:
    module = torch.fx.symbolic_trace(Expand())
    assert xlc.rewrite(module) == []
    assert any(node.target in (BGMV_EXPAND, BGMV_EXPAND.overloadpacket) for node in module.graph.nodes)


def mark_dynamic(tensors: tuple[Tensor, ...], dim: int) -> tuple[Tensor, ...]:
    output, hidden, _b, indices = tensors
    for tensor in (output, hidden, indices):
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensors
