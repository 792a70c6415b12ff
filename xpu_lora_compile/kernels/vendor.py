"""The ops of vllm-xpu-kernels for Intel GPUs, `torch.ops._xpu_C`: which are there, and where their rules hold.

Schemas and rules are those of release 0.1.16.2. An op counts as there if its name and its schema are the known ones,
whatever the version says. None of this has been run on an Intel GPU. To an output of float16 or bfloat16 they add what
they have rounded to its dtype.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.errors import KernelError
from xpu_lora_compile.kernels.call import Kernel, LoraCall
from xpu_lora_compile.torch_internals import has_fake, hint_of, is_guarded, is_known, schema_of

PACKAGE = "vllm-xpu-kernels"
# What each op takes; `!` is what it writes to.
_KNOWN = {
    "bgmv_shrink": ("Tensor!", "Tensor", "Tensor", "Tensor", "float"),
    "bgmv_expand_slice": ("Tensor!", "Tensor", "Tensor", "Tensor", "int", "int", "bool"),
    "lora_shrink": ("Tensor", "List[Tensor]", "Tensor!", "Tensor", "float"),
    "lora_expand": ("Tensor", "List[Tensor]", "Tensor!", "Tensor", "int", "bool"),
}
# For all slices in one launch, and for one slice each; the first that is there is taken.
FAMILIES = {"lora": ("lora_shrink", "lora_expand"), "bgmv": ("bgmv_shrink", "bgmv_expand_slice")}
MOST_SLICES = 8
# Their index arithmetic is of 32 bits.
MOST_ELEMENTS = 2**31


class Vendor(Kernel):
    """All slices in one launch each way, or one slice each where an older release is there."""

    name = "vendor"
    devices = ("xpu",)
    op = "vendor_add_lora"
    prepares = "valid_slots"
    needs_plain_slices = True
    needs_whole_stacks = True
    ranks_of_b_together_on = ("xpu",)
    rounds_before_adding = True

    def problem(self, device: str) -> str:
        """As `Kernel.problem`."""
        return super().problem(device) or family()[1].replace("it ", f"{PACKAGE} ", 1)

    def refusal(self, call: LoraCall) -> str:
        """As `Kernel.refusal`."""
        if not call.is_whole:
            return "it takes calls that both shrink and expand"
        if call.routing.tiles is not None:
            return "the graph was compiled for Triton"
        written = [call.outputs[position] for position in call.slice_outputs]
        return refusal(family()[0], written, call.inputs, call.lora_a, call.lora_b, call.routing.indices)

    def options(self) -> dict[str, Any]:
        """As `Kernel.options`: which family of ops to call, and whether it wants int32."""
        kind = family()[0]
        return {"kind": kind, "narrow": kind == "lora"}

    def add_lora(self, call: LoraCall) -> None:
        """As `Kernel.add_lora`; no weight is copied."""
        kind, stacks = family()[0], (call.lora_a, call.lora_b)
        slots = valid_slots(call.routing.indices, call.routing.slots, kind == "lora")
        places = call.slice_outputs, call.slice_offsets
        add_lora(kind, call.outputs, call.inputs, *stacks, slots, *places, call.scaling)


def valid_slots(indices: Tensor, slots: int, narrow: bool) -> Tensor:
    """Return the indices as the ops want them, -1 wherever there is no slot.

    Args:
        indices: `[T]`.
        slots: K.
        narrow: whether as int32, for "lora"; else int64.
    """
    is_none = (indices < 0) | (indices >= slots)
    return indices.masked_fill(is_none, -1).to(torch.int32 if narrow else torch.int64)


def op(name: str) -> torch._ops.OpOverload:
    """An op of theirs that is there, with a fake that says it returns nothing, as they bring none along."""
    _give_fake(name)
    found: torch._ops.OpOverload = getattr(torch.ops._xpu_C, name).default
    return found


def family() -> tuple[str, str]:
    """Which of FAMILIES is there; and if none is, why."""
    reasons = []
    for name, members in FAMILIES.items():
        problems = [problem for member in members if (problem := problem_of(member))]
        if not problems:
            return name, ""
        reasons += problems
    return "", "; ".join(dict.fromkeys(reasons))


def refusal(
    kind: str,
    outputs: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    indices: Tensor,
) -> str:
    """Which rule of a family a call breaks; empty if all hold, for all sizes that the graph is for.

    Args:
        kind: of FAMILIES.
        outputs: of each slice, what its columns belong to, `[T, H]`.
        inputs: `[T, D]`.
        lora_a: of each slice, `[K, R, D]`.
        lora_b: of each slice, `[K, W, R]`, or the leading W rows of a wider stack.
        indices: `[T]`.
    """
    half = (torch.float16, torch.bfloat16)
    weights = [*lora_a, *lora_b]
    if any(stack.dtype not in half for stack in weights):
        return "weights must be float16 or bfloat16"
    if any(matrix.dtype not in (*half, torch.float32) for matrix in (inputs, *outputs)):
        return "inputs and outputs must be float16, bfloat16 or float32"
    if inputs.dtype != torch.float32 and any(a.dtype != inputs.dtype for a in lora_a):
        return "A must have the inputs' dtype"
    if not all(tensor.is_contiguous() for tensor in (inputs, *outputs, indices)):
        return "inputs, outputs and indices must be contiguous"
    if not all(a.is_contiguous() for a in lora_a):
        return "A must be contiguous, [K, R, D]"
    if not all(b.is_contiguous() or leads_a_stack(b) for b in lora_b):
        return (
            "B must be contiguous, [K, W, R], or the leading rows of such a stack, for all sizes of the graph "
            "(`attach` stores it so if the model is on its device)"
        )
    if not all(is_guarded(a.shape[1] == lora_a[0].shape[1]) for a in lora_a):
        return "the slices of a call must have the same rank"
    # A launch for all slices reads them as one type, and nobody says of which slice.
    if kind == "lora" and any(len({stack.dtype for stack in stacks}) > 1 for stacks in (lora_a, lora_b)):
        return "the slices of a call must have the same dtype"
    if kind == "lora" and len(lora_a) > MOST_SLICES:
        return f"at most {MOST_SLICES} slices"
    # Nothing is published about what they make of one.
    if not all(is_guarded(size > 0) for tensor in (inputs, *outputs, *weights) for size in tensor.shape):
        return "no operand may be empty"
    widths = [rows_stored(b) or b.shape[1] for b in lora_b]
    if kind == "bgmv" and not all(is_known(width == hint_of(width)) for width in widths):
        return "W must be known while compiling, since bgmv_expand_slice takes it as an int"
    rows = inputs.shape[0]
    sizes: list[int | torch.SymInt] = [matrix.shape[0] * matrix.shape[1] for matrix in (inputs, *outputs)]
    # The rank vectors of all slices, and what a wider stack is expanded into before it is trimmed.
    sizes += [len(lora_a) * rows * lora_a[0].shape[1], *(rows * rows_stored(b) for b in lora_b)]
    sizes += [stack.shape[0] * (rows_stored(stack) or stack.shape[1]) * stack.shape[2] for stack in weights]
    if not all(is_guarded(size < MOST_ELEMENTS) for size in sizes):
        return "tensors must have less than 2**31 elements"
    return ""


def add_lora(
    kind: str,
    outputs: Sequence[Tensor],
    inputs: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    slots: Tensor,
    slice_outputs: Sequence[int],
    slice_offsets: Sequence[int],
    scaling: float,
) -> None:
    """Run a call by the ops of a family whose rules hold; no weight is copied.

    Args:
        kind: of FAMILIES.
        outputs: `[T, H]` each, changed in place.
        inputs: `[T, D]`.
        lora_a: of each slice, `[K, R, D]` or `[K, 1, R, D]`.
        lora_b: of each slice, `[K, W, R]` or `[K, 1, W, R]`.
        slots: `[T]`: each row's slot, or -1; int32 for "lora", int64 for "bgmv".
        slice_outputs: of each slice, its output's position.
        slice_offsets: of each slice, its first column there.
        scaling: factor on what is added.
    """
    # Slices that lie side by side are one run.
    order = sorted(range(len(lora_a)), key=lambda s: (slice_outputs[s], slice_offsets[s]))
    a, b = [lora_a[s] for s in order], [lora_b[s] for s in order]
    places = [(slice_outputs[s], slice_offsets[s]) for s in order]
    hidden = shrunk(kind, inputs, a, slots, scaling)
    start = 0
    while start < len(b):
        at, offset = places[start]
        stack = _stack(b[start])
        stored = rows_stored(stack)
        end, column = start + 1, offset + b[start].shape[-2]
        while kind == "lora" and not stored and end < len(b) and places[end] == (at, column):
            if rows_stored(_stack(b[end])):
                break
            column += b[end].shape[-2]
            end += 1
        if not (_lies_in_a_stack(stack) if stored else all(stack.is_contiguous() for stack in b[start:end])):
            raise KernelError(PACKAGE, "B stored as the graph said", "another view", "Compile anew.")
        vectors = hidden.narrow(0, start, end - start) if isinstance(hidden, Tensor) else hidden[start:end]
        if stored:
            # All rows that are in memory into a scratch, and those that are wanted from there: once a call, T rows.
            slot_count, width, rank = stack.shape
            whole = stack.as_strided((slot_count, stored, rank), (stored * rank, rank, 1))
            scratch = inputs.new_zeros((inputs.shape[0], stored), dtype=torch.float32)
            expand(kind, scratch, vectors, [whole], slots, 0)
            outputs[at].narrow(1, offset, width).add_(scratch.narrow(1, 0, width))
        else:
            expand(kind, outputs[at], vectors, b[start:end], slots, offset)
        start = end


def shrunk(kind: str, inputs: Tensor, a: Sequence[Tensor], slots: Tensor, scaling: float) -> Tensor | list[Tensor]:
    """Return the rank vectors of each slice, `[T, R]`, fp32; arbitrary in rows without an adapter.

    No op is given a view to write to: in compiled code that has lost the device (vLLM #47944).
    """
    rows, rank = inputs.shape[0], a[0].shape[-2]
    if kind == "lora":
        hidden = inputs.new_empty((len(a), rows, rank), dtype=torch.float32)
        op("lora_shrink")(inputs, a, hidden, slots, scaling)
        return hidden
    # What `bgmv_shrink` adds to must be zeros; `lora_shrink` makes its own.
    vectors = [inputs.new_zeros((rows, rank), dtype=torch.float32) for _ in a]
    for vector, stack in zip(vectors, a, strict=True):
        op("bgmv_shrink")(vector, inputs, stack, slots, scaling)
    return vectors


def expand(
    kind: str, output: Tensor, hidden: Tensor | list[Tensor], b: Sequence[Tensor], slots: Tensor, offset: int
) -> None:
    """Add the LoRA of slices that lie side by side from a column on; of "bgmv" one slice."""
    if kind == "lora":
        op("lora_expand")(hidden, b, output, slots, offset, True)
        return
    for vector, stack in zip(hidden, b, strict=True):
        op("bgmv_expand_slice")(output, vector, stack, slots, offset, stack.shape[-2], True)


def _stack(weights: Tensor) -> Tensor:
    return weights.flatten(0, -3) if weights.dim() > 3 else weights


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all that is in its memory, for all sizes of a graph, if need be thanks to a guard."""
    size = tensor.untyped_storage().nbytes()
    return is_guarded(tensor.storage_offset() == 0) and is_guarded(size == tensor.numel() * tensor.element_size())


def rows_stored(b: Tensor) -> int | torch.SymInt:
    """The rows of each slot in memory, of a B that leads a wider stack; 0 of one that is contiguous."""
    return 0 if b.is_contiguous() else b.stride(0) // b.shape[2]


def leads_a_stack(b: Tensor) -> bool:
    """Whether B is the leading rows of the slots of a wider stack that is contiguous."""
    # torch 2.8 does not know what the slice has guarded.
    return _lies_in_a_stack(b) and is_guarded(rows_stored(b) > b.shape[1])


def _lies_in_a_stack(b: Tensor) -> bool:
    """Whether B has the strides of such a stack, and memory for all of it."""
    slots, _, rank = b.shape
    rules = (
        b.stride(0) == rows_stored(b) * rank,
        b.stride(1) == rank,
        b.stride(2) == 1,
        b.untyped_storage().nbytes() >= (b.storage_offset() + slots * b.stride(0)) * b.element_size(),
    )
    return all(map(is_known, rules))


@cache
def _load() -> str:
    """Have the package register its ops. Return why it cannot, in words that follow its name; empty if it did."""
    if find_spec("vllm_xpu_kernels") is None:
        return "it is not installed"
    try:
        importlib.import_module("vllm_xpu_kernels._xpu_C")
    except Exception as error:  # Whatever a library or driver that is missing or broken makes it raise.
        return f"it cannot be loaded: {type(error).__name__}: {error}"
    return ""


def problem_of(name: str) -> str:
    """Why an op cannot be called: the package or the op is missing, or broken, or another; empty if it can."""
    failure = _load()
    schema = schema_of(f"_xpu_C::{name}")
    if schema is None:
        return f"it has no {name}" if not failure or _any_there() else failure
    given = tuple(
        str(argument.type) + ("!" if argument.alias_info is not None and argument.alias_info.is_write else "")
        for argument in schema.arguments
    )
    return "" if given == _KNOWN[name] and not schema.returns else f"its {name} has another schema: {schema}"


def _any_there() -> bool:
    return any(schema_of(f"_xpu_C::{name}") is not None for name in _KNOWN)


def _give_fake(name: str) -> None:
    if not has_fake(f"_xpu_C::{name}"):
        torch.library.register_fake(f"_xpu_C::{name}", lambda *_: None)
