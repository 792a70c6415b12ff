"""The functional op: a linear layer's output plus every row's own adapter, differentiable.

And its internal form for several outputs, which `share_input` emits: one op, called on lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from xpu_lora_compile.errors import LostGradientError, ShapeError
from xpu_lora_compile.kernels import preferred_on, takes_native, takes_triton_backward
from xpu_lora_compile.kernels.call import accumulator, repeated
from xpu_lora_compile.kernels.native import NATIVE_BACKWARD, TRY_ADD_LORA, TRY_ADD_SEVERAL
from xpu_lora_compile.ops import checks
from xpu_lora_compile.ops.checks import without_slice_dim
from xpu_lora_compile.ops.internal import ADD_LORA, OUTER_BY_SLOT, ROUTE_TILES, SLOT_PRODUCTS, TRITON_BACKWARD
from xpu_lora_compile.torch_internals import is_traced, runs_plainly


def lora_linear(
    base: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_indices_tensor: Tensor,
    slice_offsets: Sequence[int],
    scaling: float = 1.0,
    ranks: Tensor | None = None,
    adapter_weights: Tensor | None = None,
) -> Tensor:
    """Add to a linear layer's output what each row's own adapter makes of the layer's input.

    ```
    result = base
    result[t, o : o + W] += B[i] @ (scaling * A[i] @ inputs[t])      for each slice's A, B and offset o
    ```

    Rows without an adapter, and columns that no slice covers, equal those of `base`. With `adapter_weights` a row has M
    adapters, `i_j = lora_indices_tensor[t, j]`, and gets the sum of what they add, each times `adapter_weights[t, j]`.

    Args:
        base: `[T, H]`, not changed.
        inputs: `[T, D]`.
        lora_a: for each slice, A `[K, R, D]` or `[K, 1, R, D]`, any strides.
        lora_b: for each slice, B `[K, W, R]` or `[K, 1, W, R]`, any strides.
        lora_indices_tensor: `[T]`, int32 or int64; with `adapter_weights` `[T, M]`.
        slice_offsets: for each slice, its first column; every slice lies inside H.
        scaling: factor on what is added.
        ranks: `[K]`, int32 or int64: a promise that A's rows and B's columns from `ranks[i]` on are zeros in slot i,
            so that a kernel need not read them. Without it all R are read.
        adapter_weights: `[T, M]`, floats; those of places without an adapter do not matter.

    Returns:
        `[T, H]` in the dtype of `base`; a new tensor.

    Raises:
        ContractError: a shape, dtype, device or slice that does not fit; the subclass says which.

    Precision: float32, bfloat16 and float16 mix freely; the rank vector and all sums are float32, and the result is
    rounded once; on a CPU bfloat16 numbers below 1.2e-38 may count as 0 in the products. (With float64 among the
    operands, for `gradcheck`, all is float64.)

    Gradients: to base, inputs, both weight lists and `adapter_weights`. A row without an adapter gives none to any
    weights, and its input gets 0; slots that no row uses get 0, and so do weights of places without an adapter. Second
    derivatives are not provided, nor are the transforms of `torch.func`: `jvp` sees a constant here, `grad` and `vmap`
    raise torch's own error.

    Example:
        >>> a, b = torch.ones(1, 1, 3), torch.ones(1, 2, 1)
        >>> lora_linear(torch.zeros(2, 2), torch.ones(2, 3), [a], [b], torch.tensor([0, -1]), [0]).tolist()
        [[3.0, 3.0], [0.0, 0.0]]
        >>> a, b = torch.ones(2, 1, 3), torch.tensor([[[1.0]], [[10.0]]])
        >>> pairs, weights = torch.tensor([[0, 1], [1, -1]]), torch.tensor([[0.5, 2.0], [1.0, 0.0]])
        >>> lora_linear(torch.zeros(2, 1), torch.ones(2, 3), [a], [b], pairs, [0], adapter_weights=weights).tolist()
        [[61.5], [30.0]]
    """
    if isinstance(lora_a, Tensor) or isinstance(lora_b, Tensor):
        raise ShapeError("lora_linear", "lists of A and B, one of each a slice", "a tensor", "Pass `[a]` and `[b]`.")
    if ranks is not None and not isinstance(ranks, Tensor):
        raise ShapeError("lora_linear: ranks", "a tensor [K]", type(ranks).__name__, "Pass `torch.tensor(ranks)`.")
    if adapter_weights is not None and not isinstance(adapter_weights, Tensor):
        got, remedy = type(adapter_weights).__name__, "Pass `torch.tensor(adapter_weights)`."
        raise ShapeError("lora_linear: adapter_weights", "a tensor [T, M]", got, remedy)
    operands = (inputs, list(lora_a), list(lora_b), lora_indices_tensor)
    offsets = list(slice_offsets)
    more = () if adapter_weights is None else (adapter_weights,)
    if not is_compiling() and runs_plainly(base, inputs, *lora_a, *lora_b, lora_indices_tensor, *more):
        # What the native kernel does not ask for is checked all the same.
        if ranks is None and takes_native(base) and base.layout is torch.strided:
            added = base.clone(memory_format=torch.contiguous_format)
            try_add = TRY_ADD_SEVERAL if more else TRY_ADD_LORA
            if try_add([added], *operands, [0] * len(offsets), offsets, scaling, *more):
                return added
        return _lora_linear(base, *operands, offsets, scaling, ranks, *more)
    result: Tensor = LORA_LINEAR(base, *operands, offsets, scaling, ranks, *more)
    return result


def tiles_eagerly(
    indices: Tensor, stack: Tensor, ends: Tensor | None = None, codes: Tensor | None = None
) -> Tensor | None:
    """Return what calls of `add_lora_eagerly` share that have these indices and stacks like this; None for nothing.

    Of rows that lie group by group `ends` `[G]` says where each group ends, and `codes` `[G]` its index.
    """
    device = indices.device.type
    if device == "cpu" or is_compiling() or not runs_plainly(indices):
        return None
    kernel = preferred_on(device)
    has_tiles = kernel.prepares == "route_tiles" and not kernel.problem(device)
    return ROUTE_TILES(indices, stack.shape[0], ends=ends, codes=codes) if has_tiles else None


def add_lora_eagerly(
    output: Tensor,
    inputs: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    indices: Tensor,
    columns: int,
    ranks: Tensor | None,
    tiles: Tensor | None = None,
    adapter_weights: Tensor | None = None,
) -> bool:
    """Add one slice's LoRA in place, unchecked, if nothing looks at calls of ops; whether it was done.

    For layers, which know that their operands fit: one call, and a quarter of the time that two public ops take.
    """
    more = () if adapter_weights is None else (adapter_weights,)
    if is_compiling() or not runs_plainly(output, inputs, lora_a, lora_b, indices, *more):
        return False
    b = lora_b if lora_b.shape[1] == columns else lora_b[:, :columns]
    operands = [output], inputs, [lora_a], [b], indices, [0], [0], 1.0
    if takes_native(output) and (TRY_ADD_SEVERAL if more else TRY_ADD_LORA)(*operands, *more):
        return True
    ADD_LORA(*operands, ranks=ranks, tiles=tiles, adapter_weights=adapter_weights)
    return True


def add_slices_eagerly(
    output: Tensor,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    slice_offsets: list[int],
    scaling: float,
) -> bool:
    """Add every slice's LoRA in place, if the native kernel takes the call and nothing looks at it; whether it was.

    For whoever owns the output: what `lora_linear` computes, without a copy of `base`.
    """
    if is_compiling() or not runs_plainly(output, inputs, *lora_a, *lora_b, indices):
        return False
    operands = (inputs, lora_a, lora_b, indices, [0] * len(slice_offsets), slice_offsets, scaling)
    return takes_native(output) and bool(TRY_ADD_LORA([output], *operands))


# The op that does the work, for several bases; `lora_linear` is the same with one. `share_input` makes it of several.
def _lora_linears(
    bases: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_indices_tensor: Tensor,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float = 1.0,
    ranks: Tensor | None = None,
    adapter_weights: Tensor | None = None,
) -> list[Tensor]:
    operands = bases, inputs, lora_a, lora_b, lora_indices_tensor, slice_outputs, slice_offsets
    checks.check_lora_linears(*operands, ranks, adapter_weights)
    results = [base.clone(memory_format=torch.contiguous_format) for base in bases]
    stacks_a, stacks_b = [[without_slice_dim(weights) for weights in stacks] for stacks in (lora_a, lora_b)]
    dtype = accumulator(*results, inputs, *stacks_a, *stacks_b)
    # A routing is for one K. With several K, columns that two of them share are still rounded once.
    sums = results if len({len(a) for a in stacks_a}) == 1 else [result.to(dtype) for result in results]
    for slots in dict.fromkeys(len(a) for a in stacks_a):
        mine = [s for s, a in enumerate(stacks_a) if len(a) == slots]
        ADD_LORA(
            sums,
            inputs,
            [stacks_a[s] for s in mine],
            [stacks_b[s] for s in mine],
            lora_indices_tensor,
            [slice_outputs[s] for s in mine],
            [slice_offsets[s] for s in mine],
            scaling,
            ranks=ranks,
            adapter_weights=adapter_weights,
        )
    for result, total in zip(results, sums, strict=True):
        if total is not result:
            result.copy_(total)
    return results


def _fake_lora_linears(
    bases: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    lora_indices_tensor: Tensor,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float = 1.0,
    ranks: Tensor | None = None,
    adapter_weights: Tensor | None = None,
) -> list[Tensor]:
    operands = bases, inputs, lora_a, lora_b, lora_indices_tensor, slice_outputs, slice_offsets
    checks.check_lora_linears(*operands, ranks, adapter_weights)
    return [torch.empty_like(base, memory_format=torch.contiguous_format) for base in bases]


def _with_one_base(several: Callable[..., list[Tensor]]) -> Callable[..., Tensor]:
    """Return what computes `lora_linear` by what computes `lora_linears`."""

    def one(
        base: Tensor,
        inputs: Tensor,
        lora_a: Sequence[Tensor],
        lora_b: Sequence[Tensor],
        lora_indices_tensor: Tensor,
        slice_offsets: Sequence[int],
        scaling: float = 1.0,
        ranks: Tensor | None = None,
        adapter_weights: Tensor | None = None,
    ) -> Tensor:
        places, more = ([0] * len(slice_offsets), slice_offsets), (ranks, adapter_weights)
        (result,) = several([base], inputs, lora_a, lora_b, lora_indices_tensor, *places, scaling, *more)
        return result

    return one


_lora_linear = _with_one_base(_lora_linears)


def _setup_one(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, rows, lora_a, lora_b, indices, offsets, *rest = inputs
    _setup_several(ctx, ([base], rows, lora_a, lora_b, indices, [0] * len(lora_a), offsets, *rest), [output])


def _setup_several(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _bases, rows, lora_a, lora_b, indices, ctx.slice_outputs, ctx.slice_offsets, ctx.scaling, _ranks, factors = inputs
    ctx.slices, more = len(lora_a), () if factors is None else (factors,)
    ctx.save_for_backward(rows, indices, *lora_a, *lora_b, *more)


def _backward_one(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (grad, *_gradients(ctx, [grad]))


def _backward_several(ctx: Any, grads_out: list[Tensor]) -> tuple[Any, ...]:
    return (grads_out, *_gradients(ctx, grads_out))


def _gradients(ctx: Any, grads_out: Sequence[Tensor]) -> tuple[Any, ...]:
    """The gradients of all arguments but the bases, as far as they are wanted."""
    check_is_first_order()
    rows, indices, *rest = ctx.saved_tensors
    weights, factors = rest[: 2 * ctx.slices], rest[2 * ctx.slices :]
    lora_a, lora_b = weights[: ctx.slices], weights[ctx.slices :]
    _, needs_inputs, needs_a, needs_b, *_ = ctx.needs_input_grad
    # While compiling, torch drops trailing arguments that equal their default, and wants no gradient for them.
    others: list[Any] = [None] * (len(ctx.needs_input_grad) - 4)
    call = grads_out, rows, lora_a, lora_b, indices, ctx.slice_outputs, ctx.slice_offsets, ctx.scaling
    fused = None if factors else fused_backward(grads_out, rows, lora_a, lora_b)
    if fused is not None:
        made = fused(*call, None, None, needs_inputs, any((*needs_a, *needs_b)))
        grad_rows = made.pop(0) if needs_inputs else None
        return grad_rows, made[: ctx.slices] or [None] * ctx.slices, made[ctx.slices :] or [None] * ctx.slices, *others
    *found, grad_factors = _portable_gradients(*call, factors[0] if factors else None)
    if factors:
        others[-1] = grad_factors
    return *found, *others


def check_is_first_order() -> None:
    """Refuse gradients of gradients, which these formulas would leave LoRA out of.

    Raises:
        LostGradientError: a backward pass is recorded, to be differentiated again.
    """
    # What is compiled is traced with gradients on, and torch itself refuses a second derivative there.
    if torch.is_grad_enabled() and not is_compiling() and not is_traced():
        raise LostGradientError(
            "lora_linear: backward",
            "first derivatives",
            "create_graph=True",
            "Leave it out, or compute this term outside of the `use` block.",
        )


def fused_backward(
    grads: Sequence[Tensor], inputs: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]
) -> Callable[..., list[Tensor]] | None:
    """Return the op that computes the gradients of a call with these operands; None where plain products do."""
    if takes_triton_backward(grads, inputs, lora_a, lora_b):
        op: Callable[..., list[Tensor]] = TRITON_BACKWARD
        return op
    is_exact = accumulator(*grads, inputs, *lora_a, *lora_b) is torch.float32
    return NATIVE_BACKWARD if takes_native(inputs) and is_exact and len({len(a) for a in lora_a}) == 1 else None


def _portable_gradients(
    grads_out: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float,
    factors: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """The same by plain products; last the gradient of the adapters' weights, where rows have several.

    One slice: with `h = scaling * A[i] x`, `grad_h = B[i]^T grad` goes on to `x` and `A`, and `grad h^T` to `B`. With
    adapter weights each row counts M times, as one of each adapter: `w h` is in the place of h, and `w grad_h` in that
    of `grad_h`; the gradient of w is `grad_h . h`.
    """
    several = 1 if factors is None else factors.shape[1]
    rows, indices = repeated(inputs, several), indices if factors is None else indices.reshape(-1)
    grad_rows = rows.new_zeros(rows.shape, dtype=accumulator(*grads_out, rows, *lora_a, *lora_b))
    grad_factors = grad_rows.new_zeros(rows.shape[0])
    grads_a: list[Tensor] = []
    grads_b: list[Tensor] = []
    for stored_a, stored_b, output, offset in zip(lora_a, lora_b, slice_outputs, slice_offsets, strict=True):
        grad = grads_out[output]
        a, b = without_slice_dim(stored_a), without_slice_dim(stored_b)
        dtype = accumulator(grad, rows, a, b)
        grad_slice = repeated(grad[:, offset : offset + b.shape[1]].to(dtype), several)
        hidden = scaling * SLOT_PRODUCTS(rows, a, indices).to(dtype)
        grad_hidden = SLOT_PRODUCTS(grad_slice, b.transpose(1, 2), indices)
        has_adapter = ((indices >= 0) & (indices < a.shape[0]))[:, None]
        if factors is not None:
            grad_factors = grad_factors + torch.where(has_adapter, hidden * grad_hidden, 0.0).sum(1)
            factor = factors.reshape(-1, 1).to(dtype)
            hidden, grad_hidden = hidden * factor, grad_hidden * factor
        grad_hidden = scaling * grad_hidden
        from_slice = SLOT_PRODUCTS(grad_hidden, a.transpose(1, 2), indices)
        grad_rows = grad_rows + torch.where(has_adapter, from_slice, 0.0)
        grads_a.append(OUTER_BY_SLOT(grad_hidden, rows.to(dtype), indices, a.shape[0]).reshape(stored_a.shape))
        grads_b.append(OUTER_BY_SLOT(grad_slice, hidden, indices, b.shape[0]).reshape(stored_b.shape))
    if factors is not None:
        grad_rows = grad_rows.view(inputs.shape[0], several, inputs.shape[1]).sum(1)
    return (
        grad_rows.to(inputs.dtype),
        [grad.to(a.dtype) for grad, a in zip(grads_a, lora_a, strict=True)],
        [grad.to(b.dtype) for grad, b in zip(grads_b, lora_b, strict=True)],
        None if factors is None else grad_factors.view(factors.shape).to(factors.dtype),
    )


torch.library.custom_op("xpu_lora::lora_linear", _lora_linear, mutates_args=())
torch.library.register_fake("xpu_lora::lora_linear", _with_one_base(_fake_lora_linears))
torch.library.register_autograd("xpu_lora::lora_linear", _backward_one, setup_context=_setup_one)
torch.library.custom_op("xpu_lora::lora_linears", _lora_linears, mutates_args=())
torch.library.register_fake("xpu_lora::lora_linears", _fake_lora_linears)
torch.library.register_autograd("xpu_lora::lora_linears", _backward_several, setup_context=_setup_several)

LORA_LINEAR = torch.ops.xpu_lora.lora_linear.default
LORA_LINEARS = torch.ops.xpu_lora.lora_linears.default
