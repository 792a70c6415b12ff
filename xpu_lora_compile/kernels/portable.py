"""The kernels of plain PyTorch, for wherever there is no other: `grouped` on a CPU, `gather` anywhere.

Both compute `weights[i] @ inputs[t]` of every row. What a row without an adapter computes is dropped by `torch.where`,
never multiplied by zero, so that NaN in a slot stays in that slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xpu_lora_compile.kernels.call import Kernel, LoraCall, accumulator, repeated, without_autocast
from xpu_lora_compile.kernels.routing import RowRouting

# Numbers of copied weights that `gather` holds at a time: 128 MiB of float32.
LARGEST_COPY = 1 << 25


class PortableKernel(Kernel):
    """Shrink and expand by one product of rows with the weights of their slots."""

    takes_several = True

    def products(self, inputs: Tensor, weights: Tensor, routing: RowRouting) -> Tensor:
        """Return `weights[i] @ inputs[t]` of every row, in the dtype of `inputs`; arbitrary where `i` is no slot."""
        raise NotImplementedError

    def shrink(self, call: LoraCall) -> None:
        """As `Kernel.shrink`."""
        (output,), (weights,) = call.outputs, call.lora_a
        hidden = self._products(call.inputs.to(accumulator(*call.operands)), weights, call.routing)
        output[:, : weights.shape[1]].copy_(torch.where(call.routing.has_adapter, hidden * call.scaling, 0.0))

    def expand(self, call: LoraCall) -> None:
        """As `Kernel.expand`."""
        (output,), (weights,) = call.outputs, call.lora_b
        value = self._products(call.inputs.to(accumulator(*call.operands)), weights, call.routing)
        if call.add:
            value += output
        output.copy_(torch.where(call.routing.has_adapter, value, output.to(value.dtype)))

    def add_lora(self, call: LoraCall) -> None:
        """As `Kernel.add_lora`."""
        if call.routing.adapter_weights is not None:
            self._add_several(call, call.routing.adapter_weights)
            return
        inputs, has_adapter = call.inputs.to(accumulator(*call.operands)), call.routing.has_adapter
        for a, b, columns in zip(call.lora_a, call.lora_b, call.columns, strict=True):
            hidden = torch.where(has_adapter, self._products(inputs, a, call.routing) * call.scaling, 0.0)
            value = self._products(hidden, b, call.routing) + columns
            columns.copy_(torch.where(has_adapter, value, columns.to(value.dtype)))

    def _add_several(self, call: LoraCall, adapter_weights: Tensor) -> None:
        """The same for M adapters a row: a row for each of them, of which the sums are added."""
        dtype, (rows, several), routing = accumulator(*call.operands), adapter_weights.shape, call.routing.one_by_one()
        inputs, has_adapter = repeated(call.inputs.to(dtype), several), routing.has_adapter
        factors = adapter_weights.reshape(-1, 1).to(dtype)
        has_any = has_adapter.view(rows, several).any(1, keepdim=True)
        for a, b, columns in zip(call.lora_a, call.lora_b, call.columns, strict=True):
            hidden = self._products(inputs, a, routing) * call.scaling * factors
            hidden = torch.where(has_adapter, hidden, 0.0)
            value = torch.where(has_adapter, self._products(hidden, b, routing), 0.0)
            added = value.view(rows, several, b.shape[1]).sum(1) + columns
            columns.copy_(torch.where(has_any, added, columns.to(dtype)))

    def _products(self, inputs: Tensor, weights: Tensor, routing: RowRouting) -> Tensor:
        with without_autocast(inputs.device.type):
            return self.products(inputs, weights, routing)


class Grouped(PortableKernel):
    """One product for each slot that rows use: for a CPU, which can read the sizes of the groups without waiting."""

    name = "grouped"
    devices = ("cpu",)

    def products(self, inputs: Tensor, weights: Tensor, routing: RowRouting) -> Tensor:
        """As `PortableKernel.products`."""
        result = inputs.new_empty(len(inputs), weights.shape[1])
        for slot, rows in routing.rows_by_slot:
            result[rows] = inputs[rows] @ weights[slot].to(inputs.dtype).t()
        return result


class Gather(PortableKernel):
    """Copy each row's weights, and multiply in one batched product: nothing on the host depends on the indices.

    The rows are taken in pieces, so that what is copied at a time stays small.
    """

    name = "gather"

    def products(self, inputs: Tensor, weights: Tensor, routing: RowRouting) -> Tensor:
        """As `PortableKernel.products`."""
        rows = max(1, LARGEST_COPY // max(1, weights.shape[1] * weights.shape[2]))
        slots = routing.slot
        if len(inputs) <= rows:
            return self._gathered(inputs, weights, slots)
        result = inputs.new_empty(len(inputs), weights.shape[1])
        for start in range(0, len(inputs), rows):
            piece = slice(start, start + rows)
            result[piece] = self._gathered(inputs[piece], weights, slots[piece])
        return result

    @staticmethod
    def _gathered(inputs: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
        return torch.bmm(weights[slots].to(inputs.dtype), inputs.unsqueeze(2)).squeeze(2)
