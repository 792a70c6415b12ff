"""`share_input`: what it rewrites, what it leaves alone and why, that the numbers agree, and that twice is once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support.cases import ADD_HERE, DEVICE
from support.snapshot import as_text, calls_in, compiled_with, graphs_of_compiling, only
from torch import Tensor
from torch.fx import GraphModule

import xpu_lora_compile as xlc
from xpu_lora_compile.ops import TRAINED_LINEAR, reference
from xpu_lora_compile.passes import Decision, find_sites, share_input
from xpu_lora_compile.passes.editing import graphs_of
from xpu_lora_compile.passes.graph import Rewrite

shared = only(find_sites, share_input)

T, D, R, K = 5, 6, 2, 3
INDICES = torch.tensor([0, -1, 2, K, 0], device=DEVICE)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


X, WQ, WK = random(T, D), random(D, D, seed=1), random(4, D, seed=2)
# No row uses slot 1.
A = [random(K, R, D, seed=3), random(K, R + 1, D, seed=4)]
B = [random(K, D, R, seed=5), random(K, 4, R + 1, seed=6)]
for _weights in (*A, *B):
    _weights[1] = torch.nan


# A rank that is too high is as good as none.
RANKS = torch.full((K,), R + 1, dtype=torch.int32, device=DEVICE)


def lora(
    base: Tensor,
    x: Tensor,
    which: int,
    scaling: float = 0.5,
    indices: Tensor = INDICES,
    ranks: Tensor | None = None,
) -> Tensor:
    return xlc.lora_linear(base, x, [A[which]], [B[which]], indices, [0], scaling, ranks)


def query_and_key(x: Tensor, wq: Tensor, wk: Tensor) -> Any:
    q = lora(torch.nn.functional.linear(x, wq), x, 0)
    k = lora(torch.nn.functional.linear(x, wk), x, 1)
    return q.sin(), k.cos()


def test_calls_on_one_input_become_one() -> None:
    def calls(x: Tensor, q: Tensor, k: Tensor, a: Tensor, b: Tensor, indices: Tensor) -> Any:
        k_1 = xlc.lora_linear(k, x, [a], [b], indices, [0])
        return k_1, xlc.lora_linear(q + 1, x, [a], [b], indices, [2])

    (text,) = graphs_of_compiling(calls, X, random(T, 8), random(T, 4), A[1], B[1], INDICES, passes=shared)
    assert_expected_inline(
        text,
        """\
