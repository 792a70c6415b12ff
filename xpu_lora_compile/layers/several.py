"""Layers whose rows have several adapters each: `output[t] += sum_j weights[t, j] * B[i_j] @ A[i_j] @ inputs[t]`.

`attach` takes these classes where it is told `adapters_per_row`; with one adapter for a row nothing of this is there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xpu_lora_compile.errors import AttachError
from xpu_lora_compile.layers.embedding import EmbeddingLayer
from xpu_lora_compile.layers.host import LoraLayer, forward_class, layer_class, routing_of
from xpu_lora_compile.ops import lora_linear
from xpu_lora_compile.ops.lora_linear import add_lora_eagerly


class SeveralLayer(LoraLayer):
    """A linear layer that adds the weighted sum of what each row's adapters make of it."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, for calls by keyword
        """The base layer's output, with each row's adapters added while a `bank.use` block runs."""
        routing = routing_of(self)
        numbers = routing.rows_of(self, input, 1)
        if numbers is None:
            return self.without_lora(input)
        indices, weights = routing.mixes_of(numbers)
        # As in `LoraLayer.forward`.
        rows = input.reshape(-1, input.shape[-1])
        output = self.without_lora(rows) if self.lora_in_place else self._rows_of_base(self.without_lora(input))
        shape = (*input.shape[:-1], output.shape[1])
        columns = min(self.lora_b.shape[1], output.shape[1])
        ranks = None if rows.device.type == "cpu" else routing.ranks
        stacks = self.lora_a, self.lora_b
        if self.lora_in_place and add_lora_eagerly(
            output, rows, *stacks, indices, columns, ranks, adapter_weights=weights
        ):
            return output.view(shape)
        b = self.lora_b.narrow(1, 0, columns)
        added = lora_linear(output, rows, [self.lora_a], [b], indices, [0], ranks=ranks, adapter_weights=weights)
        return added.view(shape)


class SeveralEmbeddingLayer(EmbeddingLayer):
    """The same of a table."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, for calls by keyword
        """The base layer's output, with each row's adapters added while a `bank.use` block runs."""
        routing = routing_of(self)
        numbers = routing.rows_of(self, input, 0)
        if numbers is None:
            return self.without_lora(input)
        indices, weights = routing.mixes_of(numbers)
        output, tokens = self.without_lora(input.reshape(-1)), input.reshape(-1, 1)
        # What a place without an adapter reads is dropped by the op below.
        hidden = self.scaled(self.lora_a[indices.clamp(min=0), tokens])
        (rows, several, rank), slots = hidden.shape, self.lora_b.shape[0]
        # As in the kernels, a row for each adapter of a row, of which the sums are added in float32. The op takes two
        # factors: the first one is the identity.
        each = output.new_zeros(rows * several, self.lora_b.shape[1], dtype=torch.float32)
        identity = torch.eye(rank, dtype=hidden.dtype, device=hidden.device).expand(slots, rank, rank)
        flat, places = hidden.reshape(rows * several, rank), indices.reshape(-1)
        each = lora_linear(each, flat, [identity], [self.lora_b], places, [0]).view(rows, several, each.shape[1])
        has_adapter = indices >= 0
        total = (each * torch.where(has_adapter, weights, 0.0).unsqueeze(2)).sum(1) + output
        has_any = has_adapter.any(1, keepdim=True)
        result = torch.where(has_any, total.to(output.dtype), output)
        return result.view(*input.shape, output.shape[1])


# By the class whose forward they are in the place of.
_MIXINS: dict[type[nn.Module], type[LoraLayer]] = {LoraLayer: SeveralLayer, EmbeddingLayer: SeveralEmbeddingLayer}


def several_class(kind: type[LoraLayer], name: str) -> type[LoraLayer]:
    """Return the class of layers of this class whose rows have several adapters each.

    Args:
        kind: as `Host.layer` gives it.
        name: of the module, for the error.

    Raises:
        AttachError: such layers add LoRA in a way of their own.
    """
    mixin = _MIXINS.get(forward_class(kind))
    if mixin is None:
        raise AttachError(
            f"attach: {name}",
            "linear layers and embeddings, since adapters_per_row is more than 1",
            f"a {kind.__name__}",
            "Leave it out with exclude_modules, or leave adapters_per_row out.",
        )
    return layer_class(mixin, kind)
