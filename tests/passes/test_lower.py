"""`lower`: what it rewrites, what it leaves alone, that the numbers agree, and that twice is once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support.cases import ADD_HERE, DEVICE, KERNELS_HERE
from support.snapshot import as_text, calls_in, compiled_with, graphs_of_compiling, only
from torch import Tensor

import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import force_kernel
from xpu_lora_compile.ops import TRAINED_LINEAR, reference
from xpu_lora_compile.passes import find_sites, lower
from xpu_lora_compile.passes.decisions import Decision

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


lowered = only(find_sites, lower)


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


def two_layers(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
    first = xlc.lora_linear(output + 1, inputs, [a], [b], INDICES, [3])
    return xlc.lora_linear(first * 2, inputs, [a], [b], INDICES, [0])


def test_lora_linears_add_in_place_and_share_one_routing() -> None:
    with force_kernel("gather"):
        (text,) = graphs_of_compiling(two_layers, *operands(), passes=lowered)
    lines = text.split("\n")
    assert calls_in(text, "route") == 1
    assert not any("clone" in line for line in lines)
    assert_expected_inline(
        "\n".join(line for line in lines if "input" not in line and "getitem" not in line),
        """\
%5: f32[3, 8] = add(%0, 1)
xpu_lora.route(%1, 2)
xpu_lora.add_lora((%5), %2, (%3), (%4), %1, (0), (3), 1.0, slot=%7, has_adapter=%8, order=%9, starts=%10)
%12: f32[3, 8] = mul(%5, 2)
xpu_lora.add_lora((%12), %2, (%3), (%4), %1, (0), (0), 1.0, slot=%7, has_adapter=%8, order=%9, starts=%10)
return (%12)""",
    )


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernel is for a CPU")
def test_the_native_kernel_is_not_called_where_its_op_could_not_tell() -> None:
    """Slices that overlap, float64, a program to be saved elsewhere: the op that checks and chooses as it runs."""

    def overlapping(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return xlc.lora_linear(output + 1, inputs, [a, a], [b, b], INDICES, [0, 3])

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return two_layers(*args)

    (overlap,) = graphs_of_compiling(overlapping, *operands(), passes=lowered)
    (wide,) = graphs_of_compiling(two_layers, *(one.double() for one in operands()), passes=lowered)
    with torch.no_grad():
        program = torch.export.export(Module(), operands())
    xlc.rewrite(program)
    for text, calls in ((overlap, 1), (wide, 2), (as_text(program.graph_module), 2)):
        assert (calls_in(text, "add_lora"), calls_in(text, "native_add_lora")) == (calls, 0)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernel is for a CPU")
def test_the_native_kernel_gets_the_indices_alone() -> None:
    (text,) = graphs_of_compiling(two_layers, *operands(), passes=lowered)
    assert_expected_inline(
        "\n".join(line for line in text.split("\n") if "xpu_lora" in line),
        """\
xpu_lora.native_add_lora((%5), %1, (%2), (%3), %4, (0), (3), 1.0)
xpu_lora.native_add_lora((%7), %1, (%2), (%3), %4, (0), (0), 1.0)""",
    )


Views = Callable[[Tensor, Tensor], tuple[list[Tensor], list[Tensor], Tensor]]


def views(packed: Tensor, indices: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Two slices of `[K, 1, R, D + D + W_1 + W_2]`, as vLLM's layers have them, and the indices of three rows."""
    one, two, three, four = packed.split([6, 6, 5, 2], -1)
    return [one, two], [three.transpose(-1, -2), four.transpose(-1, -2)], indices[:3]


def and_then(
    change: Callable[[list[Tensor], list[Tensor], Tensor], tuple[list[Tensor], list[Tensor], Tensor]],
) -> Views:
    return lambda packed, indices: change(*views(packed, indices))


def adds_with(made: Views, *, apart: int = 0) -> Callable[..., Any]:
    def function(output: Tensor, inputs: Tensor, packed: Tensor, indices: Tensor) -> Any:
        a, b, mine = made(packed, indices)
        offsets = [sum(one.shape[-2] for one in b[:s]) + apart * s for s in range(len(b))]
        return xlc.lora_linear(output * 2, inputs, a, b, mine, offsets, 0.5)

    return function


def to_two_outputs(output: Tensor, inputs: Tensor, packed: Tensor, indices: Tensor) -> Any:
    a, b, mine = views(packed, indices)
    return torch.ops.xpu_lora.lora_linears([output * 2, output * 3], inputs, a, b, mine, [0, 1], [0, 5], 0.5)