%0: f32[5, 8] = input
%1: f32[5, 4] = input
%2: f32[5, 6] = input
%3: f32[3, 3, 6] = input
%4: f32[3, 4, 3] = input
%5: i64[5] = input
%6: f32[5, 8] = add(%0, 1)
xpu_lora.lora_linears((%1, %6), %2, (%3, %3), (%4, %4), %5, (0, 1), (0, 2), 1.0)
%8: f32[5, 4] = getitem(%7, 0)
%9: f32[5, 8] = getitem(%7, 1)
return (%8, %9)""",
    )


def test_calls_with_the_same_ranks_become_one() -> None:
    def calls(x: Tensor, q: Tensor, k: Tensor, ranks: Tensor) -> Any:
        return lora(q, x, 0, ranks=ranks), lora(k, x, 1, ranks=ranks)

    (text,) = graphs_of_compiling(calls, X, random(T, D), random(T, 4), RANKS, passes=shared)
    assert_expected_inline(
        "\n".join(line for line in text.split("\n") if "xpu_lora" in line),
        """xpu_lora.lora_linears((%0, %1), %2, (%3, %4), (%5, %6), %7, (0, 1), (0, 0), 0.5, %8)""",
    )


def test_numbers_agree_with_the_reference() -> None:
    with torch.no_grad():
        q, k = compiled_with(xlc.rewrite, query_and_key)(X, WQ, WK)
    for got, function, weight, s in ((q, torch.sin, WQ, 0), (k, torch.cos, WK, 1)):
        base = torch.nn.functional.linear(X, weight)
        exact = reference.lora_linear(base.double(), X.double(), [A[s]], [B[s]], INDICES, [0], 0.5)
        torch.testing.assert_close(got, function(exact).float(), atol=1e-5, rtol=1e-5)


def test_a_dynamic_batch_is_compiled_once() -> None:
    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        shared(module)
        texts.append(as_text(module))
        xlc.rewrite(module)

    def two(x: Tensor, indices: Tensor) -> Any:
        return lora(x @ WQ.t(), x, 0, indices=indices), lora(x @ WK.t(), x, 1, indices=indices)

    compiled = compiled_with(passes, two, dynamic=True)
    for rows in (9, 7, 2):
        x, indices = random(rows, D), INDICES.repeat(2)[:rows]
        with torch.no_grad():
            for got, expected in zip(compiled(x, indices), two(x, indices), strict=True):
                torch.testing.assert_close(got, expected)
    assert [calls_in(text, "lora_linears") for text in texts] == [1]


@pytest.mark.parametrize("of", ["both", "q", "k"])
def test_gradients_are_those_of_eager(of: str) -> None:
    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        xlc.rewrite(module)
        texts.append(as_text(module))

    def loss(function: Callable[..., Any], *operands: Tensor) -> Tensor:
        q, k = function(*operands)
        return {"both": q.sum() + k.square().sum(), "q": q.sum(), "k": k.sum()}[of]

    weights = [torch.nan_to_num(one) for one in (*A, *B)]

    def calls(x: Tensor, wq: Tensor, wk: Tensor, *weights: Tensor) -> Any:
        a, a_1, b, b_1 = weights
        q = xlc.lora_linear(x @ wq.t(), x, [a], [b], INDICES, [0], 0.5)
        return q, xlc.lora_linear(x @ wk.t(), x, [a_1], [b_1], INDICES, [0], 0.5)

    operands = [one.clone().requires_grad_() for one in (X, WQ, WK, *weights)]
    expected = torch.autograd.grad(loss(calls, *operands), operands, allow_unused=True, materialize_grads=True)
    # The graph itself, which autograd follows; then through AOTAutograd.
    torch._dynamo.reset()
    for compiled in (compiled_with(passes, calls), torch.compile(calls, backend="aot_eager")):
        got = torch.autograd.grad(loss(compiled, *operands), operands, allow_unused=True, materialize_grads=True)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right)
    assert calls_in(texts[0], "lora_linears") == 1
    assert calls_in(texts[0], ADD_HERE) == 0


def test_a_training_step_through_aot_autograd_gives_the_gradients_of_eager() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def backend(module: GraphModule, inputs: list[Any]) -> Any:
        xlc.rewrite(module)
        assert calls_in(as_text(module), "lora_linears") == 1
        return aot_autograd(fw_compiler=lambda graph, _inputs: make_boxed_func(graph.forward))(module, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: query_and_key(x, WQ, WK), backend=backend, fullgraph=True)
    grads = []
    for function in (compiled, lambda x: query_and_key(x, WQ, WK)):
        x = X.clone().requires_grad_()
        sum(one.sum() for one in function(x)).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_a_call_inside_cond_is_shared() -> None:
    def branch(x: Tensor) -> Any:
        return torch.cond(x.sum() < 99, lambda x: query_and_key(x, WQ, WK), lambda x: (x + 1, x[:, :4] + 1), (x,))

    (text,) = graphs_of_compiling(branch, X, passes=shared)
    assert calls_in(text, "lora_linears") == 1
    with torch.no_grad():
        for got, expected in zip(compiled_with(xlc.rewrite, branch)(X), query_and_key(X, WQ, WK), strict=True):
            torch.testing.assert_close(got, expected)


def test_an_exported_program_is_shared() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return query_and_key(x, WQ, WK)

    with torch.no_grad():
        program = torch.export.export(Layer(), (X,))
        shared(program.graph_module)
        assert calls_in(as_text(program.graph_module), "lora_linears") == 1
        xlc.rewrite(program)
        for got, expected in zip(program.module()(X), query_and_key(X, WQ, WK), strict=True):
            torch.testing.assert_close(got, expected)


# Two calls that stay two.


def one_depends_on_the_other(x: Tensor) -> Any:
    q = lora(x @ WQ, x, 0)
    return q, lora(q[:, :4] * 2, x, 1)


def the_base_is_changed_in_place(x: Tensor) -> Any:
    k = x[:, :4] * 2
    q = lora(x @ WQ, x, 0)
    k.add_(1)
    return q, lora(k, x, 1)


def the_base_is_random(x: Tensor) -> Any:
    q = lora(x @ WQ, x, 0)
    return q, lora(torch.bernoulli(torch.ones_like(x[:, :4])), x, 1)


def the_weights_are_changed(x: Tensor) -> Any:
    b, k = B[1] * 1, x[:, :4] * 2
    q = lora(x @ WQ, x, 0)
    b.mul_(3)
    return q, xlc.lora_linear(k, x, [A[1]], [b], INDICES, [0], 0.5)


def the_input_is_changed(x: Tensor) -> Any:
    x = x * 1
    q = lora(x @ WQ, x, 0)
    x.add_(1)
    return q, lora(x[:, :4] * 2, x, 1)


def the_indices_are_changed(x: Tensor) -> Any:
    indices = INDICES + 0
    q = lora(x @ WQ, x, 0, indices=indices)
    indices.fill_(2)
    return q, lora(x[:, :4] * 2, x, 1, indices=indices)


def scalings_differ(x: Tensor) -> Any:
    return lora(x @ WQ, x, 0), lora(x[:, :4] * 2, x, 1, scaling=2.0)


def inputs_differ(x: Tensor) -> Any:
    return lora(x @ WQ, x, 0), lora(x[:, :4] * 2, x + 0, 1)


def autocast_ends_between(x: Tensor) -> Any:
    with torch.autocast(x.device.type, torch.bfloat16):
        q = lora(x @ WQ, x, 0)
    return q, lora((x @ WQ)[:, :4], x, 1)


def grad_mode_changes_between(x: Tensor) -> Any:
    q = lora(x @ WQ, x, 0)
    with torch.enable_grad():
        k = lora((x @ WQ)[:, :4], x, 1)
    return q, k


def ranks_differ(x: Tensor) -> Any:
    return lora(x @ WQ, x, 0, ranks=RANKS), lora(x[:, :4] * 2, x, 1, ranks=RANKS + 1)


def ranks_are_given_to_one(x: Tensor) -> Any:
    return lora(x @ WQ, x, 0, ranks=RANKS), lora(x[:, :4] * 2, x, 1)


def the_ranks_are_changed(x: Tensor) -> Any:
    ranks = RANKS + 0
    q = lora(x @ WQ, x, 0, ranks=ranks)
    ranks.add_(1)
    return q, lora(x[:, :4] * 2, x, 1, ranks=ranks)


MOVES = "share_input: left alone, since its base cannot move up to the first call on this input"
APART: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "depends-on-the-other": (one_depends_on_the_other, [MOVES]),
    "base-changed": (the_base_is_changed_in_place, [MOVES]),
    "base-random": (the_base_is_random, [MOVES]),
    "weights-changed": (the_weights_are_changed, [MOVES]),
    "input-changed": (the_input_is_changed, []),
    "indices-changed": (the_indices_are_changed, []),
    "scalings-differ": (scalings_differ, []),
    "inputs-differ": (inputs_differ, []),
    "ranks-differ": (ranks_differ, []),
    "ranks-of-one": (ranks_are_given_to_one, []),
    "ranks-changed": (the_ranks_are_changed, []),
    "autocast-ends-between": (autocast_ends_between, []),
    "grad-mode-changes-between": (grad_mode_changes_between, []),
}


@pytest.mark.parametrize("case", APART)
def test_calls_that_must_stay_apart_do(case: str) -> None:
    function, notes = APART[case]
    texts: list[str] = []

    def passes(module: GraphModule) -> None:
        shared(module)
        texts.append(as_text(module))
        xlc.rewrite(module)

    decisions: list[Decision]
    with torch.no_grad(), xlc.record_decisions() as decisions:
        got, expected = compiled_with(passes, function)(X), function(X)
    assert [calls_in(texts[0], op) for op in ("lora_linear", "lora_linears")] == [2, 0]
    assert [note for note in decisions[1].notes if note.startswith("share_input")] == notes
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_each_call_keeps_its_decision_and_names_the_others() -> None:
    with torch.no_grad(), xlc.record_decisions() as decisions:
        compiled_with(xlc.rewrite, query_and_key)(X, WQ, WK)
    assert [decision.op for decision in decisions] == ["lora_linear"] * 2
    line = max(line for *_, line in lora.__code__.co_lines() if line is not None)
    assert all(f"share_input: one call for {__file__}:{line}" in one.notes for one in decisions)


def test_running_twice_changes_nothing() -> None:
    texts: list[str] = []

    def twice(module: GraphModule) -> None:
        shared(module)
        texts.append(as_text(module))
        for graph in graphs_of(module):
            share_input(graph, Rewrite())

    assert graphs_of_compiling(query_and_key, X, WQ, WK, passes=twice) == texts


def _trained(x: Tensor, bases: tuple[Tensor, Tensor], scalings: tuple[Tensor, Tensor], leaves: list[Tensor]) -> Any:
    """Two layers on one input, of whose slots two are trained."""
    slots = SLOTS
    calls = [
        TRAINED_LINEAR([base], x, [a], [b], INDICES, scaling, slots, leaves[s : s + 1], leaves[s + 2 : s + 3])[0]
        for s, (base, a, b, scaling) in enumerate(zip(bases, A, B, scalings, strict=True))
    ]
    return calls[0].sin(), calls[1].cos()


SLOTS, FACTORS, OTHERS = torch.tensor([0, 2], device=DEVICE), torch.ones(K, device=DEVICE), torch.ones(K, device=DEVICE)


@pytest.mark.parametrize("scalings", [(FACTORS, FACTORS), (FACTORS, OTHERS)], ids=["the same", "two tensors"])
def test_layers_that_train_the_same_slots_with_the_same_scalings_become_one_call(scalings: Any) -> None:
    x = X.clone().requires_grad_()
    leaves = [random(2, *stack.shape[1:], seed=7 + s).requires_grad_() for s, stack in enumerate((*A, *_turned()))]
    bases = random(T, D, seed=8), random(T, 4, seed=9)
    operands = x, bases, scalings, leaves
    texts = graphs_of_compiling(_trained, *operands, passes=shared)
    calls = [line.split("(")[0] for line in "\n".join(texts).splitlines() if "trained_linear" in line]
    is_one = scalings[0] is scalings[1]
    assert len(calls) == (1 if is_one else 2)
    compiled = compiled_with(shared, _trained)
    wanted = torch.autograd.grad([value.sum() for value in _trained(*operands)], [x, *leaves])
    got = torch.autograd.grad([value.sum() for value in compiled(*operands)], [x, *leaves])
    for mine, right in zip(got, wanted, strict=True):
        assert right.any()
        torch.testing.assert_close(mine, right)


def _turned() -> list[Tensor]:
    return [stack.transpose(1, 2) for stack in B]
