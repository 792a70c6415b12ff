"""`lora_linears` and `add_lora`: several outputs of one input, as the passes emit them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from support.cases import BF16, DEVICE, F16, F32, F64, I32, I64, KERNELS_HERE, same_bits
from torch import Tensor

from xpu_lora_compile.errors import ShapeError, SliceError
from xpu_lora_compile.inspect.operands import RandomOperands, poison_unused_slots
from xpu_lora_compile.kernels import force_kernel
from xpu_lora_compile.ops import ADD_LORA, LORA_LINEARS, ROUTE
from xpu_lora_compile.ops.budget import budget_of


@dataclass(frozen=True)
class Slices:
    """One call; for each slice its output, its first column, its W, its R and its K.

    Attributes:
        widths: H of each output.
        slices: (output, offset, W, R, K) of each slice.
        rows: T.
        dtype: of all but the indices.
        index: dtype of the indices.
    """

    widths: tuple[int, ...]
    slices: tuple[tuple[int, int, int, int, int], ...]
    rows: int = 5
    dtype: torch.dtype = F32
    index: torch.dtype = I64

    def arguments(self) -> tuple[Any, ...]:
        """Bases, inputs, A, B, indices, outputs, offsets, scaling; NaN in each slot that no row uses."""
        random = partial(RandomOperands(0, DEVICE).normal, dtype=self.dtype, scale=0.5)
        routing = torch.tensor([0, -1, 2, 7, 0], dtype=self.index, device=DEVICE).repeat(self.rows)[: self.rows]
        a = [random(k, r, 6) for *_, r, k in self.slices]
        b = [random(k, w, r) for _, _, w, r, k in self.slices]
        for weights in (*a, *b):
            poison_unused_slots(weights, routing.tolist())
        bases = [random(self.rows, width) for width in self.widths]
        outputs, offsets = [s[0] for s in self.slices], [s[1] for s in self.slices]
        return bases, random(self.rows, 6), a, b, routing, outputs, offsets, 0.75


CASES = {
    "two-outputs": Slices((4, 7), ((0, 0, 4, 2, 3), (1, 1, 3, 2, 3))),
    "few-rows": Slices((4, 7), ((0, 0, 4, 2, 3), (1, 1, 3, 2, 3)), rows=2),
    "no-rows": Slices((4, 7), ((0, 0, 4, 2, 3), (1, 1, 3, 2, 3)), rows=0),
    "slices-out-of-order": Slices((4, 7), ((1, 4, 3, 2, 3), (0, 2, 2, 1, 3), (1, 0, 4, 3, 3), (0, 0, 2, 2, 3))),
    "overlapping": Slices((8,), ((0, 0, 5, 2, 3), (0, 3, 5, 3, 3), (0, 2, 4, 1, 3))),
    "overlapping-bf16": Slices((8, 8), ((0, 0, 5, 2, 3), (0, 3, 5, 3, 3), (1, 2, 4, 1, 3)), dtype=BF16),
    "an-output-without-slices": Slices((4, 3, 4), ((0, 0, 4, 2, 3), (2, 0, 4, 2, 3))),
    "fp16-int32": Slices((4, 7), ((0, 0, 4, 2, 3), (1, 1, 3, 2, 3)), dtype=F16, index=I32),
}
SEVERAL_K = {
    "several-K": Slices((4, 7), ((0, 0, 4, 2, 1), (1, 1, 3, 2, 3))),
    "several-K-overlapping": Slices((8,), ((0, 0, 5, 2, 1), (0, 3, 5, 3, 3), (0, 2, 4, 1, 8))),
    "several-K-overlapping-bf16": Slices((8,), ((0, 0, 5, 2, 1), (0, 3, 5, 3, 3)), dtype=BF16),
}


def check(results: list[Tensor], arguments: tuple[Any, ...]) -> None:
    """Each output is that of `lora_linear` on its own slices, within the budget; without slices it is its base."""
    bases, inputs, a, b, indices, outputs, offsets, scaling = arguments
    for position, (result, base) in enumerate(zip(results, bases, strict=True)):
        mine = [s for s, output in enumerate(outputs) if output == position]
        if not mine:
            assert same_bits(result, base)
            continue
        args = {"base": base, "inputs": inputs, "lora_a": [a[s] for s in mine], "lora_b": [b[s] for s in mine]}
        args |= {"indices": indices, "offsets": [offsets[s] for s in mine], "scaling": scaling}
        budget_of("lora_linear", args).check(result, torch.ones(result.shape, dtype=torch.bool))


@pytest.mark.parametrize("case", [*CASES, *SEVERAL_K])
def test_each_output_is_that_of_its_own_call(case: str) -> None:
    arguments = {**CASES, **SEVERAL_K}[case].arguments()
    before = [base.clone() for base in arguments[0]]
    check(LORA_LINEARS(*arguments), arguments)
    assert all(map(same_bits, arguments[0], before))


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS_HERE)
def test_adding_in_place_is_the_same_with_every_kernel_and_with_or_without_a_routing(kernel: str, case: str) -> None:
    arguments = CASES[case].arguments()
    bases, inputs, a, b, indices, *rest = arguments
    for prepared in ((), ROUTE(indices, len(a[0]))):
        outputs = [base.clone() for base in bases]
        with torch.no_grad(), force_kernel(kernel):
            ADD_LORA(outputs, inputs, a, b, indices, *rest, *prepared)
        check(outputs, arguments)


@pytest.mark.parametrize("index", [I64, I32])
def test_a_routing_sorts_the_rows_by_slot(index: torch.dtype) -> None:
    slot, has_adapter, order, starts = ROUTE(torch.tensor([2, -1, 0, 9, 2], dtype=index, device=DEVICE), 3)
    assert slot[[0, 2, 4]].tolist() == [2, 0, 2]
    assert has_adapter[:, 0].tolist() == [True, False, True, False, True]
    assert order.tolist() == [2, 0, 4, 1, 3]
    assert starts.tolist() == [0, 1, 1, 3, 5]


@pytest.mark.parametrize("case", ["slices-out-of-order", "several-K-overlapping", "an-output-without-slices"])
def test_gradients_are_right(case: str) -> None:
    known = {**CASES, **SEVERAL_K}[case]
    arguments = Slices(known.widths, known.slices, dtype=F64).arguments()
    bases, inputs, a, b, indices, *rest = arguments
    operands = [tensor.nan_to_num().requires_grad_() for tensor in (*bases, inputs, *a, *b)]
    n, s = len(bases), len(a)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        mine = tensors[n + 1 : n + 1 + s], tensors[n + 1 + s :]
        return tuple(LORA_LINEARS(list(tensors[:n]), tensors[n], *map(list, mine), indices, *rest))

    assert torch.autograd.gradcheck(function, operands)


def test_a_loss_of_one_output_gives_the_others_no_gradient() -> None:
    bases, inputs, a, b, indices, *rest = CASES["two-outputs"].arguments()
    a, b = ([stack.nan_to_num().requires_grad_() for stack in stacks] for stacks in (a, b))
    _, second = LORA_LINEARS(bases, inputs, a, b, indices, *rest)
    grads = torch.autograd.grad(second.sum(), [*a, *b])
    assert [bool(grad.any()) for grad in grads] == [False, True, False, True]


def test_a_slice_outside_its_own_output_is_an_error() -> None:
    bases, inputs, a, b, indices, outputs, _, scaling = CASES["two-outputs"].arguments()
    with pytest.raises(SliceError, match="inside the output's 4 columns"):
        LORA_LINEARS(bases, inputs, a, b, indices, outputs, [1, 1], scaling)
    with pytest.raises(ShapeError, match="three lists of the same length"):
        LORA_LINEARS(bases, inputs, a, b[:1], indices, outputs, [0, 1], scaling)
