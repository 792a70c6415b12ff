"""The Triton kernels as a compiler sees them: bodies of ops that allocate with aten and launch flat forms.

A compiler that inlines such a body (`inline_under_aot`) plans its memory, and launches its kernels itself: no Python
of this package runs then, no second stream, and no kernel starts before the one in front of it has ended.

Sizes are chosen for a number of rows that `lower` settles, `tuned_rows`, since T may be symbolic. The table of tiles is
int32 `[tiles, 1 + height]`: its shape, no more, tells every op of the graph how it is cut.
"""

# Triton ships no types.
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xpu_lora_compile.kernels.call import LoraCall, accumulator
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.kernels.triton_launch import (
    Form,
    Groups,
    Hidden,
    are_alike,
    as_current,
    empty_hidden,
    expand_from,
    fill_tiles,
    group_count,
    shrink_into,
    tile_rows,
)

# What `Form.launch` is.
Launch = Callable[..., None]


class Columns(NamedTuple):
    """Columns of an output from an offset on, without a view of them, which a compiler would copy to change it."""

    output: Tensor
    offset: int

    @property
    def shape(self) -> Any:
        """That of the whole output."""
        return self.output.shape

    @property
    def dtype(self) -> torch.dtype:
        """The output's."""
        return self.output.dtype

    def stride(self, dim: int) -> Any:
        """The output's."""
        return self.output.stride(dim)


def tiles_shape(rows: Any, slots: int, tuned_rows: int, groups: Groups | None = None) -> tuple[Any, int]:
    """The shape of the table for T rows: `(tiles, 1 + height)`; where T is symbolic, of enough tiles for every T."""
    height = tile_rows(tuned_rows, slots)
    count = rows // height + group_count(slots, groups)
    # Its last size is a number: of others Inductor (2.8) makes strides that it does not know again.
    return min(rows, count) if isinstance(rows, int) else count, 1 + height


def route_tiles(indices: Tensor, slots: int, tuned_rows: int, launch: Launch, groups: Groups | None = None) -> Tensor:
    """Return the table of tiles for these indices."""
    rows, slots = indices.shape[0], int(slots)
    tiles = torch.empty(tiles_shape(rows, slots, tuned_rows, groups), dtype=torch.int32, device=indices.device)
    if not _is_none(rows):
        by_row = isinstance(rows, int) and tiles.shape[0] == rows
        height, form = tiles.shape[1] - 1, Form(launch, tuned_rows)
        fill_tiles(tiles, indices, slots, height, tiles.shape[0], by_row, form, groups)
    return tiles


def add_lora(call: LoraCall, tuned_rows: int, launch: Launch) -> None:
    """Run a whole call, columns that two slices share too: those are summed in fp32, slice by slice."""
    if _is_none(call.inputs.shape[0]):
        return
    shared = call.shared_outputs()
    if not shared:
        _add_lora(call, tuned_rows, launch)
        return
    dtype = accumulator(*call.operands)
    sums = [output.to(dtype) if position in shared else output for position, output in enumerate(call.outputs)]
    for part in replace(call, outputs=sums).one_by_one():
        _add_lora(part, tuned_rows, launch)
    for position in shared:
        call.outputs[position].copy_(sums[position])


def _add_lora(call: LoraCall, tuned_rows: int, launch: Launch) -> None:
    form, lora_a, lora_b = Form(launch, tuned_rows), call.lora_a, call.lora_b
    places = zip(call.slice_outputs, call.slice_offsets, strict=True)
    columns = [Columns(call.outputs[position], offset) for position, offset in places]
    alike = (
        are_alike(lora_a, 2)
        and are_alike(lora_b, 1)
        and len({(place.dtype, place.stride(1)) for place in columns}) == 1
    )
    for slices in [slice(None)] if alike else [slice(s, s + 1) for s in range(len(lora_b))]:
        hidden = empty_hidden(call.inputs, lora_a[slices], call.routing, tuned_rows)
        shrink_into(hidden, call.inputs, lora_a[slices], call.routing, form=form)
        expand_from(columns[slices], hidden, lora_b[slices], call.routing, call.scaling, add=True, pdl=False, form=form)


