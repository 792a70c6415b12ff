"""The C++ kernel for CPUs: `native_kernels.h` does the work, and `native.cpp` makes ops of it.

They are compiled when first needed (GCC 12, Clang 15 or newer; 10 to 25 s): see `compiled`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.errors import KernelError
from xpu_lora_compile.kernels import compiled
from xpu_lora_compile.kernels.call import Kernel, LoraCall, accumulator
from xpu_lora_compile.torch_internals import has_kernel_for, schema_of

_HERE = Path(__file__).parent
_SOURCES = (_HERE / "native.cpp", _HERE / "native_backward.h", _HERE / "native_kernels.h", _HERE / "native_tiles.h")
# -O3 unrolls the loops over registers: with -O2 the sums are spilled, and it takes twice the time (GCC 12, AVX2).
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp")

_LIBRARY = torch.library.Library("xpu_lora", "FRAGMENT")
# Of the ops below. The library is given them, too: it defines the ops itself where no Python has.
_SCHEMAS: list[str] = []
# Inductor may lay the operands out as it likes: any strides are fine here, and so no operand is ever copied for us.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_OPERANDS = "Tensor(a!) output, Tensor inputs, Tensor weights, Tensor indices"
_LISTS = (
    "Tensor(a!)[] outputs, Tensor inputs, Tensor[] lora_a, Tensor[] lora_b, Tensor indices, "
    "int[] slice_outputs, int[] slice_offsets, float scaling"
)


def problem() -> str:
    """Why this kernel cannot run on this machine; empty where it can, which takes some 25 s the first time."""
    return _compiled().problem


@cache
def warned_problem() -> str:
    """The same, for good, with a warning."""
    why = problem()
    if why:
        warnings.warn(f"xpu_lora: the fast CPU kernel is not used: {why}. Plain PyTorch runs instead.", stacklevel=2)
    return why


class Native(Kernel):
    """One parallel region for all slices and outputs, rows sorted inside, each slot's weights read once.

    The op that `lower` emits sorts rows in less time than an op takes to call, so that nothing is prepared.
    """

    name = "native"
    devices = ("cpu",)
    op = "native_add_lora"
    prepares = ""
    needs_plain_slices = True
    takes_wholes = True
    takes_several = True
    shrink_op = "native_shrink"
    expand_op = "native_expand"
    ops_without_python = frozenset({op, shrink_op, expand_op})

    def problem(self, device: str) -> str:
        """As `Kernel.problem`; warns the first time that there is one on a CPU."""
        return warned_problem() if device == "cpu" else super().problem(device)

    def refusal(self, call: LoraCall) -> str:
        """As `Kernel.refusal`."""
        return "it computes in float32" if accumulator(*call.operands) is torch.float64 else ""

    def library(self) -> Path | None:
        """As `Kernel.library`."""
        return library()

    def add_lora(self, call: LoraCall) -> None:
        """As `Kernel.add_lora`."""
        stacks = call.lora_a, call.lora_b
        places = call.slice_outputs, call.slice_offsets
        operands = call.outputs, call.inputs, *stacks, call.routing.indices, *places, call.scaling
        weights = call.routing.adapter_weights
        _must(TRY_ADD_LORA(*operands) if weights is None else TRY_ADD_SEVERAL(*operands, weights))

    def shrink(self, call: LoraCall) -> None:
        """As `Kernel.shrink`."""
        _must(TRY_SHRINK(call.outputs[0], call.inputs, call.lora_a[0], call.routing.indices, call.scaling))

    def expand(self, call: LoraCall) -> None:
        """As `Kernel.expand`."""
        weights = call.lora_b[0]
        operands = call.outputs[0], call.inputs, weights, call.routing.indices
        _must(TRY_EXPAND(*operands, 0, weights.shape[1], call.add))


def _must(done: bool) -> None:
    if not done:
        raise KernelError(
            "native kernel",
            "operands that were checked",
            "some that do not fit",
            "Pass the shapes and dtypes that the public ops take.",
        )


def scratch_bytes(rows: int, ranks: int, widest: int) -> int:
    """What a call holds at most besides its operands: the rank vectors, and for each thread 512 columns of a slot's B.

    Args:
        rows: T.
        ranks: R of all slices together.
        widest: the highest R.
    """
    return 4 * (rows * ranks + torch.get_num_threads() * 512 * widest)


def library() -> Path | None:
    """Return the file that the ops' kernels are in; None where `problem` says why there is none."""
    return _compiled().path


