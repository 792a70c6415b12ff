"""Any program computes what it did before: the results, the inputs it changes, and which results share memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support.programs import Program, programs
from torch import Tensor
from torch.fx import GraphModule

import xpu_lora_compile as xlc

often = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def outcome(function: Callable[..., Any]) -> tuple[list[Tensor], list[bool]]:
    """What a call returns, with the inputs that it may have changed; and which pairs of all these share memory."""
    inputs = Program.inputs()
    with torch.no_grad():
        tensors = [*function(*inputs), *inputs]
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    return tensors, [left == right for left in storages for right in storages]


def compiled(program: Program, passes: Callable[[GraphModule], Any] = xlc.rewrite) -> Callable[..., Any]:
    def backend(module: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        passes(module)
        return module.forward

    torch._dynamo.reset()
    return torch.compile(program.function(), backend=backend, fullgraph=True)


def computes_what_it_did_before(program: Program) -> None:
    expected, expected_sharing = outcome(program.function())
    got, sharing = outcome(compiled(program))
    for left, right in zip(got, expected, strict=True):
        assert torch.equal(left, right)
    assert sharing == expected_sharing


@often
@given(programs())
def test_any_program_computes_what_it_did_before(program: Program) -> None:
    computes_what_it_did_before(program)


def chain(x: str, y: str, h: str, indices: str = "i0", b: str = "b4") -> str:
    """A shrink and an expand over a rank buffer of their own."""
    return (
        f"{h} = x.new_zeros(3, 2); xlc.bgmv_shrink({h}, {x}, a1, {indices}); xlc.bgmv_expand({y}, {h}, {b}, {indices})"
    )


# What once went wrong, or nearly did: each is a way of taking one content of a memory for another.
PROGRAMS = {
    "input-before-and-after-its-own-lora": [
        "z = torch.zeros_like(x)", "q = x @ w", chain("q", "z", "h1"), chain("x", "q", "h2"), "v = x * 2",
        chain("q", "v", "h3"), "return [z, q, v]"],
    "indices-change-between-calls": [
        "z = x @ w", "v = x @ w", "i = i0 + 0", "r = xlc.lora_linear(z, x, [a1], [b4], i, [0])", "i.copy_(i1)",
        "return [r, xlc.lora_linear(v, z, [a1], [b4], i, [0])]"],
    "base-is-the-input": [
        "q = x @ w", "return [xlc.lora_linear(q, q, [a1, a2], [b4, b2], i0, [0, 1])]"],
    "two-views-are-bases-of-one-call": [
        "q = x @ w", "v = q.view(3, 4)", "r = xlc.lora_linear(q, x, [a1], [b4], i0, [0])",
        "return [r, xlc.lora_linear(v, x, [a1], [b4], i0, [0])]"],
    "result-of-a-copied-base-is-a-base": [
        "q = x @ w", "r = xlc.lora_linear(q, x, [a1], [b4], i0, [0])",
        "return [xlc.lora_linear(r, q, [a1], [b4], i0, [0]), q]"],
    "view-of-a-result-is-seen-later": [
        "q = x @ w", "r = xlc.lora_linear(q, x, [a1], [b4], i0, [0])", "v = r.view(2, 6)",
        "return [xlc.lora_linear(r, y, [a1], [b4], i0, [0]), v + 0]"],
    "refused-shrink-reads-the-output-between": [
        "q = x @ w", "h1 = x.new_zeros(3, 2)", "xlc.bgmv_shrink(h1, x, a1, i0)", "xlc.bgmv_expand(q, h1, b4, i0)",
        "h2 = x.new_zeros(3, 2)", "xlc.bgmv_shrink(h2, q, a1, i0)",
        "xlc.bgmv_expand_slice(q, h1, b2, i0, 0, 2)", "return [q, h2]"],
    "weights-change-between-calls": [
        "q = x @ w", "v = x @ w", "r = xlc.lora_linear(q, x, [a1], [b4], i0, [0])", "b4.add_(1)",
        "return [r, xlc.lora_linear(v, x, [a1], [b4], i0, [0])]"],
    "columns-of-another-view-of-the-output": [
        "q = x @ w", "v = q.view(3, 4)", chain("x", "v", "h1"), "o = v[:, 1:3]", chain("x", "o", "h2", "i1", "b2"),
        "return [v]"],
    "equal-indices-are-both-returned": [
        "i = i0 + 1", "j = i0 + 1", "r = xlc.lora_linear(x, x, [a1], [b4], i, [0])",
        "return [i, j, r, xlc.lora_linear(y, x, [a1], [b4], j, [0])]"],
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_once_went_wrong_stays_right(name: str) -> None:
    lines = "\n".join(f"    {line}" for line in PROGRAMS[name])
    computes_what_it_did_before(Program(f"def program(x, y, w, a1, a2, b2, b4, b6, i0, i1):\n{lines}\n"))
