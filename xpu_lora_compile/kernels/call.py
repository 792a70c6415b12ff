"""`LoraCall`, an addition of LoRA on its way from an op to a kernel, and `Kernel`, what runs it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.kernels.routing import RowRouting


@dataclass(slots=True, eq=False)
class LoraCall:
    """`outputs[o][t, columns of s] += B_s[i] @ (scaling * A_s[i] @ inputs[t])` for each slice s, rounded once.

    Where the routing has weights, it is the sum of that over the M adapters of a row, each times its weight.
    The passes ask with the fake tensors of a graph, ops with those that they were given.

    Attributes:
        outputs: `[T, H]` each, changed in place.
        inputs: `[T, D]`; of a call that only expands `[T, R]`.
        lora_a: for each slice, A `[K, R, D]`; none for a call that only expands.
        lora_b: for each slice, B `[K, W, R]`; none for a call that only shrinks.
        routing: of the T rows among K slots.
        slice_outputs: for each slice, its output's position in `outputs`.
        slice_offsets: for each slice, its first column there.
        scaling: factor on what A makes of the inputs.
        add: whether to add to the output; if false, a call that only expands replaces it.
    """

    outputs: Sequence[Tensor]
    inputs: Tensor
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    routing: RowRouting
    slice_outputs: Sequence[int] = (0,)
    slice_offsets: Sequence[Any] = (0,)
    scaling: float = 1.0
    add: bool = True

    @property
    def device(self) -> str:
        """The type of the device: "cpu", "cuda", "xpu"."""
        return self.inputs.device.type

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """All tensors but the indices."""
        return (*self.outputs, self.inputs, *self.lora_a, *self.lora_b)

    @property
    def is_whole(self) -> bool:
        """Whether it both shrinks and expands."""
        return bool(self.lora_a) and bool(self.lora_b)

    @property
    def columns(self) -> list[Tensor]:
        """The columns that each slice adds to, `[T, W]`."""
        places = zip(self.lora_b, self.slice_outputs, self.slice_offsets, strict=True)
        return [self.outputs[position].narrow(1, offset, b.shape[1]) for b, position, offset in places]

    def shared_outputs(self) -> set[int]:
        """The positions of outputs some of whose columns two slices add to; the offsets must be known."""
        if len(self.lora_b) < 2:
            return set()
        spans = sorted(
            (position, offset, offset + b.shape[1])
            for b, position, offset in zip(self.lora_b, self.slice_outputs, self.slice_offsets, strict=True)
        )
        return {
            position
            for (position, _, end), (other, start, _) in itertools.pairwise(spans)
            if position == other and start < end
        }

    def one_by_one(self) -> Iterator[LoraCall]:
        """The same, a call for each slice."""
        for a, b, output, offset in zip(self.lora_a, self.lora_b, self.slice_outputs, self.slice_offsets, strict=True):
            yield replace(self, lora_a=[a], lora_b=[b], slice_outputs=[output], slice_offsets=[offset])


class Kernel:
    """One way to run calls: a file of its own, an entry in `KERNELS`, a test file.

    Attributes:
        name: what `force_kernel` and XPU_LORA_KERNEL call it.
        devices: the types of devices that it is made for; empty for all.
        by_force_alone: why nothing but force takes it; empty for a kernel that may be chosen.
        op: the op of `torch.ops.xpu_lora` that `lower` emits for it: "add_lora" asks for a kernel when it runs.
        visible_ops: the ops that `lower` emits where the compiler is to launch the kernels itself, by the names of the
            internal ones that they stand for: "add_lora", "shrink", "expand", "expand_slice".
        visible_prepares: for those, what `prepares` is for the others.
        prepares: the op whose results all its calls of one graph share, made of the indices and K; empty for none.
            `op` gets them as the arguments of the same names.
        needs_plain_slices: whether `op` takes offsets that are known while compiling, and slices that share no
            columns: it leaves both checks to `lower`.
        needs_whole_stacks: whether B must lie in memory as a whole for all sizes of a graph.
        takes_wholes: whether `op` takes tensors that reach further than the call: indices whose first T count, and
            `packed`, whose columns are all A and then all B.
        takes_several: whether it runs calls whose rows have several adapters each, with weights; if so, `op` has an
            argument `adapter_weights`.
        reads_ranks: whether it makes use of the rank of each slot's adapter.
        ranks_of_b_together_on: the types of devices on which it reads B fastest as `[K, W, R]`, contiguous; elsewhere
            it does so with the columns of one rank side by side.
        ops_without_python: those of `op`, `visible_ops` and the like that a program may hold which leaves this process
            for one without Python: the compiler makes launches of them, or they are in the library that `library`
            names.
        shrink_op: what `lower` emits in such a program for a shrink alone, with the arguments of `xpu_lora::shrink`.
        expand_op: the same for an expand alone, with those of `xpu_lora::expand_slice`.
        computes_base_on: the types of devices on which it can compute base products with their LoRA, by
            `linear_with_lora`.
        rounds_before_adding: whether it rounds a slice's LoRA to the output's dtype before it adds it, besides the sum.
    """

    name: str
    devices: tuple[str, ...] = ()
    by_force_alone: str = ""
    op: str = "add_lora"
    prepares: str = "route"
    visible_ops: Mapping[str, str] = MappingProxyType({})
    visible_prepares: str = ""
    needs_plain_slices: bool = False
    needs_whole_stacks: bool = False
    takes_wholes: bool = False
    takes_several: bool = False
    reads_ranks: bool = False
    ranks_of_b_together_on: tuple[str, ...] = ()
    ops_without_python: frozenset[str] = frozenset()
    shrink_op: str = "shrink"
    expand_op: str = "expand_slice"
    computes_base_on: tuple[str, ...] = ()
    rounds_before_adding: bool = False

    def problem(self, device: str) -> str:
        """Return why it cannot run on this machine's devices of a type; empty where it can."""
        return (
            ""
            if not self.devices or device in self.devices
            else f"it is for {' and '.join(self.devices)}, not for {device}"
        )

    def refusal(self, call: LoraCall) -> str:
        """Return which of its rules a call breaks, for all sizes of a graph; empty if none."""
        return ""

    def library(self) -> Path | None:
        """Return the library that its ops need in a process without Python; None where they need none."""
        return None

    def options(self) -> dict[str, Any]:
        """Return the arguments of `op` and of `prepares` that are the kernel's own, by name."""
        return {}

    def visible_refusal(self, call: LoraCall) -> str:
        """Return why `visible_ops` cannot run a call for all sizes of a graph; empty if they can."""
        return "" if self.visible_ops else f"{self.name} has no kernels that a compiler could launch"

    def visible_options(self, call: LoraCall) -> dict[str, Any]:
        """As `options`, of `visible_ops` and `visible_prepares` for this call."""
        return {}

    def add_lora(self, call: LoraCall) -> None:
        """Run a call that is whole and whose slices share no columns."""
        raise NotImplementedError(self.name)

    def shrink(self, call: LoraCall) -> None:
        """Write `scaling * A[i] @ inputs[t]` into the first R columns of the output; 0 where `i` is no slot."""
        raise NotImplementedError(self.name)

    def expand(self, call: LoraCall) -> None:
        """Write or add `B[i] @ inputs[t]` into the output, `[T, W]`; rows whose `i` is no slot keep their value."""
        raise NotImplementedError(self.name)

    def linear_with_lora(
        self, call: LoraCall, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Return the base products `inputs @ weight.T + bias` with the call's LoRA, which has no outputs yet."""
        outputs = [torch.nn.functional.linear(call.inputs, *pair) for pair in zip(weights, biases, strict=True)]
        self.add_lora(replace(call, outputs=outputs))
        return outputs


def accumulator(*operands: Tensor) -> torch.dtype:
    """Return the dtype to accumulate in: float32, or float64 as soon as one operand is."""
    return torch.float64 if torch.float64 in [operand.dtype for operand in operands] else torch.float32


def repeated(rows: Tensor, times: int) -> Tensor:
    """Return `[T * times, columns]`: each row so many times, one after another."""
    if times == 1:
        return rows
    return rows.unsqueeze(1).expand(-1, times, -1).reshape(rows.shape[0] * times, rows.shape[1])


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Keep autocast from rounding products otherwise than the contract says; entered only where it is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
