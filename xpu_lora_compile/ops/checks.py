"""The contract's checks, called alike by the fakes and by the eager ops.

While compiling, a size may be a `torch.SymInt`: `holds` then settles the comparison with a guard, or with a run-time
assertion where nobody knows the size yet. Each function returns nothing, and raises a `ContractError` that names the
op and the argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xpu_lora_compile.errors import ContractError, DeviceError, DtypeError, LostGradientError, ShapeError, SliceError
from xpu_lora_compile.torch_internals import holds

# float64 is there for `torch.autograd.gradcheck`; a call that holds any of it accumulates in float64.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)


def without_slice_dim(weights: Tensor) -> Tensor:
    """Weights as `[K, rows, columns]`: a view without the 1 that vLLM keeps in second place."""
    return weights.squeeze(1) if weights.dim() == 4 else weights


def check_shrink(
    output_tensor: Tensor, inputs: Tensor, lora_a_weights: Tensor, lora_indices_tensor: Tensor, scaling: float = 1.0
) -> None:
    """Check a `bgmv_shrink` call: output `[T, >= R]`, inputs `[T, D]`, A `[K, R, D]`."""
    op = "bgmv_shrink"
    _check_writable(op, output_tensor)
    _check_rows(op, lora_indices_tensor, output_tensor=output_tensor, inputs=inputs)
    _check_weights(op, "lora_a_weights", lora_a_weights, inputs)
    rank = without_slice_dim(lora_a_weights).shape[1]
    if not holds(output_tensor.shape[1] >= rank):
        raise ShapeError(
            f"{op}: output_tensor",
            f"at least R = {rank} columns",
            f"shape {_shape(output_tensor)}",
            "Make the rank buffer as wide as the rank of A.",
        )


def check_expand(
    output_tensor: Tensor, inputs: Tensor, lora_b_weights: Tensor, lora_indices_tensor: Tensor, add_inputs: bool = True
) -> None:
    """Check a `bgmv_expand` call: output `[T, H]`, inputs `[T, R]`, B `[K, W, R]`; W and H may differ."""
    _check_writable("bgmv_expand", output_tensor)
    _check_rows("bgmv_expand", lora_indices_tensor, output_tensor=output_tensor, inputs=inputs)
    _check_weights("bgmv_expand", "lora_b_weights", lora_b_weights, inputs)


def check_expand_slice(
    output_tensor: Tensor,
    inputs: Tensor,
    lora_b_weights: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Check a `bgmv_expand_slice` call: as `bgmv_expand`, with `W == slice_size` and the slice inside the output."""
    op = "bgmv_expand_slice"
    _check_writable(op, output_tensor)
    _check_rows(op, lora_indices_tensor, output_tensor=output_tensor, inputs=inputs)
    _check_weights(op, "lora_b_weights", lora_b_weights, inputs)
    width = without_slice_dim(lora_b_weights).shape[1]
    if not holds(width == slice_size):
        raise SliceError(
            f"{op}: slice_size",
            f"{width}, the number of rows of lora_b_weights",
            str(slice_size),
            "It is the size of the slice, not its end; pass weights of just that many rows.",
        )
    _check_slice(op, slice_offset, slice_size, output_tensor)


def check_lora_linears(
    bases: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    ranks: Tensor | None = None,
    adapter_weights: Tensor | None = None,
) -> None:
    """Check a `lora_linear` call, or one with several bases: `slice_outputs` says which one each slice is added to.

    Bases `[T, H]`, inputs `[T, D]`, and for each slice A `[K, R, D]`, B `[K, W, R]`; with adapter_weights both they and
    the indices are `[T, M]`.
    """
    op = "lora_linear"
    if not len(lora_a) == len(lora_b) == len(slice_offsets) == len(slice_outputs) > 0:
        raise ShapeError(
            op,
            "for each slice one A, one B and one offset, and at least one slice",
            f"{len(lora_a)} A, {len(lora_b)} B and {len(slice_offsets)} offsets",
            "Pass three lists of the same length.",
        )
    names = ["base"] if len(bases) == 1 else [f"bases[{position}]" for position in range(len(bases))]
    if adapter_weights is not None:
        _check_adapter_weights(op, adapter_weights, indices)
    several = adapter_weights is not None
    _check_rows(op, indices, several=several, **dict(zip(names, bases, strict=True)), inputs=inputs)
    for s, (a, b, base, offset) in enumerate(zip(lora_a, lora_b, slice_outputs, slice_offsets, strict=True)):
        _check_weights(op, f"lora_a[{s}]", a, inputs)
        _check_weights(op, f"lora_b[{s}]", b, inputs, columns=without_slice_dim(a).shape[1])
        if not holds(a.shape[0] == b.shape[0]):
            raise ShapeError(
                f"{op}: slice {s}",
                "A and B over the same number K of adapters",
                f"A {_shape(a)} and B {_shape(b)}",
                "Stack both over the same adapters.",
            )
        _check_slice(op, offset, without_slice_dim(b).shape[1], bases[base])
    if ranks is not None:
        _check_ranks(op, ranks, indices, lora_a)


