"""The kernels, in order of preference: the first that does not refuse a call runs it.

On a CPU one native call was the fastest at all 90 points that were measured, on CUDA Triton at all 40; so there is
nothing to choose by sizes. Asking takes about a microsecond, when an op runs and while a graph is compiled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from xpu_lora_compile.errors import KernelError
from xpu_lora_compile.kernels import native, replay, triton_launch
from xpu_lora_compile.kernels.call import Kernel, LoraCall, accumulator
from xpu_lora_compile.kernels.ipex import Ipex
from xpu_lora_compile.kernels.native import Native
from xpu_lora_compile.kernels.portable import Gather, Grouped
from xpu_lora_compile.kernels.routing import RowRouting
from xpu_lora_compile.kernels.triton_launch import Triton
from xpu_lora_compile.kernels.vendor import Vendor
from xpu_lora_compile.torch_internals import number_of

KERNELS: tuple[Kernel, ...] = (Vendor(), Native(), Triton(), Grouped(), Gather(), Ipex())


@dataclass(frozen=True)
class Choice:
    """A kernel, why it was taken, and why each of the others was not."""

    kernel: Kernel
    because: str
    others: Mapping[str, str]


def kernel_for(call: LoraCall) -> Kernel:
    """Return the kernel that runs a call.

    Raises:
        KernelError: the forced kernel is none, or refuses the call.
    """
    forced = forced_kernel()
    if forced is not None:
        return choice_for(call).kernel
    for kernel in _candidates(call.device):
        if not refusal_of(kernel, call):
            return kernel
    raise AssertionError("gather refuses nothing")


@cache
def _candidates(device: str) -> tuple[Kernel, ...]:
    """The kernels that may be chosen on a type of device."""
    return tuple(
        kernel
        for kernel in KERNELS
        if not kernel.by_force_alone and (not kernel.devices or device in kernel.devices or not kernel.problem(device))
    )


def choice_for(call: LoraCall) -> Choice:
    """Return the same, with reasons.

    Raises:
        KernelError: the forced kernel is none, or refuses the call.
    """
    forced = forced_kernel()
    refused = {kernel.name: why for kernel in KERNELS if (why := refusal_of(kernel, call))}
    able = [kernel for kernel in KERNELS if kernel.name not in refused]
    if forced is not None:
        chosen = kernel_named(forced)
        if forced in refused:
            raise KernelError(
                "forced kernel",
                "one that can run this call",
                f"{forced!r}, which cannot: {refused[forced]}",
                f"Force none, or one of {', '.join(kernel.name for kernel in able)}.",
            )
        return Choice(chosen, "it was forced", _others(chosen, refused, "another was forced"))
    chosen = next(kernel for kernel in able if not kernel.by_force_alone)
    return Choice(
        chosen, "it is the first that takes this call", _others(chosen, refused, f"{chosen.name} comes first")
    )


def _others(chosen: Kernel, refused: Mapping[str, str], otherwise: str) -> dict[str, str]:
    return {
        kernel.name: refused.get(kernel.name) or kernel.by_force_alone or otherwise
        for kernel in KERNELS
        if kernel is not chosen
    }


def refusal_of(kernel: Kernel, call: LoraCall) -> str:
    """Return why a kernel cannot run a call here; empty if it can."""
    if why := kernel.problem(call.device):
        return why
    if call.routing.adapter_weights is not None and not kernel.takes_several:
        return "it takes one adapter for a row"
    return kernel.refusal(call)


def preferred_on(device: str) -> Kernel:
    """Return the kernel that a type of device is made ready for: the forced one, or the first that is for it."""
    forced = forced_kernel()
    if forced is not None:
        return kernel_named(forced)
    return next(kernel for kernel in KERNELS if not kernel.devices or device in kernel.devices)


def rounds_before_adding(device: str) -> bool:
    """Return whether the kernel that comes first on a type of device does, so that its calls may."""
    kernel = preferred_on(device)
    return kernel.rounds_before_adding and not kernel.problem(device)


def reads_ranks(device: str) -> bool:
    """Return whether a kernel for a type of device makes use of the ranks of the slots."""
    return any(kernel.reads_ranks and device in kernel.devices for kernel in KERNELS)


def computes_base(device: str) -> bool:
    """Return whether a kernel for a type of device can compute base products with their LoRA."""
    return any(device in kernel.computes_base_on for kernel in KERNELS)


def kernel_named(name: str) -> Kernel:
    """Return the kernel of a name.

    Raises:
        KernelError: there is none.
    """
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    names = ", ".join(kernel.name for kernel in KERNELS)
    raise KernelError("forced kernel", f"one of {names}", repr(name), "Pass one of these names.")


# Read once: asking the environment takes longer than all else that a choice costs.
_FORCED: ContextVar[str | None] = ContextVar("forced", default=os.environ.get("XPU_LORA_KERNEL") or None)

forced_kernel = _FORCED.get


@contextmanager
def force_kernel(kernel: str) -> Iterator[None]:
    """Have calls in the block run on one kernel; the environment variable XPU_LORA_KERNEL does it for a process.

    Calls that run eagerly, or that are compiled in the block. Code that was compiled before may keep its kernel, as
    nothing guards this: compile in the block, or set the variable.

    Args:
        kernel: the name of one of `KERNELS`, such as "native" or "gather"; docs/kernels.md has a table of them.

    Raises:
        KernelError: there is no such kernel. A call that it cannot run raises it, too.
    """
    kernel_named(kernel)
    token = _FORCED.set(kernel)
    try:
        with replay.paused():
            yield
    finally:
        _FORCED.reset(token)


def takes_native(output: Tensor) -> bool:
    """Return whether an eager call on this output may go to the native kernel without more questions."""
    return output.device.type == "cpu" and forced_kernel() is None and not native.warned_problem()


def takes_triton_backward(
    grads: Sequence[Tensor], inputs: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]
) -> bool:
    """Return whether the Triton kernels compute the gradients of a call, for all sizes of a graph."""
    device, forced = inputs.device.type, forced_kernel()
    # On a CPU the interpreter runs them, where Triton is forced.
    is_asked = forced == Triton.name if forced else device in Triton.devices
    if not is_asked or triton_launch.problem(device):
        return False
    sizes = [size for stack in (*lora_a, *lora_b) for size in (*stack.shape, *stack.stride())]
    columns = [number_of(rows.shape[1]) for rows in (inputs, *grads)]
    return (
        accumulator(*grads, inputs, *lora_a, *lora_b) is torch.float32
        and len({len(a) for a in lora_a}) == 1
        and all(isinstance(size, int) for size in sizes)
        and None not in columns
    )


def add_lora(call: LoraCall) -> None:
    """Run a whole call: columns that two slices share are rounded once, after both.

    Raises:
        KernelError: the forced kernel is none, or refuses the call.
    """
    shared = call.shared_outputs()
    if not shared:
        kernel_for(call).add_lora(call)
        return
    dtype = accumulator(*call.operands)
    sums = [output.to(dtype) if position in shared else output for position, output in enumerate(call.outputs)]
    for part in replace(call, outputs=sums).one_by_one():
        kernel_for(part).add_lora(part)
    for position in shared:
        call.outputs[position].copy_(sums[position])


def linear_with_lora(call: LoraCall, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the base products `inputs @ weight.T + bias` with a whole call's LoRA: in one kernel, or side by side.

    Args:
        call: without outputs, which are the products.
        weights: of each base product, `[H, D]`.
        biases: of each base product, `[H]` or None.
    """
    if not call.shared_outputs():
        return kernel_for(call).linear_with_lora(call, weights, biases)
    outputs = [torch.nn.functional.linear(call.inputs, *pair) for pair in zip(weights, biases, strict=True)]
    add_lora(replace(call, outputs=outputs))
    return outputs


def slot_products(inputs: Tensor, weights: Tensor, routing: RowRouting) -> Tensor:
    """Return `weights[i] @ inputs[t]` of every row, `[T, rows]`, accumulated in fp32; arbitrary where `i` is no slot.

    Args:
        inputs: `[T, columns]`.
        weights: `[K, rows, columns]`, any strides.
        routing: of the T rows among K slots.
    """
    forced = forced_kernel()
    if forced is not None and kernel_named(forced).by_force_alone:
        wanted = "one that computes gradients"
        raise KernelError("forced kernel", wanted, repr(forced), "Force none for a backward pass.")
    result = inputs.new_empty(len(inputs), weights.shape[1], dtype=accumulator(inputs, weights))
    call = LoraCall([result], inputs, [weights], [], routing)
    kernel_for(call).shrink(call)
    return result
