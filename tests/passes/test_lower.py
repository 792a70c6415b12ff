"""`lower`: what it rewrites, what it leaves alone, that the numbers agree, and that twice is once."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from support.cases import DEVICE
from support.snapshot import as_text, graphs_of_compiling
from torch import Tensor

import xpu_lora_compile as xlc
from xpu_lora_compile.ops import reference
from xpu_lora_compile.passes import lower
from xpu_lora_compile.passes.editing import graphs_of

INDICES = torch.tensor([0, -1, 1], device=DEVICE)


def operands() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 8), (3, 6), (2, 4, 6), (2, 5, 4))
    return tuple(torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)


def shrink_and_expand(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
    output, hidden = output + 1, inputs.new_empty(3, 4)
    xlc.bgmv_shrink(hidden, inputs, a, INDICES, scaling=0.5)
    xlc.bgmv_expand_slice(output, hidden, b, INDICES, 2, 5)
    return output


def lowered(module: torch.fx.GraphModule) -> None:
    for graph in graphs_of(module):
        lower(graph)


def test_public_ops_become_internal_ones() -> None:
    (text,) = graphs_of_compiling(shrink_and_expand, *operands(), passes=lowered)
    assert_expected_inline(
        text,
        """\
%0: f32[3, 8] = input
%1: f32[3, 6] = input
%2: f32[2, 4, 6] = input
%3: i64[3] = input
%4: f32[2, 5, 4] = input
%5: f32[3, 8] = add(%0, 1)
%6: f32[3, 4] = .new_empty(%1, 3, 4)
xpu_lora.shrink(%6, %1, %2, %3, 0.5)
xpu_lora.expand_slice(%5, %6, %4, %3, 2, 5, True)
return (%5)""",
    )


def test_lora_linear_and_an_unsettled_expand_are_left_alone() -> None:
    def others(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result = xlc.lora_linear(output, inputs, [a], [b], INDICES, [0])
        xlc.bgmv_expand(result, inputs[:, :4], b, INDICES)
        return result

    assert graphs_of_compiling(others, *operands(), passes=lowered) == graphs_of_compiling(
        others, *operands(), passes=lambda _module: None
    )


def test_numbers_agree_with_the_reference() -> None:
    output, inputs, a, b = operands()
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(shrink_and_expand, backend="xpu_lora", fullgraph=True)(output, inputs, a, b)
    hidden = reference.bgmv_shrink(inputs.new_empty(3, 4), inputs, a, INDICES, 0.5)
    torch.testing.assert_close(result, reference.bgmv_expand_slice(output + 1, hidden, b, INDICES, 2, 5))


def test_running_twice_changes_nothing() -> None:
    texts: list[str] = []

    def twice(module: torch.fx.GraphModule) -> None:
        lowered(module)
        texts.append(as_text(module))
        lowered(module)

    assert graphs_of_compiling(shrink_and_expand, *operands(), passes=twice) == texts