def check_trained(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scalings: Tensor,
    slots: Tensor,
    trained_a: Sequence[Tensor],
    trained_b: Sequence[Tensor],
) -> None:
    """Check what `trained_linear` has of slots: scalings `[K]`, n that are trained, and in each slice two leaves."""
    op, count = "trained_linear", lora_a[0].shape[0]
    if scalings.shape != (count,) or scalings.dtype != torch.float32:
        got = f"{_dtype(scalings)} {_shape(scalings)}"
        raise ShapeError(f"{op}: scalings", f"float32 [{count}], one a slot", got, "Stack one factor for each slot.")
    if slots.dim() != 1 or slots.dtype not in (torch.int64, torch.int32):
        wanted, got = "int64 or int32 [n], slots that are trained", f"{_dtype(slots)} {_shape(slots)}"
        raise ShapeError(f"{op}: slots", wanted, got, "Pass their numbers as a tensor.")
    if len({lora_a[0].device, scalings.device, slots.device}) > 1:
        got, remedy = f"{scalings.device} and {slots.device}", f'Move them with `.to("{lora_a[0].device}")`.'
        raise DeviceError(f"{op}: scalings and slots", f"on {lora_a[0].device}, as the stacks", got, remedy)
    if not len(lora_a) == len(trained_a) == len(trained_b):
        got = f"{len(lora_a)} slices, {len(trained_a)} and {len(trained_b)}"
        raise ShapeError(op, "for each slice a leaf of A and one of B", got, "Pass lists of the same length.")
    for s, (stack_a, stack_b, a, b) in enumerate(zip(lora_a, lora_b, trained_a, trained_b, strict=True)):
        (_, rank, features), width = stack_a.shape, stack_b.shape[1]
        wanted_a, wanted_b = (len(slots), rank, features), (len(slots), rank, width)
        if (a.shape, b.shape, a.dtype, b.dtype) != (wanted_a, wanted_b, stack_a.dtype, stack_b.dtype):
            wanted = f"leaves {list(wanted_a)} and {list(wanted_b)} of the dtypes of the stacks"
            got = f"{_dtype(a)} {_shape(a)} and {_dtype(b)} {_shape(b)}"
            raise ShapeError(f"{op}: slice {s}", wanted, got, "Pass leaves that the gradients of the slots fit.")


def refuse_gradients(op: str, output: Tensor, inputs: Tensor, weights: Tensor, replaces: bool) -> None:
    """Raise where a mutating op would lose a gradient, or hand on a wrong one, without a word.

    The gradient of the output passes through unchanged: that is right of what is added to, not of what is replaced.
    """
    for argument, tensor in (("inputs", inputs), ("weights", weights)):
        if tensor.requires_grad:
            raise LostGradientError(
                f"{op}: {argument}",
                "a tensor that needs no gradient, since the op writes in place and carries none",
                "requires_grad=True",
                "Call `lora_linear`, which is differentiable, or run under `torch.no_grad()`.",
            )
    changes_leaf = output.is_leaf or (output._base is not None and output._base.is_leaf)
    if output.requires_grad and (replaces or changes_leaf):
        raise LostGradientError(
            f"{op}: output_tensor",
            "a tensor that needs no gradient, or one that is added to and is no leaf",
            f"requires_grad=True of a {'leaf' if changes_leaf else 'tensor that is replaced'}",
            "Call `lora_linear`, which is differentiable, or run under `torch.no_grad()`.",
        )


def _check_writable(op: str, output: Tensor) -> None:
    """Check that no two elements of the output share their memory, as those of an expanded tensor do."""
    if output.layout is not torch.strided:
        return  # Refused below, with the other operands.
    for size, stride in zip(output.shape, output.stride(), strict=True):
        if isinstance(stride, int) and stride == 0 and isinstance(size, int) and size > 1:
            raise ShapeError(
                f"{op}: output_tensor",
                "a tensor whose elements each have their own memory",
                f"strides {list(output.stride())} of an expanded tensor",
                "Pass `output.contiguous()`, and keep it: the op writes into it.",
            )


def _check_rows(op: str, indices: Tensor, *, several: bool = False, **matrices: Tensor) -> None:
    """Check that `indices` is `[T]` of integers, and that each matrix is `[T, columns]` of floats on its device.

    With `several` it is `[T, M]`, which was checked before.
    """
    if indices.dim() != 1 and not several:
        raise ShapeError(f"{op}: lora_indices_tensor", "one index a row: [T]", f"shape {_shape(indices)}", _FLATTEN)
    if indices.dtype not in INDICES:
        raise DtypeError(
            f"{op}: lora_indices_tensor", "int32 or int64", _dtype(indices), "Convert it with `.to(torch.int64)`."
        )
    if indices.layout is not torch.strided:
        raise ContractError(
            f"{op}: lora_indices_tensor", "a dense tensor", str(indices.layout), "Call `.to_dense()` on it."
        )
    devices = {matrix.device for matrix in matrices.values()}
    if len(devices) == 1 and indices.device not in devices:
        (device,) = devices
        raise DeviceError(
            f"{op}: lora_indices_tensor",
            f"all tensors on one device, here {device}",
            str(indices.device),
            f'Move it with `.to("{device}")`.',
        )
    for argument, matrix in matrices.items():
        if matrix.dim() != 2:
            raise ShapeError(f"{op}: {argument}", "[T, columns]", f"shape {_shape(matrix)}", _FLATTEN)
        _check_float(op, argument, matrix, indices)
        if not holds(matrix.shape[0] == indices.shape[0]):
            raise ShapeError(
                f"{op}: {argument}",
                f"T = {indices.shape[0]} rows, as lora_indices_tensor has",
                f"shape {_shape(matrix)}",
                "Give each row its index; cut an index buffer that is longer than the batch.",
            )


