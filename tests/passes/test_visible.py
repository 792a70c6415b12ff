"""Who launches the Triton kernels: the graphs with ops that AOT inlines, and when they are made."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support import xpu_c
from support.cases import DEVICE, KERNELS_HERE
from support.snapshot import calls_in, graphs_of_compiling
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import linear

import xpu_lora_compile as xlc
from xpu_lora_compile.backend import RewritePass
from xpu_lora_compile.errors import OptionError
from xpu_lora_compile.kernels import force_kernel
from xpu_lora_compile.ops import SORTED_INDICES
from xpu_lora_compile.passes.text import as_text
from xpu_lora_compile.torch_internals import without_memory

pytestmark = pytest.mark.skipif("triton" not in KERNELS_HERE, reason="Triton is not installed")
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="it needs no device")

T, D, R, K, H = 5, 6, 2, 3, 8


def visibly(module: GraphModule) -> Any:
    return xlc.rewrite(module, launch="inductor")


def random(*shape: int, seed: int = 0, device: Any = DEVICE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


class Layer(nn.Module):
    """Two products of one input, and LoRA on both."""

    def __init__(self, device: Any = DEVICE) -> None:
        super().__init__()
        for at, width in enumerate((H, 4)):
            for name, shape in (("w", (width, D)), ("a", (K, R, D)), ("b", (K, width, R))):
                # Fake tensors have no numbers to move.
                made = torch.empty(shape, device=device) if device == "xpu" else random(*shape, seed=at, device=device)
                self.register_buffer(f"{name}{at}", made)

    def forward(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        q = xlc.lora_linear(linear(x, self.w0), x, [self.a0], [self.b0], indices, [0], 0.5)
        return q, xlc.lora_linear(linear(x, self.w1), x, [self.a1], [self.b1], indices, [0], 0.5)


def indices_of(rows: int) -> Tensor:
    return (torch.arange(rows) % (K + 2) - 1).to(DEVICE)


def lora_lines(text: str) -> str:
    """The calls of our ops, whatever else is in the graph; values are numbered by first use."""
    lines = "\n".join(line for line in text.split("\n") if "xpu_lora" in line)
    names = {name: f"%{at}" for at, name in enumerate(dict.fromkeys(re.findall(r"%\d+", lines)))}
    return re.sub(r"%\d+", lambda match: names[match[0]], lines)


def test_one_routing_and_one_call_stand_for_two_linears_of_an_input() -> None:
    with force_kernel("triton"):
        (text,) = graphs_of_compiling(Layer(), random(T, D), indices_of(T), passes=visibly)
    assert_expected_inline(
        lora_lines(text),
        """\
%0: i32[4, 17] = xpu_lora.triton_route_tiles(%1, 3, 5)
xpu_lora.triton_add_lora((%2, %3), %4, (%5, %6), (%7, %8), %1, (0, 1), (0, 0), 0.5, 5, %0)""",
    )


class Sorted(Layer):
    """The same for rows that lie group by group."""

    def forward(self, x: Tensor, groups: Tensor, codes: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x, SORTED_INDICES(groups, codes, ends))


def test_rows_that_lie_group_by_group_are_routed_by_where_groups_end() -> None:
    groups, codes = torch.tensor([0, 0, 2, 3, 3], device=DEVICE), torch.tensor([2, 1, -1, 0], device=DEVICE)
    ends = torch.tensor([2, 2, 3, 5], dtype=torch.int32, device=DEVICE)
    x, layer = random(T, D), Sorted()
    expected = Layer()(x, codes[groups])
    texts = []
    for launch in ("inductor", "op"):
        torch._dynamo.reset()
        with force_kernel("triton"):
            (text,) = graphs_of_compiling(layer, x, groups, codes, ends, passes=partial(xlc.rewrite, launch=launch))
            torch._dynamo.reset()
            options = {"xpu_lora.launch": launch, "xpu_lora.execute": "eager"}
            results = torch.compile(layer, backend="xpu_lora", options=options)(x, groups, codes, ends)
        torch.testing.assert_close(results, expected)
        texts.append(lora_lines(text))
    assert_expected_inline(
        "\n".join(texts),
        """\
