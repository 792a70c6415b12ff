"""`share_routing`: what it rewrites, what it leaves alone, that the numbers agree, and that twice is once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support.cases import DEVICE
from support.snapshot import as_text, compiled_with, graphs_of_compiling, only
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule

import xpu_lora_compile as xlc
from xpu_lora_compile.ops import reference
from xpu_lora_compile.passes import find_sites, share_routing
from xpu_lora_compile.passes.editing import graphs_of
from xpu_lora_compile.passes.graph import Rewrite

shared = only(find_sites, share_routing)

SLOTS = torch.tensor([1, -1, 3], device=DEVICE)
_generator = torch.Generator().manual_seed(0)
X, A, B = (torch.randn(shape, generator=_generator).to(DEVICE) for shape in ((6, 4), (3, 2, 4), (3, 4, 2)))
# No sequence uses slot 2.
A[2] = B[2] = torch.nan


def layer(x: Tensor, slots: Tensor, a: Tensor, b: Tensor) -> Tensor:
    rows = slots[:, None].expand(-1, x.shape[0] // slots.shape[0]).reshape(-1)
    return xlc.lora_linear(x * 2, x, [a], [b], rows, [0])


def two_layers(x: Tensor, slots: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return layer(layer(x, slots, a, b), slots, a, b)


def rows_of(x: Tensor, slots: Tensor) -> Tensor:
    return slots.repeat_interleave(x.shape[0] // slots.shape[0])


def test_rows_are_computed_once() -> None:
    (text,) = graphs_of_compiling(two_layers, X, SLOTS, A, B, passes=shared)
    assert_expected_inline(
        text,
        """\
%0: i64[3] = input
%1: f32[6, 4] = input
%2: f32[3, 2, 4] = input
%3: f32[3, 4, 2] = input
%4: i64[3, 1] = getitem(%0, (slice(None, None, None), None))
%5: i64[3, 2] = .expand(%4, -1, 2)
%6: i64[6] = .reshape(%5, -1)
%7: f32[6, 4] = mul(%1, 2)
%8: f32[6, 4] = xpu_lora.lora_linear(%7, %1, (%2), (%3), %6, (0), 1.0, None)
%9: f32[6, 4] = mul(%8, 2)
%10: f32[6, 4] = xpu_lora.lora_linear(%9, %8, (%2), (%3), %6, (0), 1.0, None)
return (%10)""",
    )


def test_numbers_agree_with_the_reference() -> None:
    with torch.no_grad():
        got = compiled_with(xlc.rewrite, two_layers)(X, SLOTS, A, B)
    exact = X.double()
    for _ in range(2):
        exact = reference.lora_linear(exact * 2, exact, [A], [B], rows_of(X, SLOTS), [0])
    torch.testing.assert_close(got, exact.float(), atol=1e-4, rtol=1e-5)


def test_sizes_count_by_their_expression_whichever_node_says_them() -> None:
    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        shared(module)
        texts.append(as_text(module))

    compiled = compiled_with(passes, two_layers, dynamic=True)
    for sequences in (5, 6):
        x, slots = X.repeat(7, 1)[: 7 * sequences], SLOTS.repeat(2)[:sequences]
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, slots, A, B), two_layers(x, slots, A, B))
    assert [text.count("expand(") for text in texts] == [1]
    assert [text.count("reshape(") for text in texts] == [1]


def test_gradients_are_those_of_eager() -> None:
    a, b = A.nan_to_num(), B.nan_to_num()
    grads = []
    for function in (compiled_with(xlc.rewrite, two_layers), two_layers):
        operands = [one.clone().requires_grad_() for one in (X, a, b)]
        x, *weights = operands
        grads.append(torch.autograd.grad(function(x, SLOTS, *weights).sum(), operands))
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right)


def test_indices_inside_cond_are_shared() -> None:
    def branch(x: Tensor, slots: Tensor) -> Tensor:
        return torch.cond(x.sum() < 99, lambda x, s: two_layers(x, s, A, B), lambda x, s: x + 1, (x, slots))

    (text,) = graphs_of_compiling(branch, X, SLOTS, passes=shared)
    assert text.count("reshape(") == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled_with(xlc.rewrite, branch)(X, SLOTS), two_layers(X, SLOTS, A, B))


def test_an_exported_program_is_shared() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            return two_layers(x, slots, A, B)

    with torch.no_grad():
        # Each use of a size is a node of its own here.
        dynamic = {"x": {0: Dim.AUTO}, "slots": {0: Dim.AUTO}}
        program = torch.export.export(Model(), (X, SLOTS), dynamic_shapes=dynamic)
        shared(program.graph_module)
        assert as_text(program.graph_module).count("reshape") == 1
        torch.testing.assert_close(program.module()(X, SLOTS), two_layers(X, SLOTS, A, B))


def the_indices_are_written_to(x: Tensor, slots: Tensor) -> Any:
    slots = slots + 0
    first = layer(x, slots, A, B)
    slots.fill_(1)
    return first, layer(x, slots, A, B)


def the_rows_are_written_to(x: Tensor, slots: Tensor) -> Any:
    rows, others = slots.repeat(2), slots.repeat(2)
    rows.fill_(1)
    return xlc.lora_linear(x, x, [A], [B], rows, [0]), xlc.lora_linear(x, x, [A], [B], others, [0])


def both_are_returned(x: Tensor, slots: Tensor) -> Any:
    rows, others = slots.repeat(2), slots.repeat(2)
    results = [xlc.lora_linear(x, x, [A], [B], each, [0]) for each in (rows, others)]
    return rows, others, *results


def they_are_random(x: Tensor, slots: Tensor) -> Any:
    rows, others = (torch.randint_like(slots, 3).repeat(2) for _ in range(2))
    return tuple(xlc.lora_linear(x, x, [A.nan_to_num()], [B.nan_to_num()], each, [0]) for each in (rows, others))


def they_are_computed_from_floats(x: Tensor, slots: Tensor) -> Any:
    return tuple(xlc.lora_linear(x, x, [A], [B], x[:, 0].gt(0).long(), [0]) for _ in range(2))


ALONE: dict[str, Callable[..., Any]] = {
    "indices-written": the_indices_are_written_to,
    "rows-written": the_rows_are_written_to,
    "both-returned": both_are_returned,
    "random": they_are_random,
    "from-floats": they_are_computed_from_floats,
}


@pytest.mark.parametrize("case", ALONE)
def test_what_is_not_the_same_is_left_alone(case: str) -> None:
    function = ALONE[case]
    before = graphs_of_compiling(function, X, SLOTS, passes=lambda _module: None)
    assert graphs_of_compiling(function, X, SLOTS, passes=shared) == before
    outcomes = []
    for one in (compiled_with(xlc.rewrite, function), function):
        torch.manual_seed(0)
        with torch.no_grad():
            outcomes.append(one(X.clone(), SLOTS.clone()))
    for left, right in zip(*outcomes, strict=True):
        torch.testing.assert_close(left, right)


def test_running_twice_changes_nothing() -> None:
    texts: list[str] = []

    def twice(module: GraphModule) -> None:
        shared(module)
        texts.append(as_text(module))
        for graph in graphs_of(module):
            share_routing(graph, Rewrite())

    assert graphs_of_compiling(two_layers, X, SLOTS, A, B, passes=twice) == texts