def _check_weights(
    op: str, argument: str, weights: Tensor, inputs: Tensor, columns: int | torch.SymInt | None = None
) -> None:
    """Check that the weights are `[K, rows, columns]`, or with a 1 in second place; columns are those of inputs."""
    columns = inputs.shape[1] if columns is None else columns
    if weights.dim() not in (3, 4) or (weights.dim() == 4 and not holds(weights.shape[1] == 1)):
        raise ShapeError(
            f"{op}: {argument}",
            "[K, rows, columns] or [K, 1, rows, columns]",
            f"shape {_shape(weights)}",
            "Stack the adapters in the first dimension; pass several slices to `lora_linear` as a list.",
        )
    _check_float(op, argument, weights, inputs)
    if not holds(weights.shape[0] >= 1):
        raise ShapeError(
            f"{op}: {argument}", "at least one slot", f"shape {_shape(weights)}", "Skip the call without any adapter."
        )
    if not holds(weights.shape[-1] == columns):
        raise ShapeError(
            f"{op}: {argument}",
            f"{columns} columns, to multiply what comes in",
            f"shape {_shape(weights)}",
            "Check which layer the weights belong to; A is [K, R, D] and B is [K, W, R].",
        )


def _check_ranks(op: str, ranks: Tensor, indices: Tensor, lora_a: Sequence[Tensor]) -> None:
    """Check that `ranks` is `[K]` of integers, beside the indices; their values are the caller's promise."""
    if ranks.dtype not in INDICES:
        raise DtypeError(f"{op}: ranks", "int32 or int64", _dtype(ranks), "Convert it with `.to(torch.int32)`.")
    if ranks.layout is not torch.strided:
        raise ContractError(f"{op}: ranks", "a dense tensor", str(ranks.layout), "Call `.to_dense()` on it.")
    slots = lora_a[0].shape[0]
    if ranks.dim() != 1 or not all(holds(ranks.shape[0] == a.shape[0]) for a in lora_a):
        raise ShapeError(
            f"{op}: ranks", f"one rank a slot: [{slots}]", f"shape {_shape(ranks)}", "Stack it over the same adapters."
        )
    if ranks.device != indices.device:
        raise DeviceError(
            f"{op}: ranks",
            f"all tensors on one device, here {indices.device}",
            str(ranks.device),
            "Move them together before the call.",
        )


def _check_adapter_weights(op: str, adapter_weights: Tensor, indices: Tensor) -> None:
    """Check that both are `[T, M]`, with M of at least 1, on one device."""
    if indices.dim() != 2:
        raise ShapeError(
            f"{op}: lora_indices_tensor",
            "M indices a row, [T, M], since there are adapter_weights",
            f"shape {_shape(indices)}",
            "Give each row as many indices as weights; -1 is no adapter.",
        )
    _check_float(op, "adapter_weights", adapter_weights, indices)
    if (
        adapter_weights.dim() != 2
        or not holds(adapter_weights.shape[0] == indices.shape[0])
        or not holds(adapter_weights.shape[1] == indices.shape[1])
        or not holds(indices.shape[1] >= 1)
    ):
        raise ShapeError(
            f"{op}: adapter_weights",
            f"a weight for each index, {_shape(indices)}, and at least one a row",
            f"shape {_shape(adapter_weights)}",
            "Give each row as many weights as indices.",
        )


def _check_float(op: str, argument: str, tensor: Tensor, beside: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise DtypeError(
            f"{op}: {argument}", "float32, bfloat16 or float16", _dtype(tensor), "Convert it with `.to(...)`."
        )
    if tensor.layout is not torch.strided:
        raise ContractError(f"{op}: {argument}", "a dense tensor", str(tensor.layout), "Call `.to_dense()` on it.")
    if tensor.device != beside.device:
        raise DeviceError(
            f"{op}: {argument}",
            f"all tensors on one device, here {beside.device}",
            str(tensor.device),
            "Move them together before the call.",
        )


def _check_slice(op: str, offset: int, size: int | torch.SymInt, output: Tensor) -> None:
    if not (holds(offset >= 0) and holds(offset + size <= output.shape[1])):
        raise SliceError(
            f"{op}: slice {offset}:{offset + size}",
            f"a slice inside the output's {output.shape[1]} columns",
            f"offset {offset} and size {size}",
            "Move or narrow the slice. Of weights wider than the output, `bgmv_expand` drops the rows that do not fit.",
        )


_FLATTEN = "Flatten the leading dimensions into rows, and repeat the indices to match."


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