def load_library(file: Path) -> None:
    """Take the ops' kernels from a library that was compiled elsewhere, unless they are there already."""
    if not has_kernel_for(f"xpu_lora::{_SCHEMAS[0].split('(', 1)[0]}", "CPU"):
        torch.ops.load_library(file)


def _compiled() -> compiled.Loaded:
    flags = *_FLAGS, f"-DXPU_LORA_SCHEMAS={','.join(map(json.dumps, _SCHEMAS))}"
    return compiled.load("native", _SOURCES, flags, os.environ.get("CXX"))


# Whether the library has been asked for, and an op been called anew.
_AGAIN: ContextVar[bool] = ContextVar("again", default=False)


def _define(schema: str, fake: Any = None) -> Any:
    """An op that loads the library when it is first called, say by code that Inductor had cached."""
    name = schema.split("(", 1)[0]
    tries = schema.endswith("bool")

    def load_and_call_again(*args: Any) -> Any:
        if not _AGAIN.get():
            if why := problem():
                remedy = "Mend it, or compile the model without the cache."
                raise KernelError(f"xpu_lora::{name}", "a compiler", why, remedy)
            token = _AGAIN.set(True)
            try:
                return op(*args)
            finally:
                _AGAIN.reset(token)
        # Tensors elsewhere, sparse ones and the like, for which the library has nothing.
        if not tries:
            raise KernelError(f"xpu_lora::{name}", "dense tensors on the CPU", "others", "Compile anew.")
        return False

    _SCHEMAS.append(schema)
    # Else a library that was loaded before has defined it, in the same way.
    if schema_of(f"xpu_lora::{name}") is None:
        _LIBRARY.define(schema, tags=_TAGS)
        # The gradient of a changed output passes through as it is; whoever calls has refused any other.
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    op: Any = getattr(torch.ops.xpu_lora, name).default
    _LIBRARY.impl(name, load_and_call_again, "CompositeExplicitAutograd")
    torch.library.register_fake(f"xpu_lora::{name}", fake or (lambda *_: False if tries else None), lib=_LIBRARY)
    return op


# For up to three slices, its output[t, its columns] += B[i] @ (scaling * A[i] @ inputs[t]), no two of which share
# columns; its output is the first where it is None, and no other is given twice. Nothing is in a list, since to unpack
# lists is a good part of what a call takes besides its products.
_ADD_SLICES = _define(
    "native_add_slices(Tensor(a!) output, Tensor(b!)? output_1, Tensor(c!)? output_2, Tensor inputs, Tensor a, "
    "Tensor b, Tensor? a_1, Tensor? b_1, Tensor? a_2, Tensor? b_2, Tensor indices, int offset, int offset_1, "
    "int offset_2, float scaling) -> ()"
)

# The same for slices side by side from the first column of one output on, whose weights are the columns of one tensor
# `[K, R, S D + W_1 + ... + W_S]`, perhaps with vLLM's 1: of the S slices A, and then B. Width 0 is that of no slice.
_ADD_PACKED = _define(
    "native_add_packed(Tensor(a!) output, Tensor inputs, Tensor packed, Tensor indices, int width, int width_1, "
    "int width_2, float scaling) -> ()"
)


def _add_lora(
    outputs: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float,
    packed: Tensor | None = None,
    adapter_weights: Tensor | None = None,
) -> None:
    if adapter_weights is not None:
        places = slice_outputs, slice_offsets
        NATIVE_ADD_SEVERAL(outputs, inputs, lora_a, lora_b, indices, *places, scaling, adapter_weights)
        return
    if packed is not None:
        widths = [b.shape[-2] for b in lora_b]
        _ADD_PACKED(outputs[0], inputs, packed, indices, *widths, *(0 for _ in range(3 - len(widths))), scaling)
        return
    calls: list[list[int]] = [[0]]
    for s, to in enumerate(slice_outputs[1:], start=1):
        first, *others = [slice_outputs[earlier] for earlier in calls[-1]]
        if len(others) == 2 or (to != first and to in others):
            calls.append([])
        calls[-1].append(s)
    for call in calls:
        missing: list[Any] = [None] * (3 - len(call))
        (a, a_1, a_2), (b, b_1, b_2) = ((*(stacks[s] for s in call), *missing) for stacks in (lora_a, lora_b))
        first, *others = [slice_outputs[s] for s in call]
        outputs_after = (*(None if to == first else outputs[to] for to in others), *missing)
        offsets = (*(slice_offsets[s] for s in call), *(0 for _ in missing))
        _ADD_SLICES(outputs[first], *outputs_after, inputs, a, b, a_1, b_1, a_2, b_2, indices, *offsets, scaling)


