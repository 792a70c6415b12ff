"""`fuse_base`: what it rewrites, what it leaves alone and why, that the numbers agree, and that twice is once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support.cases import DEVICE
from support.snapshot import as_text, calls_in, compiled_with, graphs_of_compiling
from torch import Tensor, nn
from torch.fx import GraphModule

import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import force_kernel
from xpu_lora_compile.passes import Decision

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

linear = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def _triton_is_forced() -> Iterator[None]:
    with force_kernel("triton"):
        yield


class Attention(nn.Module):
    """Two projections of one input, one of them with a bias."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q = nn.Linear(6, 6)
            self.k = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.q(x).sin(), self.k(x)


def attached() -> tuple[Attention, xlc.AdapterBank]:
    """A model whose two slots are full, as `bank.load` would fill them."""
    model = Attention().requires_grad_(False).to(DEVICE)
    bank = xlc.attach(model, slots=2, max_rank=3)
    generator = torch.Generator().manual_seed(1)
    for layer in (model.q, model.k):
        for stack in (layer.lora_a, layer.lora_b):
            stack.copy_(torch.randn(stack.shape, generator=generator) / 2)
    bank._slots[:] = ["pirate", "haiku"]
    for slot in (0, 1):
        bank._set_rank(slot, 3)
    return model, bank


X = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(2)).to(DEVICE)
NAMES = ["pirate", None, "haiku"]


def ours(text: str) -> str:
    """The lines of a graph that call products and our ops, whatever the length of a table of tiles."""
    lines = [line for line in text.split("\n") if "xpu_lora" in line or "linear(" in line]
    return re.sub(r"i32\[\d+\]", "i32[tiles]", "\n".join(lines))


def test_a_layer_of_a_model_computes_base_and_lora_in_one_call() -> None:
    model, bank = attached()
    with bank.use(NAMES):
        (text,) = graphs_of_compiling(model, X)
    assert "linear(%" not in text.replace("linear_with_lora(", "")
    assert calls_in(text, "route_tiles") == calls_in(text, "linear_with_lora") == 1
    assert calls_in(text, "add_lora") == 0


T, D, R, K = 5, 6, 2, 3
INDICES = torch.tensor([0, -1, 2, K, 0], device=DEVICE)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


ROWS, WQ, WK, BIAS = random(T, D), random(D, D, seed=1), random(4, D, seed=2), random(D, seed=7)
# No row uses slot 1.
A = [random(K, R, D, seed=3), random(K, R, D, seed=4)]
B = [random(K, R, D, seed=5).transpose(1, 2), random(K, R, 4, seed=6).transpose(1, 2)]
for _weights in (*A, *B):
    _weights[1] = torch.nan
RANKS = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
for _which in (0, 1):
    A[_which][2, 1:], B[_which][2, :, 1:] = 0.0, 0.0


def lora(base: Tensor, x: Tensor, which: int, ranks: Tensor | None = None, offset: int = 0) -> Tensor:
    return xlc.lora_linear(base, x, [A[which]], [B[which]], INDICES, [offset], 0.5, ranks)


def query_and_key(x: Tensor, wq: Tensor, wk: Tensor, bias: Tensor) -> Any:
    return lora(linear(x, wq, bias), x, 0), lora(linear(input=x, weight=wk), x, 1)


def test_products_and_lora_become_one_call() -> None:
    (text,) = graphs_of_compiling(query_and_key, ROWS, WQ, WK, BIAS)
    assert_expected_inline(
        ours(text),
        """\
%9: i32[tiles] = xpu_lora.route_tiles(%0, 3)
xpu_lora.linear_with_lora(%1, (%2, %3), (%4, None), (%5, %6), (%7, %8), %0, (0, 1), (0, 0), 0.5, tiles=%9)""",
    )


def test_the_ranks_of_the_slots_go_with_it() -> None:
    def ranked(x: Tensor, wq: Tensor, ranks: Tensor) -> Tensor:
        return lora(linear(x, wq), x, 0, ranks)

    (text,) = graphs_of_compiling(ranked, ROWS, WQ, RANKS)
    assert_expected_inline(
        ours(text),
        """\
%6: i32[tiles] = xpu_lora.route_tiles(%0, 3)
xpu_lora.linear_with_lora(%1, (%2), (None), (%3), (%4), %0, (0), (0), 0.5, tiles=%6, ranks=%5)""",
    )
    with torch.no_grad(), force_kernel("gather"):
        expected = ranked(ROWS, WQ, RANKS)
    torch.testing.assert_close(compiled_with(xlc.rewrite, ranked)(ROWS, WQ, RANKS), expected)