def packed_operands() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 1, 4, 19, generator=generator)
    rows = torch.randn(3, 8, generator=generator), torch.randn(3, 6, generator=generator)
    return *rows, weights, torch.tensor([0, -1, 1, 0, 1, 1, 0, 0, 1])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernel is for a CPU")
def test_the_native_kernel_gets_the_tensor_that_its_operands_are_views_of() -> None:
    """For vLLM's graphs: of its weights, and of the indices for its largest batch."""
    (text,) = graphs_of_compiling(adds_with(views), *packed_operands(), passes=lowered)
    assert_expected_inline(
        "\n".join(line for line in text.split("\n") if "input" in line or "xpu_lora" in line),
        """\
%0: f32[2, 1, 4, 19] = input
%1: i64[9] = input
%2: f32[3, 8] = input
%3: f32[3, 6] = input
xpu_lora.native_add_lora((%12), %3, (%5, %6), (%9, %10), %1, (0, 0), (0, 5), 0.5, packed=%0)""",
    )


# Where the weights are not the columns of the packed input, in order and all of them.
OTHER_WEIGHTS: dict[str, Callable[..., Any]] = {
    "fewer slots": adds_with(and_then(lambda a, b, i: ([one[:1] for one in a], [one[:1] for one in b], i))),
    "fewer ranks": adds_with(
        and_then(lambda a, b, i: ([one[..., :2, :] for one in a], [one[..., :2] for one in b], i))
    ),
    "fewer columns": adds_with(lambda p, i: ([p[..., :6]], [p[..., 6:11].transpose(2, 3)], i[:3])),
    "one twice": adds_with(and_then(lambda a, b, i: ([a[0], a[0]], b, i))),
    "another order": adds_with(and_then(lambda a, b, i: (a, b[::-1], i))),
    "one copied": adds_with(and_then(lambda a, b, i: (a, [b[0], b[1].contiguous()], i))),
    "no columns": adds_with(
        lambda p, i: ([p[..., :6], p[..., 6:12]], [p[..., 12:12].transpose(2, 3), p[..., 12:].transpose(2, 3)], i[:3])
    ),
    "columns between outputs": adds_with(views, apart=1),
    "two outputs": to_two_outputs,
    "four slices": adds_with(
        lambda p, i: (
            list((q := p.flatten()[:112].view(2, 2, 28))[..., :24].split(6, 2)),
            [one.transpose(1, 2) for one in q[..., 24:].split(1, 2)],
            i[:3],
        )
    ),
    "a square, turned": adds_with(
        lambda p, i: (
            [(q := p.flatten()[:96].view(2, 6, 8))[..., :6].transpose(1, 2)],
            [q[..., 6:].transpose(1, 2)],
            i[:3],
        )
    ),
    "two tensors": adds_with(lambda p, i: (views(p, i)[0], views(p.clone(), i)[1], i[:3])),
    "other bits": adds_with(lambda p, i: views(torch._neg_view(p), i)),
    "other bits in one": adds_with(
        lambda p, i: ([torch._neg_view(p)[..., :6], p[..., 6:12]], *views(p, i)[1:]),
    ),
}
# Where the indices are not the first elements of a longer tensor.
OTHER_INDICES: dict[str, Callable[..., Any]] = {
    "later ones": adds_with(lambda p, i: (*views(p, i)[:2], i[1:4])),
    "every second": adds_with(lambda p, i: (*views(p, i)[:2], i[::2][:3])),
    "of another type": adds_with(lambda p, i: (*views(p, i)[:2], i.view(torch.int32)[:3])),
    "of a matrix": adds_with(lambda p, i: (*views(p, i)[:2], torch.stack([i], 1).view(-1)[:3])),
    "a column": adds_with(lambda p, i: (*views(p, i)[:2], i.view(3, 3)[:, 0])),
    "with other bits": adds_with(lambda p, i: (*views(p, i)[:2], torch._neg_view(i)[:3])),
}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernel is for a CPU")
@pytest.mark.parametrize("case", [*OTHER_WEIGHTS, *OTHER_INDICES])
def test_views_of_anything_else_stay_views(case: str) -> None:
    function, tensors = (OTHER_WEIGHTS | OTHER_INDICES)[case], packed_operands()
    torch._dynamo.reset()
    (text,) = graphs_of_compiling(function, *tensors, passes=lowered)
    (call,) = (line for line in text.split("\n") if "native_add_lora" in line)
    packed, indices = (re.search(rf"(%\d+): {size} = input", text) for size in (r"f32\[2, 1, 4, 19\]", r"i64\[9\]"))
    assert packed is not None
    assert indices is not None
    assert call.endswith(f"0.5, packed={packed[1]})") == (case in OTHER_INDICES)
    assert (f"{indices[1]}, (" in call) == (case in OTHER_WEIGHTS)
    compiled = compiled_with(xlc.rewrite, function)
    with torch.no_grad():
        for got, expected in zip(compiled(*tensors), function(*tensors), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernel is for a CPU")
def test_a_tensor_that_has_fewer_indices_than_rows_is_not_taken_for_them() -> None:
    output, inputs, packed, indices = packed_operands()
    function = adds_with(lambda p, i: (*views(p, i)[:2], i.as_strided((3,), (1,))))
    for view in (indices[:2], indices[::2]):
        torch._dynamo.reset()
        with torch.no_grad():
            got = compiled_with(xlc.rewrite, function)(output, inputs, packed, view)
            torch.testing.assert_close(got, function(output, inputs, packed, view))


def two_layers_with_ranks(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor, ranks: Tensor) -> Tensor:
    first = xlc.lora_linear(output + 1, inputs, [a], [b], INDICES, [3], ranks=ranks)
    return xlc.lora_linear(first * 2, inputs, [a], [b], INDICES, [0], ranks=ranks)


RANKS = torch.tensor([4, 1], dtype=torch.int32, device=DEVICE)


@pytest.mark.skipif("triton" not in KERNELS_HERE, reason="Triton is not installed")
def test_the_triton_kernels_get_one_table_of_tiles_and_the_ranks() -> None:
    with force_kernel("triton"):
        (text,) = graphs_of_compiling(two_layers_with_ranks, *operands(), RANKS, passes=lowered)
    calls = "\n".join(line for line in text.split("\n") if "xpu_lora" in line)
    assert_expected_inline(
        re.sub(r"i32\[\d+\]", "i32[tiles]", calls),
        """\
%7: i32[tiles] = xpu_lora.route_tiles(%1, 2)
xpu_lora.add_lora((%6), %2, (%3), (%4), %1, (0), (3), 1.0, tiles=%7, ranks=%5)
xpu_lora.add_lora((%9), %2, (%3), (%4), %1, (0), (0), 1.0, tiles=%7, ranks=%5)""",
    )


def test_other_kernels_get_no_ranks() -> None:
    with force_kernel("gather"):
        (text,) = graphs_of_compiling(two_layers_with_ranks, *operands(), RANKS, passes=lowered)
        (without,) = graphs_of_compiling(two_layers, *operands(), passes=lowered)
    calls, expected = (
        [line.split("(%", 1)[0] for line in one.split("\n") if "xpu_lora" in line] for one in (text, without)
    )
    assert calls == expected
    ranks = next(line.split(":")[0] for line in text.split("\n") if line.endswith("i32[2] = input"))
    assert text.count(f"{ranks},") == text.count(f"{ranks})") == 0


@pytest.mark.parametrize("kernel", KERNELS_HERE)
def test_ranks_change_no_number(kernel: str) -> None:
    output, inputs, a, b = operands()
    a[1, 1:], b[1, :, 1:] = 0.0, 0.0
    with torch.no_grad():
        expected = two_layers(output, inputs, a, b)
        with force_kernel(kernel):
            for called in (two_layers_with_ranks, compiled_with(xlc.rewrite, two_layers_with_ranks)):
                torch.testing.assert_close(called(output, inputs, a, b, RANKS), expected, atol=1e-4, rtol=1e-4)


def test_a_base_that_is_an_input_or_seen_again_is_copied_first() -> None:
    def seen(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        base = output + 1
        of_input = xlc.lora_linear(output, inputs, [a], [b], INDICES, [0])
        of_seen = xlc.lora_linear(base, inputs, [a], [b], INDICES, [0])
        return of_input, of_seen, base

    decisions: list[Decision]
    with torch.no_grad(), xlc.record_decisions() as decisions:
        (text,) = graphs_of_compiling(seen, *operands(), passes=lowered)
        for got, expected in zip(compiled_with(lowered, seen)(*operands()), seen(*operands()), strict=True):
            torch.testing.assert_close(got, expected)
    assert text.count("aten.clone(") == 2
    assert all("lower: on a copy of the base, which is seen again" in one.notes for one in decisions)


def test_what_is_written_back_adds_into_the_base_itself() -> None:
    def into(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor) -> None:
        hidden = inputs.new_empty(3, 4)
        xlc.bgmv_shrink(hidden, inputs, a, INDICES)
        xlc.bgmv_expand_slice(output, hidden, b, INDICES, 2, 5)

    (text,) = graphs_of_compiling(into, *operands())
    assert calls_in(text, ADD_HERE) == 1
    assert "copy_" not in text
    assert "clone" not in text


def test_an_unsettled_expand_is_left_alone() -> None:
    def others(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result = output * 1
        xlc.bgmv_expand(result, inputs[:, :4], b, INDICES)
        return result

    assert graphs_of_compiling(others, *operands(), passes=lowered) == graphs_of_compiling(
        others, *operands(), passes=lambda _module: None
    )


def test_a_call_that_carries_gradients_stays_functional() -> None:
    output, inputs, a, b = operands()
    texts: list[str] = []

    def passes(module: torch.fx.GraphModule) -> None:
        lowered(module)
        texts.append(as_text(module))

    grads = []
    for function in (compiled_with(passes, two_layers), two_layers):
        x = inputs.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(output, x, a, b).sum(), x)[0])
    torch.testing.assert_close(*grads)
    assert calls_in(texts[0], "lora_linear") == 2


def test_slices_with_different_numbers_of_slots_stay_functional() -> None:
    def two(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return xlc.lora_linear(output + 1, inputs, [a, a[:1]], [b, b[:1]], INDICES, [0, 3])

    with torch.no_grad(), xlc.record_decisions() as decisions:
        torch.testing.assert_close(compiled_with(lowered, two)(*operands()), two(*operands()))
    assert decisions[0].notes == [
        "lower: left functional, since its slices must have the same number of slots, and have 2, 1"
    ]


def test_banks_whose_size_has_become_a_symbol_share_one_routing_in_place() -> None:
    """Each stack brings a symbol of its own; that they are equal is a guard."""
    texts: list[str] = []

    def passes(module: torch.fx.GraphModule) -> None:
        lowered(module)
        texts.append(as_text(module))

    def three(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        first = xlc.lora_linear(output + 1, inputs, [a, a2], [b, b2], INDICES, [0, 3])
        return xlc.lora_linear(first * 2, inputs, [a2], [b2], INDICES, [3])

    output, inputs, a, b = operands()
    compiled = compiled_with(passes, three)
    with force_kernel("gather"), torch.no_grad():
        for slots in (2, 3):
            stacks = [one.repeat(2, 1, 1)[:slots] for one in (a, b)]
            arguments = (output, inputs, *stacks, *(2 * one for one in stacks))
            torch.testing.assert_close(compiled(*arguments), three(*arguments))
    assert [(calls_in(text, "add_lora"), calls_in(text, "route")) for text in texts] == [(2, 1), (2, 1)]


def test_a_dynamic_batch_is_lowered_once() -> None:
    graphs = 0

    def passes(module: torch.fx.GraphModule) -> None:
        nonlocal graphs
        graphs += 1
        lowered(module)
        assert calls_in(as_text(module), ADD_HERE) == 2

    def two(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        first = xlc.lora_linear(output + 1, inputs, [a], [b], indices, [3])
        return xlc.lora_linear(first * 2, inputs, [a], [b], indices, [0])

    output, inputs, a, b = operands()
    compiled = compiled_with(passes, two, dynamic=True)
    for rows in (9, 7, 3):
        repeated = (output.repeat(3, 1), inputs.repeat(3, 1), INDICES.repeat(3))
        base, x, indices = (one[:rows].clone() for one in repeated)
        arguments = (base, x, a, b, indices)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), two(*arguments))
    assert graphs == 1


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


def test_lora_inside_cond_runs_under_inductor() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        def with_lora(x: Tensor) -> Tensor:
            hidden, output = x.new_zeros(len(x), 3), x * 2
            xlc.bgmv_shrink(hidden, x, a, indices)
            xlc.bgmv_expand(output, hidden, b, indices)
            return output

        return torch.cond(x.sum() > 0, with_lora, lambda x: x - 1, (x,))

    shapes = ((2, 4), (2, 3, 4), (2, 4, 3))
    args = (*(torch.ones(shape, device=DEVICE) for shape in shapes), torch.tensor([1, -1], device=DEVICE))
    with torch.no_grad():
        got = torch.compile(function, backend="xpu_lora", fullgraph=True)(*args)
        assert torch.equal(got, function(*args))


def test_a_rewritten_program_can_be_saved_and_loaded(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
            return xlc.lora_linear(x * 2, x, [a], [b], indices, [0])

    shapes = ((2, 4), (2, 3, 4), (2, 4, 3))
    args = (*(torch.ones(shape) for shape in shapes), torch.tensor([1, -1]))
    with torch.no_grad():
        program = torch.export.export(Model(), args)
        xlc.rewrite(program)
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2").module()
        assert torch.equal(loaded(*args), Model()(*args))


class Halves(torch.nn.Module):
    """A shrink alone, and expands alone that are as wide as the output, narrower and wider."""

    def forward(self, x: Tensor, a: Tensor, bs: list[Tensor], indices: Tensor) -> tuple[Tensor, ...]:
        hidden = x.new_empty(x.shape[0], a.shape[1])
        xlc.bgmv_shrink(hidden, x, a, indices, 0.5)
        outputs = [x * 2 for _ in bs]
        for output, b in zip(outputs, bs, strict=True):
            xlc.bgmv_expand(output, x[:, :2].contiguous(), b, indices, True)
        return hidden, *outputs


def halves() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 4), (3, 2, 4), (3, 4, 2), (3, 3, 2), (3, 6, 2)
    x, a, *bs = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, a, bs, torch.tensor([2, -1, 0, 0, 1])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernel is for a CPU")
def test_a_program_that_leaves_python_gets_ops_that_need_none() -> None:
    with torch.no_grad():
        program = torch.export.export(Halves(), halves())
        xlc.rewrite(program, without_python=True)
        called = [str(node.target) for node in program.graph.nodes if "xpu_lora" in str(node.target)]
        assert called == ["xpu_lora.native_shrink.default", *["xpu_lora.native_expand.default"] * 3]
        got, wanted = program.module()(*halves()), Halves()(*halves())
        assert all(map(torch.equal, got, wanted))
        # A second time it finds nothing.
        before = as_text(program.graph_module)
        assert not xlc.rewrite(program, without_python=True)
        assert as_text(program.graph_module) == before


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernel is for a CPU")
def test_a_program_that_leaves_python_keeps_the_public_op_of_a_forced_kernel() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
            return xlc.lora_linear(x * 2, x, [a], [b], indices, [0])

    shapes = ((2, 4), (2, 3, 4), (2, 4, 3))
    args = (*(torch.ones(shape) for shape in shapes), torch.tensor([1, -1]))
    for kernel, op in (("native", "native_add_lora"), ("gather", "add_lora")):
        with torch.no_grad(), xlc.force_kernel(kernel):
            program = torch.export.export(Model(), args)
            xlc.rewrite(program, without_python=True)
        assert f"xpu_lora.{op}(" in as_text(program.graph_module)


SCALINGS, SLOTS = torch.tensor([0.5, 2.0], device=DEVICE), torch.tensor([1], device=DEVICE)


def trained_layers(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor, leaf_a: Tensor, leaf_b: Tensor) -> Tensor:
    """Two layers, one after the other, of whose slots one is trained."""
    given = [a], [b], INDICES, SCALINGS, SLOTS, [leaf_a], [leaf_b]
    first = TRAINED_LINEAR([output], inputs, *given)[0]
    second: Tensor = TRAINED_LINEAR([output * 2], first[:, :6], *given)[0]
    return second


@pytest.mark.skipif("triton" not in KERNELS_HERE, reason="Triton is not installed")
def test_layers_that_are_trained_share_one_table_of_tiles() -> None:
    output, inputs, a, b = operands()
    leaves = [torch.zeros(1, *shape, device=DEVICE).requires_grad_() for shape in ((4, 6), (4, 5))]
    call = output, inputs.requires_grad_(), a, b, *leaves
    (text,) = graphs_of_compiling(trained_layers, *call, passes=lowered)
    assert "training_tiles" not in text or DEVICE.type != "cpu"
    wanted = torch.autograd.grad(trained_layers(*call).sum(), [inputs, *leaves])
    with force_kernel("triton"):
        (text,) = graphs_of_compiling(trained_layers, *call, passes=lowered)
        assert (calls_in(text, "triton_training_tiles"), calls_in(text, "trained_linear")) == (1, 2)
        got = torch.autograd.grad(compiled_with(lowered, trained_layers)(*call).sum(), [inputs, *leaves])
    for mine, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, right)