# Any number of slices, and the tensor of which they are the columns, if they are; or with weights the sum over the M
# adapters of a row. Composite: one call in the graph that our passes see, and the ops above, or NATIVE_ADD_SEVERAL, in
# the one that Inductor gets.
_LIBRARY.define(f"native_add_lora({_LISTS}, Tensor? packed=None, Tensor? adapter_weights=None) -> ()", tags=_TAGS)
_LIBRARY.impl("native_add_lora", _add_lora, "CompositeImplicitAutograd")
NATIVE_ADD_LORA = torch.ops.xpu_lora.native_add_lora.default

# The same for eager calls, and the two halves of it: they check all that the contract asks for, and return false, with
# nothing done, for a call that it does not allow or that is not for this kernel. To autograd they are writes.
TRY_ADD_LORA = _define(f"native_try_add_lora({_LISTS}) -> bool")
# output[t, :R] = scaling * A[i] @ inputs[t]; rows whose i is no slot become 0.
TRY_SHRINK = _define(f"native_try_shrink({_OPERANDS}, float scaling) -> bool")
# output[t, offset : offset + columns] (+)= (B[i] @ inputs[t])[:columns]; rows whose i is no slot keep their value.
TRY_EXPAND = _define(f"native_try_expand({_OPERANDS}, int offset, int columns, bool add) -> bool")

# The two halves for programs that run without Python, where nothing else could run a call that they refuse.
NATIVE_SHRINK = _define(f"native_shrink({_OPERANDS}, float scaling) -> ()")
NATIVE_EXPAND = _define(f"native_expand({_OPERANDS}, int offset, int columns, bool add) -> ()")

# As TRY_ADD_LORA for rows with several adapters: indices and weights are `[T, M]`; and the same for compiled code.
TRY_ADD_SEVERAL = _define(f"native_try_add_several({_LISTS}, Tensor adapter_weights) -> bool")
NATIVE_ADD_SEVERAL = _define(f"native_add_several({_LISTS}, Tensor adapter_weights) -> ()")

# As `native_try_add_lora`, where each slot's rank vectors have a factor of their own besides, `[K]`, float32.
TRY_ADD_SCALED = _define(f"native_try_add_scaled({_LISTS}, Tensor scalings) -> bool")


def fake_backward(
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
    *_: object,
) -> list[Tensor]:
    """Return what NATIVE_BACKWARD returns, in shapes, dtypes and strides."""
    made = [inputs.new_empty(inputs.shape)] if needs_inputs else []
    if not needs_weights:
        return made
    if slots is None:
        return [*made, *map(torch.empty_like, (*lora_a, *lora_b))]
    made += [a.new_empty(len(slots), *a.shape[-2:]) for a in lora_a]
    return made + [b.new_empty(len(slots), b.shape[-1], b.shape[-2]) for b in lora_b]


# Gradients of `lora_linear`: of the inputs if they are wanted, then of each A and of each B if they are wanted; or of n
# `slots` alone, each once: of A `[n, R, D]`, and of B turned, `[n, R, W]`.
BACKWARD_OPERANDS = (
    "Tensor[] grads, Tensor inputs, Tensor[] lora_a, Tensor[] lora_b, Tensor indices, int[] slice_outputs, "
    "int[] slice_offsets, float scaling, Tensor? scalings, Tensor? slots, bool needs_inputs, bool needs_weights"
)
NATIVE_BACKWARD = _define(f"native_backward({BACKWARD_OPERANDS}) -> Tensor[]", fake_backward)
