"""Launches the Triton kernels: which sizes of tiles, grids, strides. The kernels themselves are in `triton_kernels`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from xpu_lora_compile.kernels.call import Kernel, LoraCall, accumulator, repeated
from xpu_lora_compile.kernels.replay import current_tape
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.kernels.sizes import SLOTS_OF_PAGES, Sizes, sizes_for, tuned_rows_for
from xpu_lora_compile.torch_internals import number_of

# From so many indices on that all programs of `route_kernel` would read, sorting takes less time.
READS_OF_SORTED = 1 << 24


class Hidden(NamedTuple):
    """The rank vectors of all slices, unscaled; unset are rows without an adapter, and what is beyond a slot's rank."""

    # fp32, `[sums, slices * T, R]`, to be summed.
    sums: Tensor
    # Whether each is of two pieces of D.
    is_paired: bool


class Form(NamedTuple):
    """How a call's kernels are launched, and for how many rows their sizes are chosen."""

    # As `_launch`.
    launch: Callable[..., None]
    # T, which may be symbolic, or a number of rows that stands for all T of a graph.
    rows: Any


def is_interpreting() -> bool:
    """Whether Triton runs kernels by its interpreter in this process, and so compiles none."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def problem(device: str) -> str:
    """Why Triton kernels cannot run on a type of device; empty where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cpu" and not is_interpreting():
        return "Triton compiles for no CPU (TRITON_INTERPRET=1 has its interpreter run them, slowly)"
    return "" if device in ("cpu", "cuda", "xpu") else f"Triton was tried on CUDA and XPU, not on {device}"


def tile_rows(rows: int, slots: int) -> int:
    """How many rows share a tile: few where groups are small, so that little is computed for no row.

    With more than 32 Hopper has other products of tiles, which sum in another order (and 64 were slower).
    """
    return 16 if rows <= 64 or rows // slots <= 16 else 32


