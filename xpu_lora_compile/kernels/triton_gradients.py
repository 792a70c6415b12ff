"""Launches the Triton kernels of the gradients of LoRA: one for the routing, four a slice, and one for dX.

The body of an op that a compiler looks into, as those of `triton_visible` are: it allocates with aten, writes to no
view, and asks nothing of a symbolic T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.kernels.sizes import MANY, gradient_sizes_for
from xpu_lora_compile.kernels.triton_launch import Form, Hidden, fill_tiles, rank_block, shrink_into
from xpu_lora_compile.kernels.triton_visible import Launch
from xpu_lora_compile.torch_internals import number_of

# The height of tiles for every T, so that a sum does not depend on it.
HEIGHT = 32
# How many trained slots one launch takes.
SLOTS_AT_ONCE = 8
# How many tiles a program looks at at once for those of its slot.
_SCAN = 256


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
        slots: if any, those of one slice that alone get gradients, each of a tensor of its own.
        ranks: of each of these how many ranks.
        needs_inputs: whether dX is wanted.
        needs_weights: whether dA and dB are.
    """
    rows, known = inputs.shape[0], number_of(inputs.shape[0])
    of_inputs = inputs.new_empty(inputs.shape) if needs_inputs else None
    of_a: list[_Targets] = []
    of_b: list[_Targets] = []
    if needs_weights:
        of_a = [_Targets(a, by_rank=True, slots=slots, ranks=ranks) for a in lora_a]
        of_b = [_Targets(b, by_rank=False, slots=slots, ranks=ranks) for b in lora_b]
    if known == 0:
        for tensor in (tensor for targets in (*of_a, *of_b) for tensor in targets.tensors):
            tensor.zero_()
    else:
        form, count = Form(launch, MANY if known is None else known), int(lora_a[0].shape[0])
        tiles = torch.empty((rows // HEIGHT + count + 1, 1 + HEIGHT), dtype=torch.int32, device=indices.device)
        fill_tiles(tiles, indices, count, HEIGHT, tiles.shape[0], False, form)
        routing = RowRouting(indices, count, tiles=tiles)
        factors = None if scalings is None else scalings.contiguous()
        of_hidden: list[Tensor] = []
        for s, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            grad = grads[slice_outputs[s]].narrow(1, slice_offsets[s], b.shape[1])
            of_hidden.append(_shrunk(grad, b.transpose(1, 2), routing, scaling, form))
            if needs_weights:
                _sum_by_slot(of_a[s], of_hidden[s], inputs, tiles, count, factors, form)
                _sum_by_slot(of_b[s], _shrunk(inputs, a, routing, scaling, form), grad, tiles, count, factors, form)
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

    def __init__(self, stack: Tensor, *, by_rank: bool, slots: Sequence[int], ranks: Sequence[int]) -> None:
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
    # The rank rounded up, so that each row starts where it is read fastest.
    shape = 1, rows.shape[0], -(-int(weights.shape[1]) // 16) * 16
    hidden = torch.empty(shape, dtype=torch.float32, device=rows.device)
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
    blocks = -(-targets.columns // sizes.sum_columns)
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
            sizes.sum_columns,
            num_warps=sizes.warps,
        )
