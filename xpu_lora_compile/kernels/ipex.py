"""The kernels of intel-extension-for-pytorch for CPUs, `torch.ops.torch_ipex.punica_bgmv_*`: for who asks for them.

They take bfloat16 or float16 throughout, and round the rank vector and each product before it is added: the contract
rounds once. So nothing but force takes them (`force_kernel("ipex")`, `XPU_LORA_KERNEL=ipex`). Measured beside the
native kernel they are slower, too: `xpu-lora bench ops --dtype bfloat16`.

Of release 2.8.0, found by running it: the schemas do not say what is written to; shrink replaces; an index that is no
slot reads outside the weights; float32 does nothing; a slice must be as wide as its weights. The package is never
imported here, since that exchanges some of PyTorch's own kernels: that is its user's decision.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from xpu_lora_compile.kernels.call import Kernel, LoraCall
from xpu_lora_compile.torch_internals import schema_of

PACKAGE = "intel_extension_for_pytorch"
# What each op of theirs takes, and returns.
OPS = {
    "punica_bgmv_shrink": "(Tensor _0, Tensor _1, Tensor _2, Tensor _3, float _4) -> Tensor _0",
    "punica_bgmv_expand": "(Tensor _0, Tensor _1, Tensor _2, Tensor _3, bool _4) -> Tensor _0",
}


_WHOSE_FLOAT32 = (
    "the rank vector of an attached layer is float32 wherever our passes do not fuse its two ops: compile with "
    'backend="xpu_lora"'
)


class Ipex(Kernel):
    """What `punica_bgmv_shrink` and `punica_bgmv_expand` compute, one slice after the other."""

    name = "ipex"
    devices = ("cpu",)
    by_force_alone = "it rounds more often than the contract allows: it has to be forced"
    ranks_of_b_together_on = ("cpu",)

    def problem(self, device: str) -> str:
        """As `Kernel.problem`."""
        return super().problem(device) or problem()

    def refusal(self, call: LoraCall) -> str:
        """As `Kernel.refusal`."""
        return refusal(call.outputs, call.inputs, (*call.lora_a, *call.lora_b))

    def add_lora(self, call: LoraCall) -> None:
        """As `Kernel.add_lora`, but the rank vector and each product are rounded to the dtype of the operands."""
        for a, b, columns in zip(call.lora_a, call.lora_b, call.columns, strict=True):
            hidden = call.inputs.new_empty(call.inputs.shape[0], a.shape[1])
            _shrink(hidden, call.inputs, a, call.routing.indices, call.scaling)
            _expand(columns, hidden, b, call.routing.indices, add=True)

    def shrink(self, call: LoraCall) -> None:
        """As `Kernel.shrink`."""
        _shrink(call.outputs[0], call.inputs, call.lora_a[0], call.routing.indices, call.scaling)

    def expand(self, call: LoraCall) -> None:
        """As `Kernel.expand`, but the product is rounded before it is added."""
        _expand(call.outputs[0], call.inputs, call.lora_b[0], call.routing.indices, add=call.add)


def problem() -> str:
    """Why the ops cannot be called; empty if they can."""
    if PACKAGE not in sys.modules:
        return f"{PACKAGE} is not imported" if _is_installed() else f"{PACKAGE} is not installed"
    return "; ".join(why for name in OPS if (why := problem_of(name)))


def problem_of(name: str) -> str:
    """Why one op cannot be called: it is missing, or its schema is another; empty if it can."""
    schema = schema_of(f"torch_ipex::{name}")
    if schema is None:
        return f"it has no {name}"
    return "" if str(schema).endswith(OPS[name]) else f"its {name} has another schema: {schema}"


def refusal(outputs: Sequence[Tensor], inputs: Tensor, weights: Sequence[Tensor]) -> str:
    """Which of their rules these operands break; empty if none.

    Args:
        outputs: `[T, columns]` each.
        inputs: `[T, columns]`.
        weights: `[K, rows, columns]` each.
    """
    if why := problem():
        return why
    dtypes = {tensor.dtype for tensor in (*outputs, inputs, *weights)}
    if dtypes not in ({torch.bfloat16}, {torch.float16}):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        why = f"all operands must be bfloat16, or all float16, not {names}"
        # Nobody passed the float32 that an attached layer computes in.
        is_mixed = torch.float32 in dtypes and len(dtypes) > 1
        return f"{why} ({_WHOSE_FLOAT32})" if is_mixed else why
    if not all(stack.is_contiguous() for stack in weights):
        return "weights must be contiguous, as B is where it was forced before `attach`"
    return ""


def _shrink(output: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, scaling: float) -> None:
    hidden = output.narrow(1, 0, weights.shape[1])
    rows, slots = _with_adapter(indices, len(weights))
    found = inputs.new_empty(len(rows), weights.shape[1])
    # Before anything is written: the output may be the inputs' own memory.
    if len(rows):
        torch.ops.torch_ipex.punica_bgmv_shrink(found, inputs[rows], weights, slots, scaling)
    if len(rows) < len(indices):
        hidden.zero_()
    hidden.index_copy_(0, rows, found)


def _expand(output: Tensor, inputs: Tensor, weights: Tensor, indices: Tensor, add: bool) -> None:
    rows, slots = _with_adapter(indices, len(weights))
    if len(rows) == 0:
        return
    is_apart = output.untyped_storage().data_ptr() != inputs.untyped_storage().data_ptr()
    if len(rows) == len(indices) and output.is_contiguous() and is_apart:
        torch.ops.torch_ipex.punica_bgmv_expand(output, inputs.contiguous(), weights, slots, add)
        return
    values = output[rows]
    torch.ops.torch_ipex.punica_bgmv_expand(values, inputs[rows], weights, slots, add)
    output.index_copy_(0, rows, values)


def _with_adapter(indices: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The rows that have an adapter, and their slots, int64: the ops may be shown no others."""
    rows = ((indices >= 0) & (indices < slots)).nonzero().flatten()
    return rows, indices[rows].long()


@cache
def _is_installed() -> bool:
    return find_spec(PACKAGE) is not None