def tile_count(rows: int, slots: int, groups: int | None = None) -> int:
    """How many tiles a table has, used or not, of so many groups of rows; by default those of slots, and of none."""
    return min(rows, rows // tile_rows(rows, slots) + (slots + 1 if groups is None else groups))


def as_current(device: torch.device) -> AbstractContextManager[Any]:
    """Have a device be the current one: Triton launches there, whatever it is given."""
    if device.type == "cpu":
        return nullcontext()
    module = getattr(torch, device.type)
    # Entering takes longer than asking.
    return nullcontext() if module.current_device() == device.index else module.device(device)


class Groups(NamedTuple):
    """Rows that lie group by group, all of a group with the same index: what need not be sorted again."""

    # `[G]`: where each group ends.
    ends: Tensor
    # `[G]`: the index of its rows.
    codes: Tensor


def route(indices: Tensor, slots: int, groups: Groups | None = None) -> Tensor:
    """The table of tiles for these indices, int32; its length is simple arithmetic on sizes, so that it can be faked.

    Args:
        indices: `[T]`, int32 or int64.
        slots: K.
        groups: how the rows lie, if that is known.
    """
    rows, count_of_groups = len(indices), group_count(slots, groups)
    tiles = torch.empty(table_length(rows, count_of_groups), dtype=torch.int32, device=indices.device)
    if rows:
        height, count = tile_rows(rows, slots), tile_count(rows, slots, count_of_groups)
        with as_current(indices.device):
            fill_tiles(tiles, indices, slots, height, count, count == rows, Form(_launch, rows), groups)
    return tiles


def group_count(slots: int, groups: Groups | None) -> int:
    """How many groups of rows a table of tiles is of: by default those of slots, and of none."""
    return slots + 1 if groups is None else groups.ends.shape[0]


def fill_tiles(
    tiles: Tensor,
    indices: Tensor,
    slots: int,
    height: int,
    count: Any,
    by_row: bool,
    form: Form,
    groups: Groups | None = None,
) -> None:
    """Write a table of tiles; `by_row` has a tile for each row.

    Each program of `route_kernel` reads all indices. That takes little time where rows or slots are few, as they are
    unless a slot is one expert's page: then rows get tiles of their own, or are sorted first if they are not.
    """
    rows, stride = indices.shape[0], indices.stride(0)
    chunk = 64 if form.rows <= 64 else 1024
    if by_row and slots >= SLOTS_OF_PAGES and 2 * rows <= slots:
        form.launch("route_alone_kernel", (-(-rows // 16),), indices, stride, tiles, rows, slots, height, 16)
    elif groups is not None or form.rows * slots >= READS_OF_SORTED:
        order, ends, codes = (None, *groups) if groups is not None else (*_sorted(indices, slots), None)
        sorted_rows = order, ends, codes
        form.launch("route_sorted_kernel", (ends.shape[0],), *sorted_rows, tiles, slots, count, height, by_row, 64)
    else:
        operands = indices, stride, tiles, rows, slots, count, height, by_row, chunk
        form.launch("route_kernel", (slots + 1,), *operands)


def _sorted(indices: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The rows in the order of their slots, those without an adapter last, and where each slot ends among them."""
    # Of fewer bits, fewer are sorted by.
    dtype = torch.int16 if slots < 1 << 15 else torch.int32
    group = torch.where((indices >= 0) & (indices < slots), indices, slots).to(dtype)
    groups, order = torch.sort(group, stable=True)
    bounds = torch.arange(slots + 1, dtype=torch.int32, device=indices.device)
    return order, torch.searchsorted(groups.int(), bounds, out_int32=True, right=True)


def _tiling(rows: Any, routing: RowRouting) -> tuple[Any, Any]:
    """The height of the tiles of a routing and their number; the table says both where Inductor launches."""
    if routing.tiles is not None and routing.tiles.dim() == 2:
        return int(routing.tiles.shape[1]) - 1, routing.tiles.shape[0]
    # Its length says how many groups of rows there are.
    groups = None if routing.tiles is None else (len(routing.tiles) - 2 * rows) // 33
    return tile_rows(rows, routing.slots), tile_count(rows, routing.slots, groups)


def _tiles_of(routing: RowRouting) -> Tensor:
    """The table of a routing, made when it is first asked for."""
    if routing.tiles is None:
        routing.tiles = route(routing.indices, routing.slots)
    return routing.tiles


def table_length(rows: Any, groups: Any) -> Any:
    """Enough for every height of tiles: `count * (1 + height)`."""
    return 2 * rows + 33 * groups


class Triton(Kernel):
    """Rows in tiles of one adapter, all slices in one launch each way, the rank vector kept in fp32."""

    name = "triton"
    devices = ("cuda", "xpu")
    prepares = "route_tiles"
    visible_ops = MappingProxyType(
        {
            "add_lora": "triton_add_lora",
            "shrink": "triton_shrink",
            "expand": "triton_expand_slice",
            "expand_slice": "triton_expand_slice",
        }
    )
    visible_prepares = "triton_route_tiles"
    ops_without_python = frozenset({visible_prepares, *visible_ops.values()})
    takes_several = True
    reads_ranks = True
    # Intel's compilers make fewer messages of it: docs/intel-gpu.md.
    ranks_of_b_together_on = ("xpu",)
    # A CPU interprets it.
    computes_base_on = ("cuda", "cpu")

    def problem(self, device: str) -> str:
        """As `Kernel.problem`."""
        return problem(device)

    def refusal(self, call: LoraCall) -> str:
        """As `Kernel.refusal`."""
        return "it computes in float32" if accumulator(*call.operands) is torch.float64 else ""

    def visible_refusal(self, call: LoraCall) -> str:
        """As `Kernel.visible_refusal`: T alone may be symbolic."""
        if call.routing.adapter_weights is not None:
            return "a row has several adapters"
        sizes = [size for stack in (*call.lora_a, *call.lora_b) for size in (*stack.shape, *stack.stride())]
        if not all(isinstance(size, int) for size in sizes) or number_of(call.inputs.shape[1]) is None:
            return "sizes of weights must be known while compiling"
        if not all(isinstance(offset, int) for offset in call.slice_offsets):
            return "offsets must be known while compiling"
        if any(operand.is_neg() for operand in call.operands):
            return "an operand is negated when it is read"
        return ""

    def visible_options(self, call: LoraCall) -> dict[str, Any]:
        """As `Kernel.visible_options`: for how many rows sizes are chosen."""
        return {"tuned_rows": tuned_rows_for(call.inputs.shape[0])}

    def shrink(self, call: LoraCall) -> None:
        """As `Kernel.shrink`."""
        with as_current(call.inputs.device):
            hidden = Hidden(call.outputs[0][None], False)
            shrink_into(hidden, call.inputs, call.lora_a, call.routing, scaling=call.scaling)

    def expand(self, call: LoraCall) -> None:
        """As `Kernel.expand`."""
        with as_current(call.inputs.device):
            hidden = Hidden(call.inputs[None], False)
            expand_from(call.outputs, hidden, call.lora_b, call.routing, None, add=call.add, pdl=False)

    def add_lora(self, call: LoraCall) -> None:
        """As `Kernel.add_lora`: two launches, if the slices are stored alike."""
        if len(call.inputs) == 0:
            return
        if call.routing.adapter_weights is not None:
            _add_several(call, call.routing.adapter_weights)
            return
        columns, lora_a, lora_b = call.columns, call.lora_a, call.lora_b
        alike = are_alike(lora_a, 2) and are_alike(lora_b, 1) and are_alike(columns, 1)
        with as_current(call.inputs.device):
            for slices in [slice(None)] if alike else [slice(s, s + 1) for s in range(len(lora_b))]:
                hidden = shrink_all(call.inputs, lora_a[slices], call.routing)
                expand_all(columns[slices], hidden, lora_b[slices], call.routing, call.scaling)

    def linear_with_lora(
        self, call: LoraCall, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """As `Kernel.linear_with_lora`: one kernel for few rows, two streams for more, LoRA first for many."""
        if call.routing.adapter_weights is not None:
            return super().linear_with_lora(call, weights, biases)
        with as_current(call.inputs.device):
            return _linear_with_lora(call, weights, biases)


def _add_several(call: LoraCall, adapter_weights: Tensor) -> None:
    """Run a whole call whose rows have M adapters each: a row for each of them, of which the sums are added.

    What is added is written in fp32, and summed by PyTorch: no kernel's program writes to the row of another.
    """
    (rows, several), routing = adapter_weights.shape, call.routing.one_by_one()
    inputs, has_adapter = repeated(call.inputs, several), routing.has_adapter.view(rows, several)
    factors = torch.where(has_adapter, adapter_weights, 0.0).float().unsqueeze(2)
    has_any, columns = has_adapter.any(1, keepdim=True), call.columns
    alike = are_alike(call.lora_a, 2) and are_alike(call.lora_b, 1)
    with as_current(inputs.device):
        for slices in [slice(None)] if alike else [slice(s, s + 1) for s in range(len(columns))]:
            hidden, lora_b = shrink_all(inputs, call.lora_a[slices], routing), call.lora_b[slices]
            added = [inputs.new_empty(rows * several, b.shape[1], dtype=torch.float32) for b in lora_b]
            # Zero in rows without an adapter.
            expand_all(added, hidden, lora_b, routing, call.scaling, add=False)
            for target, each in zip(columns[slices], added, strict=True):
                total = (each.view(rows, several, each.shape[1]) * factors).sum(1) + target
                target.copy_(torch.where(has_any, total, target.float()))


def _linear_with_lora(call: LoraCall, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    inputs, lora_a, lora_b, routing = call.inputs, call.lora_a, call.lora_b, call.routing
    rows = len(inputs)
    sizes = _sizes(rows, lora_b)
    if _fits_linears(call, weights, biases, sizes):
        return _linears(call, weights, biases, sizes)
    products = list(zip(weights, biases, strict=True))
    if rows == 0 or not are_alike(lora_a, 2) or not are_alike(lora_b, 1):
        outputs = [linear(inputs, *product) for product in products]
        Triton().add_lora(replace(call, outputs=outputs))
        return outputs
    # A product adds either what is there or a bias. And of float16, LoRA alone may overflow where the sum does not.
    can_come_last = sizes.delta_first and all(bias is None for bias in biases) and inputs.dtype != torch.float16
    if can_come_last and sum(b.shape[1] for b in lora_b) == sum(map(len, weights)):
        outputs = [inputs.new_empty(rows, len(weight)) for weight in weights]
        columns = replace(call, outputs=outputs).columns
        expand_all(columns, shrink_all(inputs, lora_a, routing), lora_b, routing, call.scaling, add=False)
        for output, weight in zip(outputs, weights, strict=True):
            torch.addmm(output, inputs, weight.t(), out=output)
        return outputs
    # Made before the streams part.
    _tiles_of(routing)
    hidden = empty_hidden(inputs, lora_a, routing)
    # In a captured graph a second stream costs no time of the host's.
    aside = _side_stream(inputs.device) if _is_captured(inputs.device) else None
    if aside is not None:
        here = torch.cuda.current_stream(inputs.device)
        aside.wait_stream(here)
    with torch.cuda.stream(aside) if aside is not None else nullcontext():
        shrink_into(hidden, inputs, lora_a, routing)
    outputs = [linear(inputs, *product) for product in products]
    if aside is not None:
        here.wait_stream(aside)
    expand_all(replace(call, outputs=outputs).columns, hidden, lora_b, routing, call.scaling, follows=False)
    return outputs


def shrink_all(inputs: Tensor, lora_a: Sequence[Tensor], routing: RowRouting) -> Hidden:
    """`A[i] @ inputs[t]` of every slice.

    Args:
        inputs: `[T, D]`.
        lora_a: of each slice, `[K, R, D]`, all alike.
        routing: of the T rows among K slots.
    """
    hidden = empty_hidden(inputs, lora_a, routing)
    shrink_into(hidden, inputs, lora_a, routing, pdl=_has_pdl(inputs.device))
    return hidden


def expand_all(
    columns: Sequence[Tensor],
    hidden: Hidden,
    lora_b: Sequence[Tensor],
    routing: RowRouting,
    scaling: float,
    follows: bool = True,
    add: bool = True,
) -> None:
    """Add `B[i] @ (scaling * hidden[t])` to each slice's columns, `[T, W]`; `hidden` is what `shrink_all` has made.

    With `follows` the shrink is the kernel before this one on its stream, and need not have ended. Without `add` the
    columns are written: zero in rows without an adapter.
    """
    expand_from(columns, hidden, lora_b, routing, scaling, add, pdl=follows and _has_pdl(hidden.sums.device))


def piece_of(features: int) -> int:
    """How many columns of D are summed on their own, before the sums are: so decided by D alone."""
    return max(256, -(-features // (8 * 128)) * 128)


def piece_count(features: int) -> int:
    """How many pieces D has: at most 8."""
    return max(1, -(-features // piece_of(features)))


def shrink_into(
    hidden: Hidden,
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    routing: RowRouting,
    scaling: float | None = None,
    pdl: bool = False,
    form: Form | None = None,
) -> None:
    """Write `A[i] @ inputs[t]` into `hidden`; with a scaling that is the output of the public op."""
    rows, features = inputs.shape[0], int(inputs.shape[1])
    form = form or Form(_launch, rows)
    if form.rows == 0:
        return
    ranks = [int(a.shape[1]) for a in lora_a]
    dtype = inputs.dtype if inputs.dtype == lora_a[0].dtype else torch.float32
    kind = "float32" if dtype == torch.float32 else "plain"
    sizes = sizes_for(form.rows, max(ranks), 0, inputs.device.type, kind, int(lora_a[0].shape[0]))
    has_blocks = sizes.block_loads and _fits_block_loads(lora_a, 1, 2)
    pieces, piece, programs = piece_count(features), piece_of(features), len(hidden.sums)
    each = -(-pieces // programs)
    # Tiles of A that are loaded lane by lane take registers, and so do sums of pairs.
    is_tight = sizes.block_loads and not (has_blocks and each <= 2)
    most = 16 if is_tight else sizes.shrink_ranks
    block = rank_block(most, max(ranks), dtype)
    # Of float32, which takes twice the memory, no GPU with 99 KB of it shared would hold more.
    is_single = scaling is not None or block > 16 or lora_a[0].dtype == torch.float32
    group = 1 if is_single else sizes.shrink_slices
    blocks = -(-max(ranks) // block)
    tiles = _tiles_of(routing)
    height, count = _tiling(rows, routing)
    is_even = features > 0 and features % piece == 0
    # Masks of the last columns take registers, too.
    columns = sizes.shrink_columns if is_even or not is_tight else min(sizes.shrink_columns, 32)
    # A step of a whole piece would be summed with the next by Triton (3.6), which joins a product and a sum.
    while piece % columns or columns == piece:
        columns //= 2
    form.launch(
        "shrink_kernel",
        (count, programs, -(-len(lora_a) // group) * blocks),
        hidden.sums,
        *hidden.sums.stride()[1:],
        inputs,
        *inputs.stride(),
        rows,
        *_with_strides(lora_a, common=2),
        tiles,
        count,
        routing.ranks,
        tuple(ranks),
        features,
        blocks,
        float(scaling or 0.0),
        routing.ranks is not None,
        piece,
        pieces,
        each,
        scaling is not None,
        is_even,
        has_blocks,
        pdl,
        len(lora_a),
        group,
        height,
        block,
        columns,
        sizes.shrink_stages,
        # For 64 ranks Triton takes other instructions on Hopper if there are four warps: so let there always be four.
        num_warps=4 if block == 64 or is_tight else sizes.shrink_warps,
        **_overlap(pdl),
    )


def expand_from(
    columns: Sequence[Any],
    hidden: Hidden,
    lora_b: Sequence[Tensor],
    routing: RowRouting,
    scaling: float | None,
    add: bool,
    pdl: bool,
    form: Form | None = None,
) -> None:
    """Add `B[i] @ hidden[t]` to columns: with a scaling what the shrink has left, without the public op's inputs.

    The columns are tensors `[T, W]`, or what has their shape and strides, and is known to `form.launch`.
    """
    rows = columns[0].shape[0]
    form = form or Form(_launch, rows)
    if form.rows == 0:
        return
    sizes = _sizes(form.rows, lora_b, hidden, columns[0].dtype)
    ranks, widths = [int(b.shape[2]) for b in lora_b], [int(b.shape[1]) for b in lora_b]
    block = rank_block(sizes.expand_ranks, max(ranks), lora_b[0].dtype)
    tiles = _tiles_of(routing)
    height, count = _tiling(rows, routing)
    width = sizes.expand_columns
    each = sizes.expand_blocks
    blocks = sum(-(-columns_of_slice // (width * each)) for columns_of_slice in widths)
    form.launch(
        "expand_kernel",
        (blocks * count,),
        tuple(columns),
        tuple(output.stride(0) for output in columns),
        columns[0].stride(1),
        hidden.sums,
        *hidden.sums.stride()[1:],
        rows,
        *_with_strides(lora_b, common=1),
        tiles,
        count,
        blocks,
        routing.ranks,
        tuple(ranks),
        tuple(widths),
        1.0 if scaling is None else float(scaling),
        routing.ranks is not None,
        len(hidden.sums),
        hidden.is_paired,
        scaling is not None,
        add,
        # The public op leaves rows without an adapter as they are.
        scaling is not None and not add,
        # Of float32 a loop takes fewer registers than the rank vectors that would be kept.
        max(ranks) <= block and (sizes.expand_ahead or sizes.block_loads),
        sizes.expand_ahead,
        sizes.block_loads and _fits_block_loads(lora_b, 2, 1),
        pdl,
        each,
        height,
        block,
        width,
        num_warps=sizes.expand_warps,
        # As in `shrink_into`.
        **({"num_stages": 2} if lora_b[0].dtype == torch.float32 else {}),
        **_overlap(pdl),
    )


def _fits_linears(call: LoraCall, weights: Sequence[Tensor], biases: Sequence[Tensor | None], sizes: Sizes) -> bool:
    """Whether `_linears` can compute these base products, and is faster than their own kernels and ours."""
    inputs, lora_a, lora_b = call.inputs, call.lora_a, call.lora_b
    rows = len(inputs)
    bias = [bias for bias in biases if bias is not None]
    is_small = sum(weight.numel() for weight in weights) <= sizes.linear_small
    is_narrow = sum(map(len, weights)) <= sizes.linear_width
    most = sizes.linear_rows_if_small if is_small else sizes.linear_rows if is_narrow else 0
    return (
        0 < rows <= most
        and max(b.shape[2] for b in lora_b) <= sizes.linear_rank
        and inputs.dtype in (torch.bfloat16, torch.float16)
        and all(operand.dtype == inputs.dtype for operand in (*weights, *bias, *lora_a, *lora_b))
        and all(operand.stride(-1) == 1 for operand in (inputs, *weights, *bias))
        and len(bias) in (0, len(biases))
        and all(offset % sizes.linear_columns == 0 for offset in call.slice_offsets)
        and are_alike(lora_a, 2)
        and are_alike(lora_b, 1)
    )


def _linears(call: LoraCall, weights: Sequence[Tensor], biases: Sequence[Tensor | None], sizes: Sizes) -> list[Tensor]:
    """The base products `inputs @ weight.T + bias`, and every slice added to them, in two launches, for few rows."""
    inputs, lora_b, routing = call.inputs, call.lora_b, call.routing
    rows, features = inputs.shape
    outputs = [inputs.new_empty(rows, len(weight)) for weight in weights]
    hidden = shrink_all(inputs, call.lora_a, routing)
    width, columns = sizes.linear_columns, sizes.linear_depth
    # Whole steps need no masks.
    while columns > 32 and features % columns:
        columns //= 2
    pdl = _has_pdl(inputs.device)
    _launch(
        "linear_kernel",
        (sum(-(-len(weight) // width) for weight in weights), -(-rows // 16)),
        tuple(outputs),
        inputs,
        inputs.stride(0),
        tuple(weights),
        tuple(weight.stride(0) for weight in weights),
        tuple(inputs if bias is None else bias for bias in biases),
        features,
        rows,
        tuple(len(weight) for weight in weights),
        hidden.sums,
        hidden.sums.stride(1),
        routing.indices,
        routing.indices.stride(0),
        routing.slots,
        routing.ranks,
        call.scaling,
        *_with_strides(lora_b, common=1),
        tuple(b.shape[2] for b in lora_b),
        tuple(call.slice_offsets),
        tuple(b.shape[1] for b in lora_b),
        tuple(call.slice_outputs),
        biases[0] is not None,
        routing.ranks is not None,
        features % columns == 0,
        pdl,
        len(hidden.sums),
        hidden.is_paired,
        16,
        width,
        columns,
        max(16, 1 << (hidden.sums.shape[2] - 1).bit_length()),
        sizes.linear_stages,
        num_warps=sizes.linear_warps,
        **_overlap(pdl),
    )
    return outputs


def _sizes(
    rows: int, lora_b: Sequence[Tensor], hidden: Hidden | None = None, output: torch.dtype | None = None
) -> Sizes:
    """The sizes of an expand from rank vectors into outputs of a dtype; without them of a whole call of one dtype."""
    rank, width = max(int(b.shape[2]) for b in lora_b), sum(int(b.shape[1]) for b in lora_b)
    dtype = lora_b[0].dtype
    inputs = torch.float32 if hidden is None else hidden.sums.dtype
    # Rank vectors in fp32 are multiplied in parts of the dtype of B; others must be of that dtype.
    if dtype == torch.float32 or inputs not in (torch.float32, dtype):
        kind = "float32"
    else:
        is_mixed = inputs != torch.float32 or output not in (None, dtype)
        kind = "mixed" if is_mixed else "plain"
    return sizes_for(rows, rank, width, lora_b[0].device.type, kind, int(lora_b[0].shape[0]))


def empty_hidden(inputs: Tensor, lora_a: Sequence[Tensor], routing: RowRouting, sized_for: int | None = None) -> Hidden:
    """Memory for the rank vectors of all slices; as for `sized_for` rows if that is given."""
    rows, features = inputs.shape[0], int(inputs.shape[1])
    if sized_for is None:
        sized_for = rows
    highest = max(int(a.shape[1]) for a in lora_a)
    sizes = sizes_for(sized_for, highest, 0, inputs.device.type, "plain", routing.slots)
    pieces = piece_count(features)
    programs = tile_count(sized_for, routing.slots) * pieces * -(-len(lora_a) // sizes.shrink_slices)
    is_paired = programs >= sizes.shrink_programs
    # The rank rounded up, so that each row starts where it is read fastest.
    shape = (-(-pieces // 2) if is_paired else pieces, len(lora_a) * rows, -(-highest // 16) * 16)
    return Hidden(torch.empty(shape, dtype=torch.float32, device=inputs.device), is_paired)


def are_alike(operands: Sequence[Tensor], dim: int) -> bool:
    """Whether the kernels can pick one of these as they run: of one dtype, and one stride in a dimension."""
    return len({(operand.dtype, operand.stride(dim), operand.shape[0]) for operand in operands}) == 1


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # First in line, so that a base product that takes the whole device does not come before.
    return torch.cuda.Stream(device, priority=-1)


def _fits_block_loads(matrices: Sequence[Tensor], row: int, column: int) -> bool:
    """Whether Intel GPUs can read each slot of stacks by 2-D block loads, which want rows of 64 bytes and more.

    Rows start at multiples of 16 elements: of a stride Triton knows no more than that.

    Args:
        matrices: of each slice, A or B.
        row: the dimension whose stride leads to the next row, equal in all.
        column: that of the elements of a row, side by side.
    """
    strides = {(matrix.stride(row), matrix.stride(column)) for matrix in matrices}
    is_regular = len(strides) == 1 and matrices[0].stride(row) % 16 == 0 and matrices[0].stride(column) == 1
    lengths = [int(matrix.shape[column]) for matrix in matrices]
    return (
        is_regular
        and all(length >= 32 and length % 2 == 0 for length in lengths)
        and all(matrix.dtype.itemsize == 2 for matrix in matrices)
    )


def rank_block(most: int, rank: int, dtype: torch.dtype) -> int:
    """How many ranks one product takes, of a power of 2 that is at most `most`."""
    # Products of float32, which tensor cores do not compute exactly, are 5 to 8 times slower with 64 ranks at a time.
    most = min(most, 32 if dtype == torch.float32 else 64)
    return next(block for block in (16, 32, 64) if block >= min(rank, most))


def _with_strides(stacks: Sequence[Tensor], common: int) -> tuple[Any, ...]:
    """The stacks, and their three strides; `common` is the dimension in which all have the same."""
    strides: list[Any] = [tuple(stack.stride(at) for stack in stacks) for at in range(3)]
    strides[common] = stacks[0].stride(common)
    return (tuple(stacks), *strides)


def _has_pdl(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch: CUDA, from Hopper on)."""
    return device.type == "cuda" and _capability(device) >= (9, 0) and _can_overlap()


@cache
def _can_overlap() -> bool:
    from xpu_lora_compile.kernels import triton_kernels

    return triton_kernels.CAN_OVERLAP


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _overlap(pdl: bool) -> dict[str, Any]:
    return {"launch_pdl": True} if pdl else {}


def _launch(kernel: str, grid: tuple[int, ...], *operands: Any, **options: Any) -> None:
    launched = kernel_named(kernel)[grid](*operands, **options)
    if (tape := current_tape()) is not None:
        tape.launch(launched, grid, operands)


@cache
def kernel_named(name: str) -> Any:
    """The Triton kernel of a name, of either file."""
    # Late: Triton is loaded where its kernels run, and nowhere else.
    from xpu_lora_compile.kernels import triton_backward, triton_kernels

    return getattr(triton_kernels, name, None) or getattr(triton_backward, name)
