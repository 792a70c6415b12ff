"""The ops that the passes emit: every question of shape is already settled, so they check no shapes and branch nowhere.

They are registered with the low-level `torch.library.Library`: a call from compiled code costs about 2.5 us, against
20 us for a `torch.library.custom_op` (measured on torch 2.13 CPU, two Xeon cores). Not for calling by hand.

Weights may be `[K, rows, columns]` or `[K, 1, rows, columns]`, with any strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from xpu_lora_compile import kernels
from xpu_lora_compile.kernels import replay, triton_gradients, triton_launch, triton_visible, vendor
from xpu_lora_compile.kernels.call import LoraCall, accumulator, without_autocast
from xpu_lora_compile.kernels.native import BACKWARD_OPERANDS, fake_backward
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.kernels.triton_visible import Launch, launch_flat, launch_traced
from xpu_lora_compile.ops.checks import refuse_gradients, without_slice_dim
from xpu_lora_compile.torch_internals import inline_under_aot

LIBRARY = torch.library.Library("xpu_lora", "FRAGMENT")

# Inductor may lay the operands out as it likes: any strides are fine here, and so no operand is ever copied for us.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


def shrink(output: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, scaling: float) -> None:
    """Run `Kernel.shrink` for operands that fit, A without vLLM's 1."""
    call = LoraCall([output], inputs, [weights], [], RowRouting(indices, len(weights)), scaling=scaling)
    kernels.kernel_for(call).shrink(call)


def expand(output: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, add: bool) -> None:
    """Run `Kernel.expand` for operands that fit, B without vLLM's 1."""
    call = LoraCall([output], inputs, [], [weights], RowRouting(indices, len(weights)), add=add)
    kernels.kernel_for(call).expand(call)


def _shrink(output: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, scaling: float) -> None:
    _refuse_gradients("shrink", output, inputs, weights, replaces=True)
    shrink(output, inputs, without_slice_dim(weights), indices, scaling)


def _expand(output: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, add: bool) -> None:
    _refuse_gradients("expand", output, inputs, weights, replaces=not add)
    expand(output, inputs, without_slice_dim(weights), indices, add)


def _expand_slice(
    output: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, offset: int, size: int, add: bool
) -> None:
    _refuse_gradients("expand_slice", output, inputs, weights, replaces=not add)
    columns = output.narrow(1, offset, size)
    expand(columns, inputs, without_slice_dim(weights), indices, add)


