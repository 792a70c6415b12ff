"""`lora_linear` of slots that are trained: gradients for these alone.

The op reads the stacks, which get no gradient. Two leaves a slice, which nobody reads, get those of the slots that are
trained, of all in one tensor: autograd takes some 7 us for each leaf, and adapters times modules times 2 are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.kernels import takes_native, takes_triton_backward, triton_gradients
from xpu_lora_compile.kernels.call import accumulator, without_autocast
from xpu_lora_compile.kernels.native import TRY_ADD_SCALED
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.kernels.triton_visible import Launch, launch_flat, launch_traced, run_here
from xpu_lora_compile.ops import checks
from xpu_lora_compile.ops.internal import LIBRARY, SLOT_PRODUCTS, TRITON_BACKWARD, expand, is_interpreted
from xpu_lora_compile.ops.lora_linear import check_is_first_order, fused_backward
from xpu_lora_compile.torch_internals import inline_under_aot


def _trained_linear(
    bases: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    scalings: Tensor,
    slots: Tensor,
    trained_a: Sequence[Tensor],
    trained_b: Sequence[Tensor],
    tiles: Tensor | None = None,
) -> list[Tensor]:
    """`bases[s][t] + B[s][i] @ (scalings[i] * A[s][i] @ inputs[t])` of each slice s, new tensors.

    Args:
        bases: of each slice `[T, H]`, H at least W.
        inputs: `[T, D]`.
        lora_a: of each slice A `[K, R, D]`, which gets no gradient.
        lora_b: of each slice B `[K, W, R]`, likewise.
        indices: `[T]`; rows whose index is no slot have no adapter.
        scalings: `[K]`, float32.
        slots: `[n]`, those that are trained, each once.
        trained_a: of each slice a leaf `[n, R, D]`, which gets the gradient of `lora_a[s][slots]`.
        trained_b: of each slice a leaf `[n, R, W]`, which gets that of `lora_b[s][slots]`, turned.
        tiles: of `triton_training_tiles`, in a graph that runs the Triton kernels.

    Returns:
        A tensor for each base; with tiles one more, which the backward pass reads.
    """
    operands = bases, inputs, lora_a, lora_b, indices, scalings, slots, trained_a, trained_b
    _check(*operands)
    if takes_triton_backward(bases, inputs, lora_a, lora_b):
        made: list[Tensor] = run_here(partial(_on_a_gpu, launch_flat))(*operands, tiles)
        return made
    results = [base.clone(memory_format=torch.contiguous_format) for base in bases]
    if takes_native(results[0]) and TRY_ADD_SCALED(results, *_places(inputs, lora_a, lora_b, indices), scalings):
        return results
    _, factors = _factors(indices, scalings, accumulator(*bases, inputs, *lora_a, *lora_b))
    for result, a, b in zip(results, lora_a, lora_b, strict=True):
        expand(result[:, : b.shape[1]], SLOT_PRODUCTS(inputs, a, indices) * factors, b, indices, add=True)
    return results


def _on_a_gpu(
    launch: Launch,
    bases: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    scalings: Tensor,
    slots: Tensor,
    trained_a: Sequence[Tensor],
    trained_b: Sequence[Tensor],
    tiles: Tensor | None = None,
) -> list[Tensor]:
    return triton_gradients.forward(launch, bases, inputs, lora_a, lora_b, indices, scalings, tiles)


def _fake(
    bases: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    scalings: Tensor,
    slots: Tensor,
    trained_a: Sequence[Tensor],
    trained_b: Sequence[Tensor],
    tiles: Tensor | None = None,
) -> list[Tensor]:
    _check(bases, inputs, lora_a, lora_b, indices, scalings, slots, trained_a, trained_b)
    made = [torch.empty_like(base, memory_format=torch.contiguous_format) for base in bases]
    if tiles is not None and triton_gradients.keeps_hidden(lora_a, lora_b):
        made.append(triton_gradients.empty_kept(inputs, lora_a))
    return made


def _is_opaque(bases: Sequence[Tensor], *rest: Any) -> bool:
    """Whether a compiler leaves a call as it is: on a CPU, where Triton's kernels are not to run."""
    return is_interpreted(bases) or not takes_triton_backward(bases, *rest[:3])


def _check(
    bases: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    *trained: Any,
) -> None:
    checks.check_lora_linears(bases, *_places(inputs, lora_a, lora_b, indices)[:-1])
    checks.check_trained(lora_a, lora_b, *trained)


