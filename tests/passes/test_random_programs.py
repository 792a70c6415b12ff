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
from xpu_lora_compile.ops import BGMV_EXPAND, BGMV_SHRINK, EXPAND, EXPAND_SLICE, LORA_LINEAR, LORA_LINEARS, SHRINK
from xpu_lora_compile.passes.editing import calls_to, graphs_of

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


@often
@given(programs())
def test_any_program_computes_what_it_did_before(program: Program) -> None:
    expected, expected_sharing = outcome(program.function())
    got, sharing = outcome(compiled(program))
    for left, right in zip(got, expected, strict=True):
        assert torch.equal(left, right)
    assert sharing == expected_sharing
