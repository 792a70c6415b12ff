"""Launches the Triton kernels of LoRA that is trained: forward a shrink and an expand, backward four a slice, and dX.

The bodies of ops that a compiler looks into, as those of `triton_visible` are: they allocate with aten, write to no
view, and ask nothing of a symbolic T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

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
    piece_count,
    rank_block,
    shrink_into,
)
from xpu_lora_compile.kernels.triton_visible import Launch
from xpu_lora_compile.torch_internals import number_of

# The height of tiles for every T, so that a sum does not depend on it.
HEIGHT = 32
# How many sums one launch takes at most: a kernel has room for so many arguments.
_SUMS = 8
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
    """Whether one launch makes the rank vectors of all slices of a call, so that they can be kept."""
    return are_alike(lora_a, 2) and are_alike(lora_b, 1)


def empty_kept(inputs: Tensor, lora_a: Sequence[Tensor], sums: int = 1) -> Tensor:
    """Memory for the rank vectors of all slices, fp32 `[sums, slices * T, R or more]`."""
    # The rank rounded up, so that each row starts where it is read fastest.
    columns = -(-max(int(a.shape[1]) for a in lora_a) // 16) * 16
    return inputs.new_empty((sums, len(lora_a) * inputs.shape[0], columns), dtype=torch.float32)


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
    """Return each slice's base with LoRA added; and, with tiles and `keeps_hidden`, the rank vectors, for `backward`.

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
    is_one, is_kept = keeps_hidden(lora_a, lora_b), tiles is not None
    parts = [slice(None)] if is_one else [slice(s, s + 1) for s in range(len(lora_a))]
    if number_of(rows) == 0:
        kept = [empty_kept(inputs, lora_a[part]) for part in parts]
    else:
        form = _form(launch, rows)
        tiles = training_tiles(launch, indices, slots) if tiles is None else tiles
        routing = RowRouting(indices, slots, tiles=tiles)
        factors = scalings.gather(0, routing.slot)
        kept = [_shrunk(inputs, lora_a[part], routing, None, form) for part in parts]
        for part, hidden in zip(parts, kept, strict=True):
            scaled = Hidden(hidden * factors.repeat(len(lora_a[part])).unsqueeze(1), False)
            expand_from(results[part], scaled, lora_b[part], routing, None, add=True, pdl=False, form=form)
    return [*results, *kept] if is_one and is_kept else results


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
    slots: Tensor | None,
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
        slots: `[n]`, those that alone get gradients; None for all.
        needs_inputs: whether dX is wanted.
        needs_weights: whether dA and dB are.
        tiles: as `training_tiles` makes them, if they are there.
        kept: the rank vectors that `forward` has returned, without `scaling`; else they are computed once more.
    """
    rows, count = inputs.shape[0], int(lora_a[0].shape[0])
    of_inputs = inputs.new_empty(inputs.shape) if needs_inputs else None
    of_a: list[Tensor] = []
    of_b: list[Tensor] = []
    if needs_weights and slots is None:
        of_a, of_b = [torch.empty_like(a) for a in lora_a], [torch.empty_like(b) for b in lora_b]
    elif needs_weights and slots is not None:
        of_a = [a.new_empty((slots.shape[0], *a.shape[1:])) for a in lora_a]
        of_b = [b.new_empty((slots.shape[0], b.shape[2], b.shape[1])) for b in lora_b]
    if number_of(rows) == 0:
        for tensor in (*of_a, *of_b):
            tensor.zero_()
    else:
        form = _form(launch, rows)
        tiles = training_tiles(launch, indices, count) if tiles is None else tiles
        routing = RowRouting(indices, count, tiles=tiles)
        factors = None if scalings is None else scalings.contiguous()
        of_hidden: list[Tensor] = []
        sums: list[_Sum] = []
        for s, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            grad = grads[slice_outputs[s]].narrow(1, slice_offsets[s], b.shape[1])
            of_hidden.append(_shrunk(grad, [b.transpose(1, 2)], routing, scaling, form))
            if needs_weights:
                hidden = (
                    _shrunk(inputs, [a], routing, scaling, form) if kept is None else kept.narrow(1, s * rows, rows)
                )
                sums.append(_Sum(of_a[s], False, of_hidden[s], inputs))
                sums.append(_Sum(of_b[s], slots is None, hidden, grad))
        # What is stored alike is one launch.
        for key in dict.fromkeys(each.key for each in sums):
            alike = [each for each in sums if each.key == key]
            for start in range(0, len(alike), _SUMS):
                _sum_by_slot(alike[start : start + _SUMS], tiles, slots, factors, form)
        if of_inputs is not None:
            _write_inputs(of_inputs, of_hidden, lora_a, tiles, factors, form)
    made = [] if of_inputs is None else [of_inputs]
    return [*made, *of_a, *of_b]


def _shrunk(rows: Tensor, weights: Sequence[Tensor], routing: RowRouting, scaling: float | None, form: Form) -> Tensor:
    """`scaling * weights[i] @ rows[t]` of all slices, as `empty_kept`; with a scaling, zero in rows without an adapter.

    A program takes two pieces of D: tiles alone are too few programs for a GPU. D alone decides in which order they are
    summed.
    """
    hidden = empty_kept(rows, weights, -(-piece_count(int(rows.shape[1])) // 2))
    shrink_into(Hidden(hidden, True), rows, weights, routing, scaling=scaling, form=form)
    first, *others = (hidden.narrow(0, at, 1) for at in range(len(hidden)))
    for other in others:
        first = first + other
    return first


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


class _Sum(NamedTuple):
    """The sums of `hidden[t] rows[t]^T` over the rows of each slot: `[n, R, columns]`, or turned."""

    target: Tensor
    is_turned: bool
    hidden: Tensor
    rows: Tensor

    def target_as(self, ask: Callable[[int], Any]) -> tuple[Any, Any, Any]:
        """Sizes or strides of the target as if it were not turned; no view of it, which a compiler would copy."""
        return ask(0), ask(2 if self.is_turned else 1), ask(1 if self.is_turned else 2)

    @property
    def key(self) -> tuple[Any, ...]:
        """What those of one launch have in common."""
        *_, of_column = self.target_as(self.target.stride)
        return self.target.dtype, of_column, self.rows.dtype, self.rows.stride(1)


def _sum_by_slot(
    sums: Sequence[_Sum], tiles: Tensor, slots: Tensor | None, scalings: Tensor | None, form: Form
) -> None:
    """Write sums of one key."""
    (count, *_), ranks, lengths = zip(*(each.target_as(each.target.size) for each in sums), strict=True)
    of_slot, of_rank, of_column = zip(*(each.target_as(each.target.stride) for each in sums), strict=True)
    rows = sums[0].rows
    sizes = gradient_sizes_for(rows.device.type, rows.dtype)
    block, blocks = rank_block(sizes.ranks, max(ranks), rows.dtype), [-(-n // sizes.sum_columns) for n in lengths]
    if not count or not sum(blocks):
        return
    form.launch(
        "weights_gradient_kernel",
        (count * sum(blocks), -(-max(ranks) // block)),
        tuple(each.target for each in sums),
        of_slot,
        of_rank,
        of_column[0],
        tuple(each.hidden for each in sums),
        tuple(each.hidden.stride(1) for each in sums),
        tuple(each.rows for each in sums),
        tuple(each.rows.stride(0) for each in sums),
        rows.stride(1),
        tiles,
        tiles.shape[0],
        tuple(accumulate(blocks[:-1], initial=0)),
        sum(blocks),
        slots,
        ranks,
        lengths,
        scalings,
        slots is not None,
        scalings is not None,
        HEIGHT,
        sizes.sum_rows,
        _SCAN,
        block,
        sizes.sum_columns,
        num_warps=sizes.warps,
    )