def _places(inputs: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], indices: Tensor) -> tuple[Any, ...]:
    """The operands of a call of several slices, each into the first columns of an output of its own."""
    return inputs, lora_a, lora_b, indices, list(range(len(lora_a))), [0] * len(lora_a), 1.0


def _factors(indices: Tensor, scalings: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which rows have an adapter, and the scaling of each row's, `[T, 1]` both."""
    routing = RowRouting(indices, len(scalings))
    return routing.has_adapter, scalings[routing.slot][:, None].to(dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    bases, rows, lora_a, lora_b, indices, scalings, slots, _, _, *tiles = inputs
    ctx.slices, ctx.has_tiles = len(bases), bool(tiles) and tiles[0] is not None
    more = (*tiles, *output[len(bases) :]) if ctx.has_tiles else output[len(bases) :]
    ctx.save_for_backward(rows, indices, scalings, slots, *lora_a, *lora_b, *more)


def _backward(ctx: Any, given: list[Tensor]) -> tuple[Any, ...]:
    check_is_first_order()
    grads, count = given[: ctx.slices], ctx.slices
    rows, indices, scalings, slots, *rest = ctx.saved_tensors
    lora_a, lora_b, more = rest[:count], rest[count : 2 * count], rest[2 * count :]
    _, needs_inputs, _, _, _, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
    needs_weights = any((*needs_a, *needs_b))
    fused = fused_backward(grads, rows, lora_a, lora_b)
    if fused is not None:
        found = {}
        if fused is TRITON_BACKWARD:
            tiles = more.pop(0) if ctx.has_tiles else None
            found = {"tiles": tiles, "kept": more[0] if more else None}
        call = grads, *_places(rows, lora_a, lora_b, indices)
        made = fused(*call, scalings, slots, needs_inputs, needs_weights, **found)
        grad_rows = made.pop(0) if needs_inputs else None
    else:
        grad_rows, made = _portable_backward(grads, rows, lora_a, lora_b, indices, scalings, slots)
    none = [None] * count
    of_trained = (made[:count], made[count:]) if needs_weights else (none, none)
    # A trailing argument that equals its default may be missing.
    others = [None] * (len(ctx.needs_input_grad) - 9)
    return grads, grad_rows, none, none, None, None, None, *of_trained, *others


def _portable_backward(
    grads: Sequence[Tensor],
    rows: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    scalings: Tensor,
    slots: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """The same by plain products; both factors are masked, so that a NaN stays with the adapter of its row."""
    dtype = accumulator(*grads, rows, *lora_a, *lora_b)
    has_adapter, factors = _factors(indices, scalings, dtype)
    wide = rows.to(dtype)
    grad_rows = torch.zeros_like(wide)
    grads_a: list[Tensor] = []
    grads_b: list[Tensor] = []
    mine = (indices[None, :] == slots[:, None])[:, :, None]
    for whole, a, b in zip(grads, lora_a, lora_b, strict=True):
        grad = whole[:, : b.shape[1]].to(dtype)
        hidden = SLOT_PRODUCTS(rows, a, indices).to(dtype) * factors
        grad_hidden = SLOT_PRODUCTS(grad, b.transpose(1, 2), indices) * factors
        from_slice = SLOT_PRODUCTS(grad_hidden, a.transpose(1, 2), indices)
        grad_rows = grad_rows + torch.where(has_adapter, from_slice, 0.0)
        with without_autocast(rows.device.type):
            # A layer without trained slots has leaves without gradients.
            pairs = ((grads_a, grad_hidden, wide, a), (grads_b, hidden, grad, b)) if len(slots) else ()
            for made, left, right, stack in pairs:
                sums = [torch.where(m, left, 0.0).t() @ torch.where(m, right, 0.0) for m in mine]
                made.append(torch.stack(sums).to(stack.dtype))
    return grad_rows.to(rows.dtype), [*grads_a, *grads_b]


torch.library.custom_op(
    "xpu_lora::trained_linear",
    _trained_linear,
    mutates_args=(),
    schema="(Tensor[] bases, Tensor inputs, Tensor[] lora_a, Tensor[] lora_b, Tensor indices, Tensor scalings, "
    "Tensor slots, Tensor[] trained_a, Tensor[] trained_b, Tensor? tiles=None) -> Tensor[]",
)
torch.library.register_fake("xpu_lora::trained_linear", _fake)
torch.library.register_autograd("xpu_lora::trained_linear", _backward, setup_context=_setup)
inline_under_aot(LIBRARY, "trained_linear", partial(_on_a_gpu, launch_traced), unless=_is_opaque)

TRAINED_LINEAR = torch.ops.xpu_lora.trained_linear.default