def _route(indices: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return RowRouting(indices, slots).tensors()


def _add_lora(
    outputs: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float,
    *prepared: Tensor | None,
) -> None:
    routing = RowRouting.of(indices, len(lora_a[0]), *prepared)
    if torch.is_grad_enabled():
        factors = () if routing.adapter_weights is None else (routing.adapter_weights,)
        for output in outputs:
            for weights in (*lora_a, *lora_b, *factors):
                refuse_gradients("add_lora", output, inputs, weights, replaces=False)
    stacks_a, stacks_b = [[without_slice_dim(weights) for weights in stacks] for stacks in (lora_a, lora_b)]
    places = slice_outputs, slice_offsets
    kernels.add_lora(LoraCall(outputs, inputs, stacks_a, stacks_b, routing, *places, scaling))


def _linear_with_lora(
    inputs: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float,
    *prepared: Tensor | None,
) -> list[Tensor]:
    stacks_a, stacks_b = [[without_slice_dim(weights) for weights in stacks] for stacks in (lora_a, lora_b)]
    routing = RowRouting.of(indices, len(lora_a[0]), *prepared)
    call = LoraCall((), inputs, stacks_a, stacks_b, routing, slice_outputs, slice_offsets, scaling)
    return kernels.linear_with_lora(call, weights, biases)


def _groups(ends: Tensor | None, codes: Tensor | None) -> triton_launch.Groups | None:
    return None if ends is None or codes is None else triton_launch.Groups(ends, codes)


def _route_tiles(indices: Tensor, slots: int, ends: Tensor | None = None, codes: Tensor | None = None) -> Tensor:
    return triton_launch.route(indices, slots, _groups(ends, codes))


def _sorted_indices(groups: Tensor, codes: Tensor, ends: Tensor) -> Tensor:
    return codes[groups]


def _slot_products(inputs: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    return kernels.slot_products(inputs, weights, RowRouting(indices, len(weights)))


def _outer_by_slot(left: Tensor, right: Tensor, indices: Tensor, slots: int) -> Tensor:
    # Both factors are masked: a NaN in the row of one adapter must not reach the gradient of another.
    result = left.new_empty(slots, left.shape[1], right.shape[1])
    with without_autocast(left.device.type):
        for slot in range(slots):
            mine = (indices == slot)[:, None]
            torch.mm(torch.where(mine, left, 0.0).t(), torch.where(mine, right, 0.0), out=result[slot])
    return result


def _refuse_gradients(op: str, output: Tensor, inputs: Tensor, weights: Tensor, replaces: bool) -> None:
    # An exported program may run in another grad mode than it was traced in.
    if torch.is_grad_enabled():
        refuse_gradients(op, output, inputs, weights, replaces)


def _no_result(*_: object) -> None:
    """What a mutating op returns to the compiler: nothing, and its output keeps its shape."""


def _fake_route(indices: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, long = indices.shape[0], torch.int64
    return (
        indices.new_empty(rows, dtype=long),
        indices.new_empty(rows, 1, dtype=torch.bool),
        indices.new_empty(rows, dtype=long),
        indices.new_empty(slots + 2, dtype=long),
    )


def _fake_route_tiles(indices: Tensor, slots: int, ends: Tensor | None = None, codes: Tensor | None = None) -> Tensor:
    count = triton_launch.group_count(slots, _groups(ends, codes))
    return indices.new_empty(triton_launch.table_length(indices.shape[0], count), dtype=torch.int32)


def _fake_sorted_indices(groups: Tensor, codes: Tensor, ends: Tensor) -> Tensor:
    return codes.new_empty(groups.shape)


def _fake_linear_with_lora(inputs: Tensor, weights: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [inputs.new_empty(inputs.shape[0], weight.shape[0]) for weight in weights]


def _fake_slot_products(inputs: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weights.shape[1], dtype=accumulator(inputs, weights))


def _fake_outer_by_slot(left: Tensor, right: Tensor, indices: Tensor, slots: int) -> Tensor:
    return left.new_empty(slots, left.shape[1], right.shape[1])


_ROW_OPERANDS = "Tensor(a!) output, Tensor inputs, Tensor weights, Tensor indices"
_PRODUCTS = "Tensor inputs, Tensor[] weights, Tensor?[] biases, Tensor[] lora_a, Tensor[] lora_b"
_LISTS = "Tensor(a!)[] outputs, Tensor inputs, Tensor[] lora_a, Tensor[] lora_b"
_PLACES = "int[] slice_outputs, SymInt[] slice_offsets, float scaling"
# How rows lie that are sorted: see `triton_launch.Groups`.
_GROUPS = "Tensor? ends=None, Tensor? codes=None"
# The results of `route`, or of `route_tiles` and the ranks; without them a kernel computes what it needs.
_PREPARED = ", ".join(f"Tensor? {name}=None" for name in RowRouting.PREPARED)

for _schema, _kernel, _fake in (
    (f"shrink({_ROW_OPERANDS}, float scaling) -> ()", _shrink, _no_result),
    (f"expand({_ROW_OPERANDS}, bool add) -> ()", _expand, _no_result),
    (f"expand_slice({_ROW_OPERANDS}, SymInt offset, SymInt size, bool add) -> ()", _expand_slice, _no_result),
    # What every call of one graph shares: `RowRouting.tensors`. The passes hand results on by their names.
    (
        "route(Tensor indices, SymInt slots) -> (Tensor slot, Tensor has_adapter, Tensor order, Tensor starts)",
        _route,
        _fake_route,
    ),
    # The same for the Triton kernels.
    (f"route_tiles(Tensor indices, SymInt slots, {_GROUPS}) -> (Tensor tiles)", _route_tiles, _fake_route_tiles),
    # The base products of one input, with what `add_lora` adds to them.
    (
        f"linear_with_lora({_PRODUCTS}, Tensor indices, {_PLACES}, {_PREPARED}) -> Tensor[]",
        _linear_with_lora,
        _fake_linear_with_lora,
    ),
    # `lora_linears` in place.
    (f"add_lora({_LISTS}, Tensor indices, {_PLACES}, {_PREPARED}) -> ()", _add_lora, _no_result),
    # For the gradients of `lora_linear`.
    ("slot_products(Tensor inputs, Tensor weights, Tensor indices) -> Tensor", _slot_products, _fake_slot_products),
    (
        "outer_by_slot(Tensor left, Tensor right, Tensor indices, SymInt slots) -> Tensor",
        _outer_by_slot,
        _fake_outer_by_slot,
    ),
):
    _name = _schema.split("(", 1)[0]
    LIBRARY.define(_schema, tags=_TAGS)
    LIBRARY.impl(_name, replay.recorded(_kernel), "CompositeExplicitAutograd")
    # The gradient of a changed output passes through as it is; the public ops have refused any other.
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"xpu_lora::{_name}", _fake, lib=LIBRARY)

# `codes[groups]`, of rows that lie group by group: group g ends at `ends[g]`. `lower` hands that on, or leaves it out.
LIBRARY.define("sorted_indices(Tensor groups, Tensor codes, Tensor ends) -> Tensor", tags=_TAGS)
LIBRARY.impl("sorted_indices", _sorted_indices, "CompositeExplicitAutograd")
torch.library.register_fake("xpu_lora::sorted_indices", _fake_sorted_indices, lib=LIBRARY)


def _vendor_add_lora(
    outputs: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    valid: Tensor,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float,
    kind: str,
) -> None:
    # As in `_shrunk`: no op is given a view to write to.
    written = [
        output if vendor.is_whole(output) else inputs.new_zeros(output.shape, dtype=torch.float32) for output in outputs
    ]
    vendor.add_lora(kind, written, inputs, lora_a, lora_b, valid, slice_outputs, slice_offsets, scaling)
    for output, added in zip(outputs, written, strict=True):
        if added is not output:
            output.add_(added)


# Composite: one call in the graph that our passes see, and the vendor's own ops in the one that Inductor gets.
_VENDOR = f"{_LISTS}, Tensor valid, int[] slice_outputs, int[] slice_offsets, float scaling, str kind"
# The indices as the vendor's ops want them: int32 if narrow, else int64; -1 wherever there is no slot.
LIBRARY.define("valid_slots(Tensor indices, SymInt slots, bool narrow) -> (Tensor valid)", tags=_TAGS)
LIBRARY.impl("valid_slots", vendor.valid_slots, "CompositeImplicitAutograd")
LIBRARY.define(f"vendor_add_lora({_VENDOR}) -> ()", tags=_TAGS)
LIBRARY.impl("vendor_add_lora", _vendor_add_lora, "CompositeImplicitAutograd")

# The same once more, for a compiler to look into: AOT inlines them, and Inductor launches what they launch. So that
# their sizes are settled, each gets the number of rows that these are for, and the table of tiles.


def _triton_route_tiles(
    launch: Launch,
    indices: Tensor,
    slots: int,
    tuned_rows: int,
    ends: Tensor | None = None,
    codes: Tensor | None = None,
) -> Tensor:
    return triton_visible.route_tiles(indices, slots, tuned_rows, launch, _groups(ends, codes))


def _triton_add_lora(
    launch: Launch,
    outputs: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float,
    tuned_rows: int,
    tiles: Tensor,
    ranks: Tensor | None = None,
) -> None:
    stacks_a, stacks_b = [[without_slice_dim(weights) for weights in stacks] for stacks in (lora_a, lora_b)]
    places = {"slice_outputs": slice_outputs, "slice_offsets": slice_offsets, "scaling": scaling}
    call = triton_visible.called(outputs, inputs, stacks_a, stacks_b, indices, tiles, ranks, **places)
    triton_visible.add_lora(call, tuned_rows, launch)


def _triton_shrink(
    launch: Launch,
    output: Tensor,
    inputs: Tensor,
    weights: Tensor,
    indices: Tensor,
    scaling: float,
    tuned_rows: int,
    tiles: Tensor,
) -> None:
    stacks = [without_slice_dim(weights)]
    call = triton_visible.called([output], inputs, stacks, [], indices, tiles, None, scaling=scaling)
    triton_visible.shrink(call, tuned_rows, launch)


def _triton_expand_slice(
    launch: Launch,
    output: Tensor,
    inputs: Tensor,
    weights: Tensor,
    indices: Tensor,
    offset: int,
    add: bool,
    tuned_rows: int,
    tiles: Tensor,
) -> None:
    stacks, places = [without_slice_dim(weights)], {"slice_offsets": (offset,), "add": add}
    call = triton_visible.called([output], inputs, [], stacks, indices, tiles, None, **places)
    triton_visible.expand(call, tuned_rows, launch)


def _triton_backward(
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
    stacks_a, stacks_b = [[without_slice_dim(weights) for weights in stacks] for stacks in (lora_a, lora_b)]
    rest = slice_outputs, slice_offsets, scaling, scalings, slots, needs_inputs, needs_weights, tiles, kept
    made = triton_gradients.backward(launch, grads, inputs, stacks_a, stacks_b, indices, *rest)
    if slots is not None or not needs_weights:
        return made
    first = len(made) - 2 * len(lora_a)
    of_weights = zip(made[first:], (*lora_a, *lora_b), strict=True)
    return [*made[:first], *(gradient.view(stored.shape) for gradient, stored in of_weights)]


def _fake_triton_route_tiles(
    indices: Tensor, slots: int, tuned_rows: int, ends: Tensor | None = None, codes: Tensor | None = None
) -> Tensor:
    shape = triton_visible.tiles_shape(indices.shape[0], int(slots), tuned_rows, _groups(ends, codes))
    return indices.new_empty(shape, dtype=torch.int32)


def _triton_training_tiles(launch: Launch, indices: Tensor, slots: int) -> Tensor:
    return triton_gradients.training_tiles(launch, indices, int(slots))


def _fake_triton_training_tiles(indices: Tensor, slots: int) -> Tensor:
    shape = triton_gradients.training_tiles_shape(indices.shape[0], int(slots))
    return indices.new_empty(shape, dtype=torch.int32)


def is_interpreted(operand: Tensor | Sequence[Tensor], *_: object, **__: object) -> bool:
    """Whether Triton's interpreter runs a call, of whose first argument this is: it knows no compiler's tensors."""
    first = operand if isinstance(operand, Tensor) else operand[0]
    return first.device.type == "cpu" or triton_launch.is_interpreting()


_TUNED = "int tuned_rows, Tensor tiles"
_PLAIN_PLACES = "int[] slice_outputs, int[] slice_offsets, float scaling"
for _schema, _body, _faked in (
    (
        f"triton_route_tiles(Tensor indices, SymInt slots, int tuned_rows, {_GROUPS}) -> (Tensor tiles)",
        _triton_route_tiles,
        _fake_triton_route_tiles,
    ),
    (
        f"triton_add_lora({_LISTS}, Tensor indices, {_PLAIN_PLACES}, {_TUNED}, Tensor? ranks=None) -> ()",
        _triton_add_lora,
        _no_result,
    ),
    (f"triton_shrink({_ROW_OPERANDS}, float scaling, {_TUNED}) -> ()", _triton_shrink, _no_result),
    (f"triton_expand_slice({_ROW_OPERANDS}, int offset, bool add, {_TUNED}) -> ()", _triton_expand_slice, _no_result),
    # `native_backward` for GPUs, eager calls as well as graphs.
    (
        f"triton_backward({BACKWARD_OPERANDS}, Tensor? tiles=None, Tensor? kept=None) -> Tensor[]",
        _triton_backward,
        fake_backward,
    ),
    # What both passes of a training step share.
    (
        "triton_training_tiles(Tensor indices, SymInt slots) -> (Tensor tiles)",
        _triton_training_tiles,
        _fake_triton_training_tiles,
    ),
):
    _name = _schema.split("(", 1)[0]
    LIBRARY.define(_schema, tags=_TAGS)
    LIBRARY.impl(_name, triton_visible.run_here(partial(_body, launch_flat)), "CompositeExplicitAutograd")
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"xpu_lora::{_name}", _faked, lib=LIBRARY)
    inline_under_aot(LIBRARY, _name, partial(_body, launch_traced), unless=is_interpreted)

SHRINK = torch.ops.xpu_lora.shrink.default
EXPAND = torch.ops.xpu_lora.expand.default
EXPAND_SLICE = torch.ops.xpu_lora.expand_slice.default
ROUTE = torch.ops.xpu_lora.route.default
ROUTE_TILES = torch.ops.xpu_lora.route_tiles.default
SORTED_INDICES = torch.ops.xpu_lora.sorted_indices.default
LINEAR_WITH_LORA = torch.ops.xpu_lora.linear_with_lora.default
ADD_LORA = torch.ops.xpu_lora.add_lora.default
VALID_SLOTS = torch.ops.xpu_lora.valid_slots.default
VENDOR_ADD_LORA = torch.ops.xpu_lora.vendor_add_lora.default
TRITON_ROUTE_TILES = torch.ops.xpu_lora.triton_route_tiles.default
TRITON_ADD_LORA = torch.ops.xpu_lora.triton_add_lora.default
TRITON_SHRINK = torch.ops.xpu_lora.triton_shrink.default
TRITON_BACKWARD = torch.ops.xpu_lora.triton_backward.default
TRITON_TRAINING_TILES = torch.ops.xpu_lora.triton_training_tiles.default
TRITON_EXPAND_SLICE = torch.ops.xpu_lora.triton_expand_slice.default
SLOT_PRODUCTS = torch.ops.xpu_lora.slot_products.default
OUTER_BY_SLOT = torch.ops.xpu_lora.outer_by_slot.default
