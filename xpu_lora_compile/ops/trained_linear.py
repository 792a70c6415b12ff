"""`lora_linear` of one slice, of whose slots some are trained: parameters of their own, and gradients for these alone.

The parameters of a slot are views of its memory, so that the op reads the stacks, and an optimizer that changes a
parameter changes the slot. They are operands all the same, since autograd knows leaves and no parts of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.kernels import takes_native
from xpu_lora_compile.kernels.call import accumulator, without_autocast
from xpu_lora_compile.kernels.native import TRY_ADD_SCALED
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.ops import checks
from xpu_lora_compile.ops.internal import SLOT_PRODUCTS, expand
from xpu_lora_compile.ops.lora_linear import check_is_first_order, fused_backward


def _trained_linear(
    base: Tensor,
    inputs: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    indices: Tensor,
    scalings: Tensor,
    slots: Sequence[int],
    trained_a: Sequence[Tensor],
    trained_b: Sequence[Tensor],
) -> Tensor:
    """`base[t] + B[i] @ (scalings[i] * A[i] @ inputs[t])`, a new tensor.

    Args:
        base: `[T, H]`, H at least W.
        inputs: `[T, D]`.
        lora_a: A `[K, R, D]`, which gets no gradient.
        lora_b: B `[K, W, R]`, likewise.
        indices: `[T]`; rows whose index is no slot have no adapter.
        scalings: `[K]`, float32.
        slots: those that are trained.
        trained_a: of each of them `[r, D]`, which gets the gradient of `lora_a[slot, :r]`.
        trained_b: `[W', r]`, W' at most W, which gets that of `lora_b[slot, :W', :r]`.
    """
    _check(base, inputs, lora_a, lora_b, indices, scalings, slots, trained_a, trained_b)
    result = base.clone(memory_format=torch.contiguous_format)
    call = [result], inputs, [lora_a], [lora_b], indices, [0], [0], 1.0
    if takes_native(result) and TRY_ADD_SCALED(*call, scalings):
        return result
    _, factors = _factors(indices, scalings, accumulator(base, inputs, lora_a, lora_b))
    hidden = SLOT_PRODUCTS(inputs, lora_a, indices) * factors
    expand(result[:, : lora_b.shape[1]], hidden, lora_b, indices, add=True)
    return result


def _fake(base: Tensor, *rest: Any) -> Tensor:
    _check(base, *rest)
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _check(
    base: Tensor,
    inputs: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    indices: Tensor,
    scalings: Tensor,
    slots: Sequence[int],
    trained_a: Sequence[Tensor],
    trained_b: Sequence[Tensor],
) -> None:
    checks.check_lora_linears([base], inputs, [lora_a], [lora_b], indices, [0], [0])
    checks.check_trained(lora_a, lora_b, scalings, slots, trained_a, trained_b)


def _factors(indices: Tensor, scalings: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which rows have an adapter, and the scaling of each row's, `[T, 1]` both."""
    routing = RowRouting(indices, len(scalings))
    return routing.has_adapter, scalings[routing.slot][:, None].to(dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, lora_a, lora_b, indices, scalings, ctx.slots, trained_a, trained_b = inputs
    ctx.ranks, ctx.widths = [len(a) for a in trained_a], [len(b) for b in trained_b]
    ctx.save_for_backward(rows, lora_a, lora_b, indices, scalings)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    check_is_first_order()
    rows, lora_a, lora_b, indices, scalings = ctx.saved_tensors
    _, needs_inputs, *_, needs_a, needs_b = ctx.needs_input_grad
    needs_weights = any((*needs_a, *needs_b))
    count = len(ctx.slots)
    fused = fused_backward([grad], rows, [lora_a], [lora_b])
    if fused is not None:
        call = [grad], rows, [lora_a], [lora_b], indices, [0], [0], 1.0
        made = fused(*call, scalings, list(ctx.slots), ctx.ranks, needs_inputs, needs_weights)
        grad_rows = made.pop(0) if needs_inputs else None
    else:
        grad_rows, made = _portable_backward(ctx, grad)
    grads_a: list[Any] = made[:count] or [None] * count
    of_b = zip(made[count:], ctx.widths, strict=False)
    grads_b: list[Any] = [g if len(g) == width else g[:width] for g, width in of_b] or [None] * count
    return grad, grad_rows, None, None, None, None, None, grads_a, grads_b


def _portable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The same by plain products; both factors are masked, so that a NaN stays with the adapter of its row."""
    rows, lora_a, lora_b, indices, scalings = ctx.saved_tensors
    dtype = accumulator(grad, rows, lora_a, lora_b)
    has_adapter, factors = _factors(indices, scalings, dtype)
    grad, wide = grad[:, : lora_b.shape[1]].to(dtype), rows.to(dtype)
    hidden = SLOT_PRODUCTS(rows, lora_a, indices).to(dtype) * factors
    grad_hidden = SLOT_PRODUCTS(grad, lora_b.transpose(1, 2), indices) * factors
    grad_rows = torch.where(has_adapter, SLOT_PRODUCTS(grad_hidden, lora_a.transpose(1, 2), indices), 0.0)
    grads_a: list[Tensor] = []
    grads_b: list[Tensor] = []
    with without_autocast(rows.device.type):
        for slot, rank in zip(ctx.slots, ctx.ranks, strict=True):
            mine = (indices == slot)[:, None]
            grads_a.append(torch.where(mine, grad_hidden[:, :rank], 0.0).t() @ torch.where(mine, wide, 0.0))
            grads_b.append(torch.where(mine, grad, 0.0).t() @ torch.where(mine, hidden[:, :rank], 0.0))
    return grad_rows.to(rows.dtype), [*(g.to(lora_a.dtype) for g in grads_a), *(g.to(lora_b.dtype) for g in grads_b)]


torch.library.custom_op(
    "xpu_lora::trained_linear",
    _trained_linear,
    mutates_args=(),
    schema="(Tensor base, Tensor inputs, Tensor lora_a, Tensor lora_b, Tensor indices, Tensor scalings, int[] slots, "
    "Tensor[] trained_a, Tensor[] trained_b) -> Tensor",
)
torch.library.register_fake("xpu_lora::trained_linear", _fake)
torch.library.register_autograd("xpu_lora::trained_linear", _backward, setup_context=_setup)

TRAINED_LINEAR = torch.ops.xpu_lora.trained_linear.default
