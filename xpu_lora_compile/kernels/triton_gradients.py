"""Launches the Triton kernels of LoRA that is trained: forward a shrink and an expand, backward four a slice, and dX.

The bodies of ops that a compiler looks into, as those of `triton_visible` are: they allocate with aten, write to no
view, and ask nothing of a symbolic T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.kernels.sizes import MANY, gradient_sizes_for
from xpu_lora_compile.kernels.triton_launch import (
    Form,
    Hidden,
    are_alike,
    expand_from,
    fill_tiles,
    rank_block,
    shrink_into,
)
from xpu_lora_compile.kernels.triton_visible import Columns, Launch
from xpu_lora_compile.torch_internals import number_of

# The height of tiles for every T, so that a sum does not depend on it.
HEIGHT = 32
# How many trained slots one launch takes.
SLOTS_AT_ONCE = 8
# Fewer programs than this leave most cores of a GPU idle.
_PROGRAMS = 128
# How many tiles a program looks at at once for those of its slot.
_SCAN = 256


def training_tiles(launch: Launch, indices: Tensor, slots: int) -> Tensor:
    """Return the table of tiles that both passes of a training step read, int32 `[tiles, 1 + HEIGHT]`."""
    rows = indices.shape[0]
    tiles = torch.empty(training_tiles_shape(rows, slots), dtype=torch.int32, device=indices.device)
    if number_of(rows) != 0:
        fill_tiles(tiles, indices, slots, HEIGHT, tiles.shape[0], False, _form(launch, rows))
    return tiles


def training_tiles_shape(rows: Any, slots: int) -> tuple[Any, int]:
    """The shape of the table of `training_tiles`."""
    return rows // HEIGHT + slots + 1, 1 + HEIGHT


def keeps_hidden(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]) -> bool:
    """Whether `forward` returns the rank vectors of a call: if one launch makes those of all its slices."""
    return are_alike(lora_a, 2) and are_alike(lora_b, 1)


def empty_kept(inputs: Tensor, lora_a: Sequence[Tensor]) -> Tensor:
    """Memory for the rank vectors of all slices, fp32 `[1, slices * T, R or more]`."""
    # The rank rounded up, so that each row starts where it is read fastest.
    columns = -(-max(int(a.shape[1]) for a in lora_a) // 16) * 16
    return inputs.new_empty((1, len(lora_a) * inputs.shape[0], columns), dtype=torch.float32)


def forward(
    launch: Launch,
    bases: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    scalings: Tensor,
    tiles: Tensor | None,
) -> list[Tensor]:
    """Return each slice's base with LoRA added; and, with `keeps_hidden`, the rank vectors, for `backward`.

    Args:
        launch: as `Form.launch`, of flat forms.
        bases: of each slice `[T, H]`, H at least W.
        inputs: `[T, D]`.
        lora_a: of each slice A, `[K, R, D]`, of one K.
        lora_b: of each slice B, `[K, W, R]`.
        indices: `[T]`.
        scalings: fp32 `[K]`, a factor of each slot.
        tiles: as `training_tiles` makes them, if they are there.
    """
    rows, slots = inputs.shape[0], int(lora_a[0].shape[0])
    results = [base.clone(memory_format=torch.contiguous_format) for base in bases]
    is_one = keeps_hidden(lora_a, lora_b)
    kept = [empty_kept(inputs, lora_a)] if is_one else [empty_kept(inputs, [a]) for a in lora_a]
    if number_of(rows) != 0:
        form = _form(launch, rows)
        tiles = training_tiles(launch, indices, slots) if tiles is None else tiles
        routing = RowRouting(indices, slots, tiles=tiles)
        factors = scalings[routing.slot]
        columns = [Columns(result, 0) for result in results]
        for part, hidden in zip([slice(None)] if is_one else _singles(len(lora_a)), kept, strict=True):
            shrink_into(Hidden(hidden, False), inputs, lora_a[part], routing, form=form)
            scaled = Hidden(hidden * factors.repeat(len(lora_a[part]))[:, None], False)
            expand_from(columns[part], scaled, lora_b[part], routing, None, add=True, pdl=False, form=form)
    return [*results, *kept] if is_one else results


def _singles(count: int) -> list[slice]:
    return [slice(at, at + 1) for at in range(count)]


def _form(launch: Launch, rows: Any) -> Form:
    known = number_of(rows)
    return Form(launch, MANY if known is None else known)


def backward(
    launch: Launch,
    grads: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float,
    scalings: Tensor | None,
    slots: Sequence[int],
    ranks: Sequence[int],
    needs_inputs: bool,
    needs_weights: bool,
    tiles: Tensor | None = None,
    kept: Tensor | None = None,
) -> list[Tensor]:
    """Return the gradients that NATIVE_BACKWARD returns; operands fit, and sizes of weights are known.

    Args:
        launch: as `Form.launch`, of flat forms.
        grads: of each output, `[T, H]`.
        inputs: `[T, D]`.
        lora_a: of each slice A, `[K, R, D]`, of one K.
        lora_b: of each slice B, `[K, W, R]`.
        indices: `[T]`.
        slice_outputs: of each slice the position of its output in `grads`.
        slice_offsets: of each slice its first column there.
        scaling: factor of all slots.
        scalings: fp32 `[K]`, one more of each slot.
        slots: if any, those that alone get gradients, in each slice a tensor of its own.
        ranks: of each of these how many ranks, slice by slice.
        needs_inputs: whether dX is wanted.
        needs_weights: whether dA and dB are.
        tiles: as `training_tiles` makes them, if they are there.
        kept: the rank vectors that `forward` has returned, without `scaling`; else they are computed once more.
    """
    rows, count = inputs.shape[0], int(lora_a[0].shape[0])
    of_inputs = inputs.new_empty(inputs.shape) if needs_inputs else None
    of_a: list[_Targets] = []
    of_b: list[_Targets] = []
    if needs_weights:
        of_slices = (
            [ranks[at : at + len(slots)] for at in range(0, len(ranks), len(slots))] if slots else [()] * len(lora_a)
        )
        of_a = [_Targets(a, True, slots, of_slice) for a, of_slice in zip(lora_a, of_slices, strict=True)]
        of_b = [_Targets(b, False, slots, of_slice) for b, of_slice in zip(lora_b, of_slices, strict=True)]
    if number_of(rows) == 0:
        for tensor in (tensor for targets in (*of_a, *of_b) for tensor in targets.tensors):
            tensor.zero_()
    else:
        form = _form(launch, rows)
        tiles = training_tiles(launch, indices, count) if tiles is None else tiles
        routing = RowRouting(indices, count, tiles=tiles)
        factors = None if scalings is None else scalings.contiguous()
        of_hidden: list[Tensor] = []
        for s, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            grad = grads[slice_outputs[s]].narrow(1, slice_offsets[s], b.shape[1])
            of_hidden.append(_shrunk(grad, b.transpose(1, 2), routing, scaling, form))
            if needs_weights:
                _sum_by_slot(of_a[s], of_hidden[s], inputs, tiles, count, factors, form)
                hidden = _shrunk(inputs, a, routing, scaling, form) if kept is None else kept.narrow(1, s * rows, rows)
                _sum_by_slot(of_b[s], hidden, grad, tiles, count, factors, form)
        if of_inputs is not None:
            _write_inputs(of_inputs, of_hidden, lora_a, tiles, factors, form)
    made = [] if of_inputs is None else [of_inputs]
    return made + [gradient for targets in (*of_a, *of_b) for gradient in targets.gradients()]


class _Targets:
    """Where the gradients of one slice's A or B go, of all slots or of some.

    Args:
        stack: A `[K, R, D]` or B `[K, W, R]`.
        by_rank: whether it is A.
        slots: those that get a gradient each; all get one together where there are none.
        ranks: of each of these.
    """

    def __init__(self, stack: Tensor, by_rank: bool, slots: Sequence[int], ranks: Sequence[int]) -> None:
        rank_dim, column_dim = (1, 2) if by_rank else (2, 1)
        self.columns = int(stack.shape[column_dim])
        self.slots, self.ranks = list(slots), list(ranks)
        self.is_turned = False
        if not slots:
            self.ranks = [int(stack.shape[rank_dim])]
            self.tensors = [torch.empty_like(stack)]
            self.strides = [(self.tensors[0].stride(rank_dim), self.tensors[0].stride(column_dim))]
            return
        # Laid out as the slot's own memory, so that an optimizer reads both in one order.
        lies_by_rank = by_rank or stack.stride(column_dim) == 1
        self.is_turned = lies_by_rank and not by_rank
        shapes = [(rank, self.columns) if lies_by_rank else (self.columns, rank) for rank in ranks]
        self.tensors = [stack.new_empty(shape) for shape in shapes]
        self.strides = [(self.columns, 1) if lies_by_rank else (1, rank) for rank in ranks]

    def gradients(self) -> list[Tensor]:
        """Of A `[r, D]`, of B `[W, r]`."""
        return [tensor.t() if self.is_turned else tensor for tensor in self.tensors]


def _shrunk(rows: Tensor, weights: Tensor, routing: RowRouting, scaling: float, form: Form) -> Tensor:
    """`scaling * weights[i] @ rows[t]`, fp32 `[1, T, R or more]`; zero in rows without an adapter."""
    hidden = empty_kept(rows, [weights])
    shrink_into(Hidden(hidden, False), rows, [weights], routing, scaling=scaling, form=form)
    return hidden


def _write_inputs(
    gradient: Tensor,
    hidden: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    tiles: Tensor,
    scalings: Tensor | None,
    form: Form,
) -> None:
    """Write dX from what `_shrunk` has made of each slice's gradients."""
    ranks, features = [int(a.shape[1]) for a in lora_a], int(lora_a[0].shape[2])
    # One block of ranks for all slices; where one multiplies float32, all have tiles of that.
    dtype = torch.float32 if torch.float32 in {a.dtype for a in lora_a} else lora_a[0].dtype
    sizes = gradient_sizes_for(gradient.device.type, dtype)
    if not features:
        return
    blocks = -(-features // sizes.columns)
    form.launch(
        "inputs_gradient_kernel",
        (tiles.shape[0] * blocks,),
        gradient,
        *gradient.stride(),
        tuple(hidden),
        tuple(of_slice.stride(1) for of_slice in hidden),
        tuple(lora_a),
        *(tuple(a.stride(dim) for a in lora_a) for dim in range(3)),
        tiles,
        tiles.shape[0],
        blocks,
        tuple(ranks),
        features,
        scalings,
        scalings is not None,
        HEIGHT,
        rank_block(sizes.ranks, max(ranks), dtype),
        sizes.columns,
        num_warps=sizes.warps,
    )


def _sum_by_slot(
    targets: _Targets,
    hidden: Tensor,
    rows: Tensor,
    tiles: Tensor,
    count: int,
    scalings: Tensor | None,
    form: Form,
) -> None:
    """Write the sums of `hidden[t] rows[t]^T` over the rows of each slot, of all `count` slots or of some at a time."""
    if not targets.columns:
        return
    sizes = gradient_sizes_for(rows.device.type, rows.dtype)
    columns, each = sizes.sum_columns, len(targets.slots) or count
    # Few slots in wide blocks would leave most of a GPU without work. No sum depends on it.
    while columns > 32 and each * -(-targets.columns // columns) < _PROGRAMS:
        columns //= 2
    blocks = -(-targets.columns // columns)
    for start in range(0, len(targets.tensors), SLOTS_AT_ONCE):
        part = slice(start, start + SLOTS_AT_ONCE)
        tensors, slots, ranks = targets.tensors[part], targets.slots[part], targets.ranks[part]
        block = rank_block(sizes.ranks, max(ranks), rows.dtype)
        form.launch(
            "weights_gradient_kernel",
            ((len(slots) or count) * blocks, -(-max(ranks) // block)),
            tuple(tensors),
            0 if slots else tensors[0].stride(0),
            tuple(of_rank for of_rank, _ in targets.strides[part]),
            tuple(of_column for _, of_column in targets.strides[part]),
            hidden,
            hidden.stride(1),
            rows,
            *rows.stride(),
            tiles,
            tiles.shape[0],
            blocks,
            tuple(slots) or (0,),
            tuple(ranks),
            targets.columns,
            scalings,
            scalings is not None,
            bool(slots),
            HEIGHT,
            sizes.sum_rows,
            _SCAN,
            block,
            columns,
            num_warps=sizes.warps,
        )