# What stays as it is: each a function of x, WQ and the bias.


def the_product_is_read_before(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    base = linear(x, w, bias)
    total = base.sum()
    return lora(base, x, 0), total


def a_view_of_the_product_is_read_before(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    base = linear(x, w, bias)
    total = base[:, 2:].sum()
    return lora(base, x, 0), total


def the_product_is_changed_before(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    base = linear(x, w, bias)
    base.mul_(2)
    return lora(base, x, 0)


def the_input_is_changed_in_between(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    x = x * 1
    base = linear(x, w, bias)
    x.add_(1)
    return lora(base, x, 0)


def the_weight_is_changed_in_between(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    w = w * 1
    base = linear(x, w, bias)
    w.add_(1)
    return lora(base, x, 0)


def the_bias_is_changed_in_between(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    bias = bias * 1
    base = linear(x, w, bias)
    bias[1:].add_(1)
    return lora(base, x, 0)


def the_product_is_of_another_input(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    return lora(linear(x + 1, w, bias), x, 0)


def the_product_is_of_part_of_the_input(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    return lora(linear(x.flip(0), w, bias), x, 0)


def the_product_is_followed_by_something(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    return lora(linear(x, w, bias).relu(), x, 0)


def one_of_two_is_no_product(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    return lora(linear(x, w, bias), x, 0), lora(x[:, :4] * 2, x, 1)


def autocast_rounds_the_product(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    with torch.autocast(x.device.type, torch.bfloat16):
        base = linear(x, w, bias)
    return lora(base, x, 0)


def the_bias_is_one_number(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    return lora(linear(x, w, bias[:1]), x, 0)


def the_bias_differs_by_row(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    return lora(linear(x, w, x * 2), x, 0)


NOT_JUST = "fuse_base: left alone, since an output is not just a linear of the same input"
ALONE: tuple[Callable[[Tensor, Tensor, Tensor], Any], ...] = (
    the_product_is_read_before,
    a_view_of_the_product_is_read_before,
    the_product_is_changed_before,
    the_input_is_changed_in_between,
    the_weight_is_changed_in_between,
    the_bias_is_changed_in_between,
    the_product_is_of_another_input,
    the_product_is_of_part_of_the_input,
    the_product_is_followed_by_something,
    one_of_two_is_no_product,
    autocast_rounds_the_product,
    the_bias_is_one_number,
    the_bias_differs_by_row,
)


@pytest.mark.parametrize("function", ALONE, ids=lambda function: function.__name__)
def test_what_is_more_than_a_product_of_the_same_input_is_left_alone(function: Callable[..., Any]) -> None:
    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        xlc.rewrite(module)
        texts.append(as_text(module))

    decisions: list[Decision]
    with torch.no_grad(), xlc.record_decisions() as decisions:
        got = compiled_with(passes, function)(ROWS, WQ, BIAS)
    assert calls_in(texts[0], "add_lora") == 1
    assert calls_in(texts[0], "linear_with_lora") == 0
    assert all(NOT_JUST in one.notes for one in decisions)
    with torch.no_grad(), force_kernel("gather"):
        expected = function(ROWS, WQ, BIAS)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


class Quantized(Tensor):
    """A weight as torchao stores it: whole numbers and a scale, with a product of its own and no other op."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Quantized:
        made: Quantized = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, device=numbers.device)
        return made

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __repr__(self, **_: Any) -> str:
        return f"Quantized({list(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors: dict[str, Tensor], *_: Any) -> Quantized:
        return cls(tensors["numbers"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(cls, op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if op in (aten.t.default, aten.detach.default, aten.alias.default, aten.view.default):
            return cls(op(args[0].numbers, *args[1:]), args[0].scale)
        if op in (aten.linear.default, aten.mm.default, aten.addmm.default):
            return op(*(one.numbers * one.scale if isinstance(one, cls) else one for one in args))
        return NotImplemented


@pytest.mark.filterwarnings("ignore:Quantized does not implement _stable_hash_for_caching")
def test_a_quantized_weight_keeps_its_own_product() -> None:
    model, bank = attached()
    for layer in (model.q, model.k):
        numbers = (layer.weight * 20).round().to(torch.int8)
        layer.weight = nn.Parameter(Quantized(numbers, torch.tensor(0.05, device=DEVICE)), requires_grad=False)
    torch._dynamo.reset()
    with torch.no_grad(), bank.use(NAMES):
        (text,) = graphs_of_compiling(model, X)
        got = torch.compile(model, backend="xpu_lora")(X)
        with force_kernel("gather"):
            torch.testing.assert_close(got, model(X), atol=1e-5, rtol=1e-5)
    assert (calls_in(text, "linear_with_lora"), calls_in(text, "add_lora")) == (0, 1)


def test_a_product_that_is_used_afterwards_means_its_sum() -> None:
    """An in-place LoRA, as vLLM writes it: the product itself is what is used."""

    def in_place(x: Tensor, w: Tensor) -> Tensor:
        output, hidden = linear(x, w), x.new_empty(T, R)
        xlc.bgmv_shrink(hidden, x, A[0], INDICES)
        xlc.bgmv_expand(output, hidden, B[0], INDICES)
        return output.cos() + output[:, :1]

    (text,) = graphs_of_compiling(in_place, ROWS, WQ)
    assert (calls_in(text, "linear_with_lora"), calls_in(text, "add_lora")) == (1, 0)
    with torch.no_grad():
        got = compiled_with(xlc.rewrite, in_place)(ROWS, WQ)
        with force_kernel("gather"):
            torch.testing.assert_close(got, in_place(ROWS, WQ), atol=1e-4, rtol=1e-4)


def test_products_stay_where_somebody_looks_at_what_lora_is_added_to() -> None:
    keeping = partial(xlc.rewrite, keep_bases=True)
    (text,) = graphs_of_compiling(query_and_key, ROWS, WQ, WK, BIAS, passes=keeping)
    assert (calls_in(text, "linear_with_lora"), calls_in(text, "add_lora")) == (0, 1)


def test_another_kernel_is_left_alone() -> None:
    with force_kernel("gather"):
        (text,) = graphs_of_compiling(query_and_key, ROWS, WQ, WK, BIAS)
    assert (calls_in(text, "linear_with_lora"), calls_in(text, "add_lora")) == (0, 1)


def test_a_call_that_carries_gradients_is_left_alone() -> None:
    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        xlc.rewrite(module)
        texts.append(as_text(module))

    grads = []
    weights = [one.nan_to_num() for one in (A[0], B[0])]

    def function(x: Tensor, w: Tensor) -> Tensor:
        return xlc.lora_linear(linear(x, w), x, weights[:1], weights[1:], INDICES, [0], 0.5)

    for called in (compiled_with(passes, function), function):
        w = WQ.clone().requires_grad_()
        grads.append(torch.autograd.grad(called(ROWS, w).sum(), w)[0])
    torch.testing.assert_close(*grads)
    assert calls_in(texts[0], "linear_with_lora") == calls_in(texts[0], "add_lora") == 0


def test_a_call_in_a_subgraph_is_left_alone() -> None:
    def branch(x: Tensor, w: Tensor) -> Tensor:
        return torch.cond(x.sum() < 99, lambda x: lora(linear(x, w), x, 0), lambda x: x + 1, (x,))

    (text,) = graphs_of_compiling(branch, ROWS, WQ)
    assert calls_in(text, "linear_with_lora") == 0
    with torch.no_grad():
        got = compiled_with(xlc.rewrite, branch)(ROWS, WQ)
        with force_kernel("gather"):
            torch.testing.assert_close(got, branch(ROWS, WQ), atol=1e-4, rtol=1e-4)


def test_a_program_for_export_is_left_alone(tmp_path: Path) -> None:
    """It may run where there is no Triton: what it calls chooses as it runs."""

    class Layer(nn.Module):
        def forward(self, x: Tensor, w: Tensor, a: Tensor, b: Tensor, indices: Tensor, ranks: Tensor) -> Tensor:
            return xlc.lora_linear(linear(x, w), x, [a], [b], indices, [0], ranks=ranks)

    operands = (ROWS, WQ, A[0].nan_to_num(), B[0].nan_to_num().contiguous(), INDICES, RANKS)
    with torch.no_grad():
        program = torch.export.export(Layer(), operands)
        xlc.rewrite(program)
        text = as_text(program.graph_module)
        assert (calls_in(text, "linear_with_lora"), calls_in(text, "route_tiles"), calls_in(text, "add_lora")) == (
            0,
            0,
            1,
        )
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2").module()
        got = loaded(*operands)
        with force_kernel("gather"):
            assert torch.equal(loaded(*operands), Layer()(*operands))
            torch.testing.assert_close(got, Layer()(*operands), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["graph", "xpu_lora"])
def test_numbers_of_a_model_are_those_of_eager(backend: str) -> None:
    model, bank = attached()
    torch._dynamo.reset()
    compiled = compiled_with(xlc.rewrite, model) if backend == "graph" else torch.compile(model, backend=backend)
    for names in (NAMES, ["haiku"] * 3, [None] * 3):
        with torch.no_grad(), bank.use(names):
            got = compiled(X)
            with force_kernel("gather"):
                torch.testing.assert_close(got, model(X), atol=1e-5, rtol=1e-5)


def test_a_dynamic_batch_is_compiled_once() -> None:
    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        xlc.rewrite(module)
        texts.append(as_text(module))

    def function(x: Tensor, indices: Tensor) -> Tensor:
        return xlc.lora_linear(linear(x, WQ), x, [A[0]], [B[0]], indices, [0])

    compiled = compiled_with(passes, function, dynamic=True)
    for rows in (9, 7, 2):
        x, indices = random(rows, D), INDICES.repeat(2)[:rows]
        with torch.no_grad():
            got = compiled(x, indices)
            with force_kernel("gather"):
                torch.testing.assert_close(got, function(x, indices), atol=1e-4, rtol=1e-4)
    assert [calls_in(text, "linear_with_lora") for text in texts] == [1]


def test_running_twice_changes_nothing() -> None:
    texts: list[str] = []

    def twice(module: GraphModule) -> None:
        xlc.rewrite(module)
        texts.append(as_text(module))
        xlc.rewrite(module)

    assert graphs_of_compiling(query_and_key, ROWS, WQ, WK, BIAS, passes=twice) == texts


def test_without_fuel_base_and_lora_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two calls are merged, which is one rewrite, and lowered, which is another; then there is this."""
    counts = []
    for fuel in ("2", "3"):
        monkeypatch.setenv("XPU_LORA_FUEL", fuel)
        (text,) = graphs_of_compiling(query_and_key, ROWS, WQ, WK, BIAS)
        counts.append((calls_in(text, "add_lora"), calls_in(text, "linear_with_lora")))
    assert counts == [(1, 0), (0, 1)]


def test_the_decision_says_so_and_the_model_can_be_explained_and_verified() -> None:
    model, bank = attached()
    with torch.no_grad(), bank.use(NAMES):
        with xlc.record_decisions() as decisions:
            graphs_of_compiling(model, X)
        assert [one.notes[-1] for one in decisions] == ["fuse_base: computed with its base product"] * 2
        report = xlc.explain(model, bandwidth=10)(X)
        assert [site.kernel for site in report.sites] == ["triton", "triton"]
        assert report.counts["sites"] == 2
        result = xlc.verify(model)(X)
    assert len(result.sites) == 2
    assert all(site.is_right and site.rewritten > 0 for site in result.sites)


def through_itself(x: Tensor, wq: Tensor, wk: Tensor, _bias: Tensor) -> Any:
    """A product that another one with LoRA reads before its own LoRA is added."""
    base = linear(x, wq)
    key = lora(linear(base, wk), base, 1)
    return lora(base, x, 0), key


def under_another_autocast(x: Tensor, wq: Tensor, _wk: Tensor, _bias: Tensor) -> Any:
    base = linear(x, wq)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        return lora(base, x, 0)


def with_slices_over_each_other(x: Tensor, wq: Tensor, _wk: Tensor, _bias: Tensor) -> Any:
    return xlc.lora_linear(linear(x, wq), x, A, B, INDICES, [0, 2], 0.5)


@pytest.mark.parametrize("function", [through_itself, under_another_autocast, with_slices_over_each_other])
def test_what_once_went_wrong_is_what_eager_computes(function: Callable[..., Any]) -> None:
    def tensors(results: Any) -> list[Tensor]:
        return [results] if isinstance(results, Tensor) else list(results)

    operands = (ROWS, WQ, WK, BIAS)
    with torch.no_grad():
        expected = tensors(function(*operands))
        with force_kernel("triton"):
            compiled = torch.compile(function, backend="xpu_lora", options={"xpu_lora.execute": "eager"})
            for got, wanted in zip(tensors(compiled(*operands)), expected, strict=True):
                assert got.dtype == wanted.dtype
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
