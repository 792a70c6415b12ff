"""The three mutating ops: shrink to rank space, and expand back into an output that is changed in place.

Letters, here and everywhere: T rows (tokens), D input features, R rank, K adapter slots, W rows of an adapter's B,
H columns of the output. `i = lora_indices_tensor[t]` is the adapter of row t; outside `[0, K)` the row has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from xpu_lora_compile.kernels import takes_native
from xpu_lora_compile.kernels.native import TRY_EXPAND, TRY_SHRINK
from xpu_lora_compile.ops import checks
from xpu_lora_compile.ops.checks import without_slice_dim
from xpu_lora_compile.ops.internal import expand, shrink
from xpu_lora_compile.torch_internals import check_before_autograd, name_of, note_write, runs_plainly


def bgmv_shrink(
    output_tensor: Tensor, inputs: Tensor, lora_a_weights: Tensor, lora_indices_tensor: Tensor, scaling: float = 1.0
) -> None:
    """Carry each row into the rank space of its own adapter.

    ```
    output_tensor[t, :R] = scaling * A[i] @ inputs[t]        i = lora_indices_tensor[t]
    ```

    Rows without an adapter become 0; columns from R on are untouched.

    Args:
        output_tensor: `[T, H]` with `H >= R`, changed in place.
        inputs: `[T, D]`.
        lora_a_weights: A, `[K, R, D]` or `[K, 1, R, D]`, any strides.
        lora_indices_tensor: `[T]`, int32 or int64.
        scaling: factor on the result.

    Raises:
        ContractError: a shape, dtype or device that does not fit; the subclass says which.
        LostGradientError: in grad mode, a gradient would be lost: inputs or weights require one, or the output does
            and is replaced or is a leaf.

    Precision: float32, bfloat16 and float16 mix freely; products are summed in float32 and rounded once. On a CPU
    bfloat16 numbers below 1.2e-38 may count as 0.

    Under torch.compile: one opaque node; shapes are checked while tracing.

    Example:
        >>> hidden = torch.zeros(2, 1)
        >>> bgmv_shrink(hidden, torch.ones(2, 3), torch.full((1, 1, 3), 2.0), torch.tensor([0, -1]))
        >>> hidden.tolist()
        [[6.0], [0.0]]
    """
    operands = (output_tensor, inputs, lora_a_weights, lora_indices_tensor)
    if is_compiling() or not runs_plainly(*operands):
        BGMV_SHRINK(*operands, scaling)
    elif not (takes_native(output_tensor) and TRY_SHRINK(*operands, scaling)):
        _shrink_eagerly(*operands, scaling)
        note_write(output_tensor)


def bgmv_expand(
    output_tensor: Tensor, inputs: Tensor, lora_b_weights: Tensor, lora_indices_tensor: Tensor, add_inputs: bool = True
) -> None:
    """Carry each row back from the rank space of its own adapter, whatever the two widths are.

    ```
    output_tensor[t, :n] += (B[i] @ inputs[t])[:n]           n = min(W, H), i = lora_indices_tensor[t]
    ```

    Columns from n on and rows without an adapter are untouched, adding or not.

    Args:
        output_tensor: `[T, H]`, changed in place.
        inputs: `[T, R]`, what `bgmv_shrink` wrote.
        lora_b_weights: B, `[K, W, R]` or `[K, 1, W, R]`, any strides.
        lora_indices_tensor: `[T]`, int32 or int64.
        add_inputs: add to the output; if false, replace it.

    Raises:
        ContractError: a shape, dtype or device that does not fit; the subclass says which.
        LostGradientError: in grad mode, a gradient would be lost: inputs or weights require one, or the output does
            and is replaced or is a leaf.

    Precision: float32, bfloat16 and float16 mix freely; products are summed in float32, the output is added in
    float32, and the sum is rounded once.

    Under torch.compile: the pass `resolve_width` decides the relation of W and H while compiling, and puts a node in
    its place that has no branch.

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> bgmv_expand(logits, torch.ones(2, 1), torch.full((1, 3, 1), 5.0), torch.tensor([0, -1]))
        >>> logits.tolist()
        [[5.0, 5.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    operands = (output_tensor, inputs, lora_b_weights, lora_indices_tensor)
    if is_compiling() or not runs_plainly(*operands):
        BGMV_EXPAND(*operands, add_inputs)
    elif not (takes_native(output_tensor) and _expand_natively(*operands, add_inputs)):
        _expand_eagerly(*operands, add_inputs)
        note_write(output_tensor)


def bgmv_expand_slice(
    output_tensor: Tensor,
    inputs: Tensor,
    lora_b_weights: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Carry each row back from rank space into one slice of the output's columns.

    ```
    output_tensor[t, slice_offset : slice_offset + slice_size] += B[i] @ inputs[t]
    ```

    Other columns and rows without an adapter are untouched, adding or not.

    Args:
        output_tensor: `[T, H]`, changed in place.
        inputs: `[T, R]`, what `bgmv_shrink` wrote.
        lora_b_weights: B, `[K, W, R]` or `[K, 1, W, R]`, any strides.
        lora_indices_tensor: `[T]`, int32 or int64.
        slice_offset: the slice's first column.
        slice_size: its size (not its end), equal to W; the slice lies inside H.
        add_inputs: add to the output; if false, replace it.

    Raises:
        ContractError: a shape, dtype, device or slice that does not fit; the subclass says which.
        LostGradientError: in grad mode, a gradient would be lost: inputs or weights require one, or the output does
            and is replaced or is a leaf.

    Precision: as `bgmv_expand`.

    Under torch.compile: one opaque node; shapes and slice are checked while tracing.

    Example:
        >>> qkv = torch.zeros(1, 4)
        >>> bgmv_expand_slice(qkv, torch.ones(1, 1), torch.ones(1, 2, 1), torch.tensor([0]), 1, 2)
        >>> qkv.tolist()
        [[0.0, 1.0, 1.0, 0.0]]
    """
    operands = (output_tensor, inputs, lora_b_weights, lora_indices_tensor)
    if is_compiling() or not runs_plainly(*operands):
        BGMV_EXPAND_SLICE(*operands, slice_offset, slice_size, add_inputs)
    elif not (takes_native(output_tensor) and _expand_slice_natively(*operands, slice_offset, slice_size, add_inputs)):
        _expand_slice_eagerly(*operands, slice_offset, slice_size, add_inputs)
        note_write(output_tensor)


def _shrink_eagerly(
    output_tensor: Tensor, inputs: Tensor, lora_a_weights: Tensor, lora_indices_tensor: Tensor, scaling: float = 1.0
) -> None:
    checks.check_shrink(output_tensor, inputs, lora_a_weights, lora_indices_tensor)
    weights = without_slice_dim(lora_a_weights)
    shrink(output_tensor, inputs, weights, lora_indices_tensor, scaling)


def _expand_eagerly(
    output_tensor: Tensor, inputs: Tensor, lora_b_weights: Tensor, lora_indices_tensor: Tensor, add_inputs: bool = True
) -> None:
    checks.check_expand(output_tensor, inputs, lora_b_weights, lora_indices_tensor)
    weights = without_slice_dim(lora_b_weights)
    columns = min(weights.shape[1], output_tensor.shape[1])
    expand(output_tensor[:, :columns], inputs, weights[:, :columns], lora_indices_tensor, add_inputs)


def _expand_slice_eagerly(
    output_tensor: Tensor,
    inputs: Tensor,
    lora_b_weights: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    checks.check_expand_slice(output_tensor, inputs, lora_b_weights, lora_indices_tensor, slice_offset, slice_size)
    columns, weights = output_tensor.narrow(1, slice_offset, slice_size), without_slice_dim(lora_b_weights)
    expand(columns, inputs, weights, lora_indices_tensor, add_inputs)


def _expand_natively(output: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, add: bool) -> bool:
    if output.dim() != 2 or weights.dim() < 3:
        return False
    done: bool = TRY_EXPAND(output, inputs, weights, indices, 0, min(weights.shape[-2], output.shape[1]), add)
    return done


def _expand_slice_natively(
    output: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, offset: int, size: int, add: bool
) -> bool:
    if weights.dim() < 3 or weights.shape[-2] != size:
        return False
    done: bool = TRY_EXPAND(output, inputs, weights, indices, offset, size, add)
    return done


# These ops return nothing, so that all a fake has to do is to check.
for _name, _eager, _check in (
    ("bgmv_shrink", _shrink_eagerly, checks.check_shrink),
    ("bgmv_expand", _expand_eagerly, checks.check_expand),
    ("bgmv_expand_slice", _expand_slice_eagerly, checks.check_expand_slice),
):
    torch.library.custom_op(f"xpu_lora::{_name}", _eager, mutates_args=("output_tensor",))
    torch.library.register_fake(f"xpu_lora::{_name}", _check)

BGMV_SHRINK = torch.ops.xpu_lora.bgmv_shrink.default
BGMV_EXPAND = torch.ops.xpu_lora.bgmv_expand.default
BGMV_EXPAND_SLICE = torch.ops.xpu_lora.bgmv_expand_slice.default


def _register_gradient_check(op: torch._ops.OpOverload) -> None:
    name, arguments = name_of(op), [argument.name for argument in op._schema.arguments]

    def check(*args: Any) -> None:
        given = dict(zip(arguments, args, strict=False))
        replaces = op is BGMV_SHRINK or not given.get("add_inputs", True)
        output, inputs, weights = args[:3]
        checks.refuse_gradients(name, output, inputs, weights, replaces)

    check_before_autograd(_LIBRARY, op, check)


_LIBRARY = torch.library.Library("xpu_lora", "FRAGMENT")
for _op in (BGMV_SHRINK, BGMV_EXPAND, BGMV_EXPAND_SLICE):
    _register_gradient_check(_op)
