"""Graphs in grad mode: what autograd has saved, detached, or must keep is not lost by a rewrite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.cases import DEVICE
from torch import Tensor

import xpu_lora_compile as xlc

INDICES = torch.tensor([0, -1, 1], device=DEVICE)
RANDOM = torch.Generator().manual_seed(0)
A, B, WEIGHT = (torch.randn(shape, generator=RANDOM).to(DEVICE) for shape in ((2, 2, 4), (2, 4, 2), (4, 4)))


def a_base_that_autograd_has_saved(x: Tensor, gate: Tensor) -> Tensor:
    base = x.detach() @ WEIGHT
    return base * gate + xlc.lora_linear(base, x.detach(), [A], [B], INDICES, [0])


def detached_first(x: Tensor, gate: Tensor) -> Tensor:
    left = xlc.lora_linear(x.detach() @ WEIGHT, x.detach(), [A], [B], INDICES, [0])
    return left * gate + xlc.lora_linear(x @ WEIGHT, x, [A], [B], INDICES, [0])


def detached_second(x: Tensor, gate: Tensor) -> Tensor:
    left = xlc.lora_linear(x @ WEIGHT, x, [A], [B], INDICES, [0])
    return left * gate + xlc.lora_linear(x.detach() @ WEIGHT, x.detach(), [A], [B], INDICES, [0])


def added_to(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def function(x: Tensor, gate: Tensor) -> Tensor:
        output = x @ WEIGHT
        with torch.no_grad():
            hidden = x.new_zeros(3, 2)
            xlc.bgmv_shrink(hidden, x.detach(), A, INDICES)
            xlc.bgmv_expand(view(output), hidden, B, INDICES)
        return output * gate

    return function


FUNCTIONS = {
    "saved-base": a_base_that_autograd_has_saved,
    "detached-first": detached_first,
    "detached-second": detached_second,
    "under-no_grad": added_to(lambda output: output),
    "through-detach": added_to(lambda output: output.detach()),
    "through-data": added_to(lambda output: output.data),
}


@pytest.mark.parametrize("execute", ["eager", "inductor"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_the_eager_run(name: str, execute: str) -> None:
    function = FUNCTIONS[name]
    compiled = torch.compile(function, backend="xpu_lora", options={"xpu_lora.execute": execute})
    found = []
    for run in (function, compiled):
        random = torch.Generator().manual_seed(1)
        x, gate = (torch.randn(shape, generator=random).to(DEVICE).requires_grad_() for shape in ((3, 4), (4,)))
        result = run(x, gate)
        result.square().sum().backward()
        found.append((result.detach(), x.grad, gate.grad))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)