%0: i32[4, 17] = xpu_lora.triton_route_tiles(%1, 3, 5, ends=%2, codes=%3)
xpu_lora.triton_add_lora((%4, %5), %6, (%7, %8), (%9, %10), %1, (0, 1), (0, 0), 0.5, 5, %0)
%0: i32[142] = xpu_lora.route_tiles(%1, 3, ends=%2, codes=%3)
xpu_lora.linear_with_lora(%4, (%5, %6), (None, None), (%7, %8), (%9, %10), %1, (0, 1), (0, 0), 0.5, tiles=%0)""",
    )


class Overwritten(Sorted):
    """Where codes are written to before LoRA is added."""

    def forward(self, x: Tensor, groups: Tensor, codes: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        indices = SORTED_INDICES(groups, codes, ends)
        codes.fill_(-1)
        return Layer.forward(self, x, indices)


def test_what_groups_were_is_not_read_once_it_may_have_changed() -> None:
    groups, codes = torch.tensor([0, 0, 2, 3, 3], device=DEVICE), torch.tensor([2, 1, -1, 0], device=DEVICE)
    ends = torch.tensor([2, 2, 3, 5], dtype=torch.int32, device=DEVICE)
    x, layer = random(T, D), Overwritten()
    expected = Layer()(x, codes[groups])
    options = {"xpu_lora.launch": "inductor", "xpu_lora.execute": "eager"}
    with force_kernel("triton"):
        results = torch.compile(layer, backend="xpu_lora", options=options)(x, groups, codes, ends)
    torch.testing.assert_close(results, expected)


def test_a_symbolic_t_is_tuned_for_few_rows_or_for_many() -> None:
    texts = []
    for rows in (T, 70):
        x, indices = random(rows, D), indices_of(rows)
        for tensor in (x, indices):
            torch._dynamo.mark_dynamic(tensor, 0)
        with force_kernel("triton"):
            texts += graphs_of_compiling(Layer(), x, indices, passes=visibly)
    assert_expected_inline(
        "\n".join(map(lora_lines, texts)),
        """\
