"""Stock Inductor without our passes: where ops that write in place get a wrong value (docs/compiler.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import xpu_lora_compile as xlc

B = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
INDICES = torch.tensor([0, 1, 2, -1])


@torch.library.custom_op("xpu_lora_tests::add_rows", mutates_args={"output"})
def add_rows(output: Tensor, inputs: Tensor) -> None:
    """An op that is not ours: it adds `inputs` to the first columns of `output`."""
    output[:, : inputs.shape[1]] += inputs


def with_our_op(x: Tensor) -> Tensor:
    y = x[:, :8].clone()
    xlc.bgmv_expand(x, y, B, INDICES)
    return x[:, :8] + y


def with_any_op(x: Tensor) -> Tensor:
    y = x[:, :8].clone()
    add_rows(x, y)
    return x[:, :8] + y


def is_right(function: object, **options: object) -> bool:
    torch._dynamo.reset()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    return torch.allclose(torch.compile(function, **options)(x.clone()), function(x.clone()), atol=1e-5)


MENDED = "pytorch#198031; where this passes, torch is mended: take it out of docs/compiler.md"


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="seen with torch 2.13")
@pytest.mark.xfail(strict=True, raises=AssertionError, reason=MENDED)
@pytest.mark.parametrize("function", [with_our_op, with_any_op])
def test_stock_inductor_keeps_a_copy_that_an_op_reads_while_it_writes(function: object) -> None:
    assert is_right(function)


def test_with_our_passes_the_copy_is_kept() -> None:
    assert is_right(with_our_op, options=xlc.inductor_options())
    assert is_right(with_our_op, backend="xpu_lora")