def shrink(call: LoraCall, tuned_rows: int, launch: Launch) -> None:
    """Run `Kernel.shrink`."""
    if not _is_none(call.inputs.shape[0]):
        hidden, form = Hidden(call.outputs[0][None], False), Form(launch, tuned_rows)
        shrink_into(hidden, call.inputs, call.lora_a, call.routing, scaling=call.scaling, form=form)


def expand(call: LoraCall, tuned_rows: int, launch: Launch) -> None:
    """Run `Kernel.expand`, into the columns that the call says."""
    if not _is_none(call.inputs.shape[0]):
        columns, form = [Columns(call.outputs[0], call.slice_offsets[0])], Form(launch, tuned_rows)
        hidden = Hidden(call.inputs[None], False)
        expand_from(columns, hidden, call.lora_b, call.routing, None, add=call.add, pdl=False, form=form)


def _is_none(rows: Any) -> bool:
    """Whether there are no rows; a symbolic T is never asked, as what is launched is right for none, too."""
    return isinstance(rows, int) and rows == 0


def launch_flat(kernel: str, grid: tuple[Any, ...], *operands: Any, **options: Any) -> None:
    """Launch the flat form of a kernel here and now."""
    shapes, arguments = _flattened(operands)
    _flat_form(kernel, shapes)[grid](*arguments, **options)


def launch_traced(kernel: str, grid: tuple[Any, ...], *operands: Any, **options: Any) -> None:
    """Note a launch of the flat form in the graph that a compiler makes."""
    shapes, arguments = _flattened(operands)
    wrap: Any = torch.library.wrap_triton
    wrap(_configured(kernel, shapes, **options))[grid](*arguments)


def run_here(body: Callable[..., Any]) -> Callable[..., Any]:
    """Have the body of an op run on the device that its first operand is on."""

    def run(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with as_current(first.device):
            return body(*args, **kwargs)

    return run


def _flattened(operands: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
    """The shapes of operands, as `flat_form` takes them, and the arguments of the form."""
    shapes: list[Any] = []
    arguments: list[Any] = []
    for operand in operands:
        if operand is None:
            shapes.append("none")
        elif not isinstance(operand, tuple):
            # Inductor would hand a number on as float64, and the kernels would compute in that.
            shapes.append("constant" if isinstance(operand, float) else "one")
            arguments.append(operand)
        else:
            columns = [value if isinstance(value, Columns) else Columns(value, 0) for value in operand]
            # Outputs that several slices add to are one argument; numbers are equal by chance.
            first = [
                next(at for at, other in enumerate(columns) if at == s or other.output is column.output)
                if isinstance(column.output, Tensor)
                else s
                for s, column in enumerate(columns)
            ]
            starts = [column.offset * (column.stride(1) if column.offset else 1) for column in columns]
            shapes.append(tuple(zip(first, map(bool, starts), strict=True)))
            arguments += [columns[at].output for at in sorted(set(first))]
            arguments += filter(None, starts)
    return tuple(shapes), arguments


def _flat_form(kernel: str, shapes: tuple[Any, ...]) -> Any:
    # Late: Triton is loaded where its kernels run, and nowhere else.
    from xpu_lora_compile.kernels.triton_flat import flat_form

    return flat_form(kernel, shapes)


@cache
def _configured(kernel: str, shapes: tuple[Any, ...], **options: int) -> Any:
    """The flat form with its warps and stages: the same object for every launch, or Inductor would compile each."""
    from triton import Config, autotune

    form = _flat_form(kernel, shapes)
    return autotune(configs=[Config({}, **options)], key=[])(form) if options else form


def called(
    outputs: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    tiles: Tensor,
    ranks: Tensor | None,
    **more: Any,
) -> LoraCall:
    """Return the call that operands of an op of these describe."""
    slots = int((lora_a or lora_b)[0].shape[0])
    return LoraCall(outputs, inputs, lora_a, lora_b, RowRouting(indices, slots, ranks, tiles), **more)