%0: i32[((T//16)) + 4, 17] = xpu_lora.triton_route_tiles(%1, 3, 64)
xpu_lora.triton_add_lora((%2, %3), %4, (%5, %6), (%7, %8), %1, (0, 1), (0, 0), 0.5, 64, %0)
%0: i32[((T//32)) + 4, 33] = xpu_lora.triton_route_tiles(%1, 3, 1024)
xpu_lora.triton_add_lora((%2, %3), %4, (%5, %6), (%7, %8), %1, (0, 1), (0, 0), 0.5, 1024, %0)""",
    )


def test_numbers_are_those_of_the_opaque_op_and_three_graphs_are_enough_for_every_t() -> None:
    graphs = []

    def backend(module: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        visibly(module)
        graphs.append(as_text(module))
        return module.forward

    torch._dynamo.reset()
    layer = Layer()
    compiled: Any = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad(), force_kernel("triton"):
        for rows in (1, 2, 63, 64, 65, 100, 300) if DEVICE.type == "cpu" else (1, 2, 64, 65, 300, 511, 512, 2000):
            x, indices = random(rows, D), indices_of(rows)
            for got, wanted in zip(compiled(x, indices), layer(x, indices), strict=True):
                torch.testing.assert_close(got, wanted)
    # T = 1, which Dynamo takes by itself, up to FEW, and beyond.
    assert len(graphs) == 3
    assert all(calls_in(text, "triton_add_lora") == 1 for text in graphs)


def test_generated_code_runs_the_visible_ops() -> None:
    """In the interpreter as they are, on a GPU by what AOT makes of them."""
    layer, x, indices = Layer(), random(T, D), indices_of(T)
    torch._dynamo.reset()
    compiled: Any = torch.compile(layer, backend="xpu_lora", options={"xpu_lora.launch": "inductor"})
    with torch.no_grad(), force_kernel("triton"):
        for got, wanted in zip(compiled(x, indices), layer(x, indices), strict=True):
            torch.testing.assert_close(got, wanted)


def halves(x: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """A shrink and an expand that `fuse_lora` leaves alone, since the rank vectors are looked at."""
    hidden, output = x.new_zeros(x.shape[0], R), x.new_zeros(x.shape[0], H)
    xlc.bgmv_shrink(hidden, x, a, indices, 0.5)
    xlc.bgmv_expand(output, hidden, b, indices)
    return hidden, output


def test_halves_share_a_routing() -> None:
    operands = random(T, D), random(K, R, D), random(K, H - 1, R), indices_of(T)
    with force_kernel("triton"):
        (text,) = graphs_of_compiling(halves, *operands, passes=visibly)
    assert_expected_inline(
        lora_lines(text),
        """\
%0: i32[4, 17] = xpu_lora.triton_route_tiles(%1, 3, 5)
xpu_lora.triton_shrink(%2, %3, %4, %1, 0.5, 5, %0)
xpu_lora.triton_expand_slice(%5, %2, %6, %1, 0, True, 5, %0)""",
    )


def test_halves_compute_what_they_did() -> None:
    operands = random(T, D), random(K, R, D), random(K, H - 1, R), indices_of(T)
    torch._dynamo.reset()
    compiled: Any = torch.compile(halves, backend="xpu_lora", options={"xpu_lora.launch": "inductor"})
    with torch.no_grad(), force_kernel("triton"):
        for got, wanted in zip(compiled(*operands), halves(*operands), strict=True):
            torch.testing.assert_close(got, wanted)


def notes_of(function: Callable[..., Any], *args: Any, launch: Any = "inductor", **options: Any) -> list[str]:
    notes: list[str] = []

    def passes(module: GraphModule) -> None:
        notes.extend(note for decision in xlc.rewrite(module, launch=launch) for note in decision.notes)

    with force_kernel("triton"):
        graphs_of_compiling(function, *args, passes=passes, **options)
    return [note for note in notes if "launches" in note]


def one(base: Tensor, x: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    return xlc.lora_linear(base * 1, x, [a], [b], indices, [0], 0.5)


def test_the_op_launches_where_a_size_of_a_weight_is_symbolic() -> None:
    operands = random(T, H), random(T, D), random(K, R, D), random(K, H, R), indices_of(T)
    (note,) = notes_of(one, *operands, dynamic=True)
    assert note == "lower: an op launches its kernels: sizes of weights must be known while compiling"


def test_the_decision_says_who_launches_and_why() -> None:
    operands = random(T, H), random(T, D), random(K, R, D), random(K, H, R), indices_of(T)
    assert notes_of(one, *operands) == ["lower: Inductor launches its kernels"]
    assert notes_of(one, *operands, launch="op") == ["lower: an op launches its kernels: it was asked for"]
    (note,) = notes_of(one, *operands, launch="auto")
    assert note == (
        f"lower: an op launches its kernels: on {DEVICE.type} Inductor does under cpp_wrapper, in an exported program, "
        "or where it is asked to"
    )


def test_verify_compares_the_visible_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    lower: Any = importlib.import_module("xpu_lora_compile.passes.lower")
    seen: list[str] = []

    def always(device: str, _launch: str) -> str:
        seen.append(device)
        return ""

    monkeypatch.setattr(lower, "_why_opaque", always)
    torch._dynamo.reset()
    with torch.no_grad(), force_kernel("triton"):
        report = xlc.verify(Layer())(random(T, D), indices_of(T))
    assert seen
    assert [site.is_right for site in report.sites] == [True, True]


@on_cpu
def test_explain_says_who_launches() -> None:
    torch._dynamo.reset()
    with xpu_c.installed(), without_memory():
        layer = Layer("xpu")
        operands = torch.empty(T, D, device="xpu"), torch.zeros(T, dtype=torch.int64, device="xpu")
        report = xlc.explain(layer, bandwidth=1)(*operands)
    assert report.graphs[0].calls_after["triton_add_lora"] == 1
    assert "lower: Inductor launches its kernels" in str(report)
    assert {site.call.split()[0] for site in report.sites} == {"triton_add_lora"}


@on_cpu
def test_an_exported_program_for_an_intel_gpu_has_the_visible_ops() -> None:
    """For any T, none included: nobody would check a guard."""
    with without_memory():
        operands = torch.empty(T, D, device="xpu"), torch.zeros(T, dtype=torch.int64, device="xpu")
        rows = torch.export.Dim("rows", min=0, max=4096)
        program = torch.export.export(Layer("xpu"), operands, dynamic_shapes=({0: rows}, {0: rows}))
    before = dict(program.range_constraints)
    xlc.rewrite(program)
    assert_expected_inline(
        lora_lines(as_text(program.graph_module)),
        """\
%0: i32[((T//32)) + 4, 33] = xpu_lora.triton_route_tiles(%1, 3, 1024)
xpu_lora.triton_add_lora((%2, %3), %4, (%5, %6), (%7, %8), %1, (0, 1), (0, 0), 0.5, 1024, %0)""",
    )
    assert program.range_constraints == before


class Expand(nn.Module):
    """An expand alone, as an embedding with LoRA has it."""

    def forward(self, x: Tensor, hidden: Tensor, b: Tensor, indices: Tensor) -> Tensor:
        output = x * 2
        xlc.bgmv_expand(output, hidden, b, indices)
        return output


def leaving_python(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> str:
    """What calls of our ops become in a program for an Intel GPU that is to run without Python."""
    with without_memory(), torch.no_grad():
        operands = (torch.empty(shape, device="xpu") for shape in shapes)
        program = torch.export.export(make(), (*operands, torch.zeros(T, dtype=torch.int64, device="xpu")))
    xlc.rewrite(program, without_python=True)
    return lora_lines(as_text(program.graph_module))


@on_cpu
def test_a_program_that_leaves_python_has_ops_that_a_compiler_makes_launches_of() -> None:
    assert_expected_inline(
        leaving_python(lambda: Layer("xpu"), (T, D)),
        """\
%0: i32[4, 17] = xpu_lora.triton_route_tiles(%1, 3, 5)
xpu_lora.triton_add_lora((%2, %3), %4, (%5, %6), (%7, %8), %1, (0, 1), (0, 0), 0.5, 5, %0)""",
    )
    assert_expected_inline(
        leaving_python(Expand, (T, D), (T, R), (K, D, R)),
        """\
%0: i32[4, 17] = xpu_lora.triton_route_tiles(%1, 3, 5)
xpu_lora.triton_expand_slice(%2, %3, %4, %1, 0, True, 5, %0)""",
    )


@on_cpu
def test_an_exported_program_for_a_cpu_keeps_the_op_that_chooses() -> None:
    program = torch.export.export(Layer(), (random(T, D), indices_of(T)))
    xlc.rewrite(program)
    text = as_text(program.graph_module)
    assert (calls_in(text, "add_lora"), calls_in(text, "triton_add_lora")) == (1, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: xlc.rewrite(GraphModule({}, torch.fx.Graph()), launch="cuda"),
        lambda: xlc.inductor_options(launch="cuda"),
        lambda: torch.compile(lambda x: x + 1, backend="xpu_lora", options={"xpu_lora.launch": "cuda"})(random(2)),
    ],
    ids=["rewrite", "inductor_options", "backend"],
)
def test_an_unknown_launcher_is_an_error_that_names_the_known(make: Callable[[], Any]) -> None:
    with pytest.raises((OptionError, RuntimeError), match=r"'auto', 'inductor', 'op'.*'cuda'"):
        make()


def test_the_launcher_is_in_the_key_of_inductors_caches() -> None:
    assert RewritePass("inductor").uuid() != RewritePass().uuid()
    assert RewritePass("inductor") != RewritePass()
    assert RewritePass("op") == RewritePass("op")
