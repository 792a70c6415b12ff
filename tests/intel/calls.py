"""The launches that an Intel GPU can be asked for: one of each size of tiles, dtype and form of a kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from intel.toolchain import Launch, launches_of
from torch import Tensor

from xpu_lora_compile.kernels import triton_launch
from xpu_lora_compile.kernels.call import LoraCall
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.kernels.triton_gradients import backward, forward, training_tiles
from xpu_lora_compile.kernels.triton_launch import Groups, Triton, route

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# T of tiles of 16 rows and of 32, the latter with pieces of D one by one and in pairs; and R of one block of 16 ranks,
# of one of 32, and of two of those.
ROWS, RANKS = (8, 300, 2048), (16, 32, 64)
# Whole pieces of D, pieces that end within a step, one piece, less than one; and rows that no block load can read.
FEATURES = (4096, 1008, 256, 100, 1001)
PACKED = (1024, 256, 256)
# The kernels that multiply nothing.
ROUTING = ("route_kernel", "route_alone_kernel", "route_sorted_kernel")


def lora_call(
    rows: int,
    rank: int,
    dtype: torch.dtype,
    features: int = 4096,
    widths: tuple[int, ...] = PACKED,
    *,
    slots: int = 8,
    has_ranks: bool = True,
    output: torch.dtype | None = None,
) -> LoraCall:
    """A whole call, with B stored by rank; what is in its tensors is arbitrary."""
    empty: Callable[..., Tensor] = torch.empty
    ranks = torch.full((slots,), rank, dtype=torch.int32) if has_ranks else None
    return LoraCall(
        [empty(rows, width, dtype=output or dtype) for width in widths],
        empty(rows, features, dtype=dtype),
        [empty(slots, rank, features, dtype=dtype) for _ in widths],
        [empty(slots, rank, width, dtype=dtype).transpose(1, 2) for width in widths],
        RowRouting(torch.zeros(rows, dtype=torch.int64), slots, ranks),
        tuple(range(len(widths))),
        (0,) * len(widths),
        0.5,
    )


def _runs() -> Iterator[Callable[[], None]]:
    """What is run of the kernel `triton`."""
    kernel = Triton()
    for dtype, rows, rank in itertools.product(DTYPES.values(), ROWS, RANKS):
        for features in FEATURES:
            yield partial(kernel.add_lora, lora_call(rows, rank, dtype, features))
    for dtype, rows, rank in itertools.product(DTYPES.values(), (8, 2048), RANKS):
        yield partial(kernel.add_lora, lora_call(rows, rank, dtype, has_ranks=False))
        # Of one width, so that B can be read in blocks.
        yield partial(kernel.add_lora, lora_call(rows, rank, dtype, widths=(1024, 1024)))
        # Columns that two slices share are summed in fp32.
        yield partial(kernel.add_lora, lora_call(rows, rank, dtype, output=torch.float32))
        call, hidden = lora_call(rows, rank, dtype, widths=(1024,)), torch.empty(rows, rank)
        yield partial(kernel.shrink, replace(call, outputs=[hidden], lora_b=[]))
        for inputs, add in itertools.product((hidden, hidden.to(dtype)), (True, False)):
            yield partial(kernel.expand, replace(call, inputs=inputs, lora_a=[], add=add))


def _runs_of_routing() -> Iterator[Callable[[], object]]:
    """What routes rows among so many slots that they are pages of experts."""
    for rows, slots in ((300, 100_000), (20_000, 1_000)):
        yield partial(route, torch.zeros(rows, dtype=torch.int64), slots)
    # Which lie group by group.
    groups = Groups(torch.zeros(1_100, dtype=torch.int32), torch.zeros(1_100, dtype=torch.int64))
    yield partial(route, torch.zeros(20_000, dtype=torch.int64), 1_000, groups)


def _gradients(call: LoraCall, scalings: Tensor | None, slots: Tensor | None) -> None:
    """Ask for all gradients of a call, of all slots or of some."""
    places = call.slice_outputs, call.slice_offsets, call.scaling
    operands = call.outputs, call.inputs, call.lora_a, call.lora_b, call.routing.indices, *places
    backward(triton_launch._launch, *operands, scalings, slots, True, True)


def _training(call: LoraCall) -> None:
    """Ask for both passes of a call that trains two slots in its first slice."""
    launch, scalings, slots = triton_launch._launch, torch.ones(8), torch.tensor([1, 5])
    indices, tiles = call.routing.indices, training_tiles(triton_launch._launch, call.routing.indices, 8)
    operands = call.inputs, call.lora_a, call.lora_b, indices
    result, kept = forward(launch, call.outputs, *operands, scalings, tiles)
    backward(launch, [result], *operands, [0], [0], 1.0, scalings, slots, True, True, tiles, kept)


def _runs_of_gradients() -> Iterator[Callable[[], None]]:
    for dtype, rank, features in itertools.product(DTYPES.values(), RANKS, (4096, 1001)):
        yield partial(_gradients, lora_call(300, rank, dtype, features), None, None)
        yield partial(_training, lora_call(300, rank, dtype, features, widths=(1024,)))


@cache
def every_launch() -> dict[str, list[Launch]]:
    """The launches by kernel and dtype, "shrink_kernel, bf16": one for each set of constants and dtypes."""
    found: dict[Any, tuple[str, Launch]] = {}
    for run in (*_runs(), *_runs_of_routing(), *_runs_of_gradients()):
        for launch in launches_of(run):
            key = launch.kernel, str(launch.constants()), str([_dtype(operand) for operand in launch.operands])
            found.setdefault(key, (_group(launch), launch))
    groups: dict[str, list[Launch]] = {}
    for group, launch in found.values():
        groups.setdefault(group, []).append(launch)
    return groups


def _dtype(operand: Any) -> Any:
    """The dtypes of tensors; of numbers their type."""
    if isinstance(operand, tuple):
        return [_dtype(part) for part in operand]
    return operand.dtype if isinstance(operand, Tensor) else type(operand)


def _group(launch: Launch) -> str:
    """The kernel, and the dtype of A or B, or of their gradients."""
    weights = {"shrink_kernel": "a", "expand_kernel": "b", "inputs_gradient_kernel": "a"}
    name = weights.get(launch.kernel, "target" if launch.kernel == "weights_gradient_kernel" else "")
    operand = launch.operand(name) if name else ()
    dtypes = [part.dtype for part in (operand if isinstance(operand, tuple) else (operand,))][:1]
    return ", ".join([launch.kernel, *(name for name, dtype in DTYPES.items() if dtype in dtypes)])
