"""What the ops call: each function asks `choose` for a kernel, and hands the call on.

The native kernel takes a call whole. The others are products that plain PyTorch computes, `products[i] @ inputs[t]`;
what a row without an adapter computes is dropped by `torch.where`, never multiplied by zero, so that NaN in a slot
stays in that slot.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from xpu_lora_compile.errors import KernelError
from xpu_lora_compile.kernels import ipex, native, triton_launch
from xpu_lora_compile.kernels.choose import Call, Choice, choose, forced_kernel, wins_everywhere
from xpu_lora_compile.kernels.dense import dense
from xpu_lora_compile.kernels.gather import gather
from xpu_lora_compile.kernels.grouped import grouped
from xpu_lora_compile.kernels.routing import Routing
from xpu_lora_compile.torch_internals import hint_of

_NAMES = {
    dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
_PRODUCTS = {"gather": gather, "grouped": grouped, "dense": dense}


def shrink(output: Tensor, inputs: Tensor, weights: Tensor, routing: Routing, scaling: float) -> None:
    """Write `scaling * A[i] @ inputs[t]` into the first R columns of `output`, zero where `i` is no slot."""
    kernel = choice_for((output,), inputs, (weights,), ()).kernel
    if kernel == "native":
        _must(native.TRY_SHRINK(output, inputs, weights, routing.indices, scaling))
        return
    if kernel == "triton":
        triton_launch.shrink(output, inputs, weights, routing, scaling)
        return
    if kernel == "ipex":
        ipex.shrink(output, inputs, weights, routing.indices, scaling)
        return
    hidden = slot_products(inputs.to(accumulator(output, inputs, weights)), weights, routing)
    output[:, : weights.shape[1]].copy_(torch.where(routing.has_adapter, hidden * scaling, 0.0))


def expand(output: Tensor, inputs: Tensor, weights: Tensor, routing: Routing, add: bool) -> None:
    """Write or add `B[i] @ inputs[t]` into `output`, `[T, W]`; rows whose `i` is no slot keep their value."""
    kernel = choice_for((output,), inputs, (), (weights,)).kernel
    if kernel == "native":
        _must(native.TRY_EXPAND(output, inputs, weights, routing.indices, 0, weights.shape[1], add))
        return
    if kernel == "triton":
        triton_launch.expand(output, inputs, weights, routing, add)
        return
    if kernel == "ipex":
        ipex.expand(output, inputs, weights, routing.indices, add)
        return
    value = slot_products(inputs.to(accumulator(output, inputs, weights)), weights, routing)
    if add:
        value += output
    output.copy_(torch.where(routing.has_adapter, value, output.to(value.dtype)))


def add_lora(
    outputs: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    routing: Routing,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float,
) -> None:
    """Add every slice's `B[i] @ (scaling * A[i] @ inputs[t])` into the columns of its output, rounding once.

    Args:
        outputs: `[T, H]` each, changed in place.
        inputs: `[T, D]`.
        lora_a: for each slice, A `[K, R, D]`.
        lora_b: for each slice, B `[K, W, R]`.
        routing: of the T rows among K slots.
        slice_outputs: for each slice, its output's position in `outputs`.
        slice_offsets: for each slice, its first column there.
        scaling: factor on what is added.
    """
    if len(lora_a) > 1 and (shared := outputs_with_shared_columns(lora_b, slice_outputs, slice_offsets)):
        # Columns of two slices are rounded once, after both; one slice after the other.
        sums = [
            output.to(accumulator(*outputs, inputs, *lora_a, *lora_b)) if position in shared else output
            for position, output in enumerate(outputs)
        ]
        for a, b, position, offset in zip(lora_a, lora_b, slice_outputs, slice_offsets, strict=True):
            add_lora([sums[position]], inputs, [a], [b], routing, [0], [offset], scaling)
        for position in shared:
            outputs[position].copy_(sums[position])
        return
    kernel = choice_for(outputs, inputs, lora_a, lora_b).kernel
    if kernel == "native":
        arguments = (outputs, inputs, lora_a, lora_b, routing.indices, slice_outputs, slice_offsets, scaling)
        _must(native.TRY_ADD_LORA(*arguments))
        return
    if kernel == "triton":
        triton_launch.add_lora(outputs, inputs, lora_a, lora_b, routing, slice_outputs, slice_offsets, scaling)
        return
    if kernel == "ipex":
        ipex.add_lora(outputs, inputs, lora_a, lora_b, routing.indices, slice_outputs, slice_offsets, scaling)
        return
    inputs = inputs.to(accumulator(*outputs, inputs, *lora_a, *lora_b))
    for a, b, position, offset in zip(lora_a, lora_b, slice_outputs, slice_offsets, strict=True):
        hidden = torch.where(routing.has_adapter, slot_products(inputs, a, routing) * scaling, 0.0)
        columns = outputs[position].narrow(1, offset, b.shape[1])
        value = slot_products(hidden, b, routing) + columns
        columns.copy_(torch.where(routing.has_adapter, value, columns.to(value.dtype)))


def linear_lora(
    inputs: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    routing: Routing,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float,
) -> list[Tensor]:
    """The base products `inputs @ weight.T + bias`, with what `add_lora` adds: in one kernel, or side by side.

    Args:
        inputs: `[T, D]`.
        weights: of each base product, `[H, D]`.
        biases: of each base product, `[H]` or None.
        lora_a: for each slice, A `[K, R, D]`.
        lora_b: for each slice, B `[K, W, R]`.
        routing: of the T rows among K slots.
        slice_outputs: for each slice, the position of its product.
        slice_offsets: for each slice, its first column there.
        scaling: factor on what is added.
    """
    shared = outputs_with_shared_columns(lora_b, slice_outputs, slice_offsets)
    if not shared and choice_for((), inputs, lora_a, lora_b).kernel == "triton":
        arguments = (lora_a, lora_b, routing, slice_outputs, slice_offsets, scaling)
        return triton_launch.linear_lora(inputs, weights, biases, *arguments)
    outputs = [torch.nn.functional.linear(inputs, *pair) for pair in zip(weights, biases, strict=True)]
    add_lora(outputs, inputs, lora_a, lora_b, routing, slice_outputs, slice_offsets, scaling)
    return outputs


def slot_products(inputs: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """`weights[i] @ inputs[t]` of every row, `[T, rows]`, accumulated in fp32; arbitrary where `i` is no slot.

    Args:
        inputs: `[T, columns]`.
        weights: `[K, rows, columns]`, any strides.
        routing: of the T rows among K slots.
    """
    dtype = accumulator(inputs, weights)
    kernel = choice_for((), inputs, (weights,), ()).kernel
    if kernel == "native":
        result = torch.empty(len(inputs), weights.shape[1], dtype=dtype)
        _must(native.TRY_SHRINK(result, inputs, weights, routing.indices, 1.0))
        return result
    if kernel == "triton":
        return triton_launch.slot_products(inputs, weights, routing)
    if kernel == "ipex":
        raise KernelError("forced kernel", "one that computes gradients", "'ipex'", "Force none for a backward pass.")
    with _without_autocast(inputs.device.type):
        return _PRODUCTS[kernel](inputs.to(dtype), weights, routing)


def accumulator(*operands: Tensor) -> torch.dtype:
    """The dtype to accumulate in: float32, or float64 as soon as one operand is."""
    return torch.float64 if torch.float64 in [operand.dtype for operand in operands] else torch.float32


def outer_by_slot(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    """`[K, m, n]`: for each slot the sum of `left[t] right[t]^T` over its rows, in the dtype of `left`.

    Both factors are masked: a NaN in the row of one adapter must not reach the gradient of another.
    """
    result = left.new_empty(routing.slots, left.shape[1], right.shape[1])
    with _without_autocast(left.device.type):
        for slot in range(routing.slots):
            mine = (routing.indices == slot)[:, None]
            torch.mm(torch.where(mine, left, 0.0).t(), torch.where(mine, right, 0.0), out=result[slot])
    return result


def choice_for(outputs: Sequence[Tensor], inputs: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]) -> Choice:
    """What `choose` says for these operands, of a call that only expands or only shrinks without A or B.

    While compiling, symbolic sizes count as those of the example inputs.
    """
    first = (*lora_a, *lora_b)[0]
    device = inputs.device.type
    dtypes = [one.dtype for one in (*outputs, inputs, *lora_a, *lora_b)]
    call = Call(
        device,
        _NAMES[torch.float64 if torch.float64 in dtypes else first.dtype],
        hint_of(inputs.shape[0]),
        hint_of(first.shape[0]),
        hint_of(lora_a[0].shape[1] if lora_a else first.shape[2]),
        hint_of(inputs.shape[1]) if lora_a else 0,
        sum(hint_of(b.shape[1]) for b in lora_b),
        len(lora_a) or 1,
    )
    native_problem = _native_problem() if device == "cpu" else ""
    forced = forced_kernel()
    # Nothing but force makes it run, and looking up its schemas takes longer than all else here.
    ipex_problem = ipex.refusal(outputs, inputs, (*lora_a, *lora_b)) if forced is not None else ""
    return choose(call, native_problem, forced, triton_launch.problem(device), ipex_problem)


def computes_base(device: str) -> bool:
    """Whether `linear_lora` is worth its while on a type of device: measured on CUDA alone; a CPU interprets it."""
    return device in ("cuda", "cpu")


def takes_native(output: Tensor) -> bool:
    """Whether any call on this output that the native kernel can run is for it: then there is no more to choose."""
    return output.device.type == "cpu" and forced_kernel() is None and _native_wins()


@cache
def _native_wins() -> bool:
    return not _native_problem() and wins_everywhere("native", "cpu")


def _must(done: bool) -> None:
    if not done:
        raise KernelError("native kernel", "operands that were checked", "some that do not fit", "Report it.")


@cache
def _native_problem() -> str:
    problem = native.problem()
    if problem:
        warnings.warn(
            f"xpu_lora: the fast CPU kernel is not used: {problem}. Plain PyTorch runs instead.", stacklevel=2
        )
    return problem


def outputs_with_shared_columns(
    lora_b: Sequence[Tensor], slice_outputs: Sequence[int], slice_offsets: Sequence[int]
) -> set[int]:
    """The positions of outputs some of whose columns two slices add to."""
    spans = sorted(
        (position, offset, offset + b.shape[1])
        for b, position, offset in zip(lora_b, slice_outputs, slice_offsets, strict=True)
    )
    return {
        position
        for (position, _, end), (other, start, _) in itertools.pairwise(spans)
        if position == other and start < end
    }


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """What autocast would round products to is not what the contract says; entered only where it is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
