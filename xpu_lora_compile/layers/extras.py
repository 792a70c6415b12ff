"""Layers with room for more of PEFT's LoRA than A and B: DoRA, biases, and weights of an adapter's own.

LoRA is added as in any layer, and then:

    output[t] = scale[i] * output[t] + shift[i]          or weight[i] @ inputs[t] + shift[i], where slot i has a weight

All are small gathers by the slot of each row, in every graph of such a layer whatever the adapters are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from xpu_lora_compile.adapters.checkpoint import HEAD, SCALE, SHIFT, TOKENS, ModuleSizes
from xpu_lora_compile.adapters.extras import EMPTY, HEAD_SLOTS, HEADS, SCALES, SHIFTS, TOKEN_IDS, TOKEN_VALUES
from xpu_lora_compile.errors import AdapterError, AttachError
from xpu_lora_compile.layers.conv2d import ConvLayer
from xpu_lora_compile.layers.embedding import EmbeddingLayer
from xpu_lora_compile.layers.host import Host, LoraLayer, layer_class, routing_of
from xpu_lora_compile.ops import bgmv_shrink, lora_linear

# How many numbers of a weight are looked at in one piece.
_PIECE = 2**24


class ExtraLayer(LoraLayer):
    """A layer that scales, shifts or replaces what a layer with LoRA returns, by the slot of each row.

    Buffers: those of `adapters.extras` for which `lora_site.room` has room.
    """

    lora_host: Host
    lora_scales: Tensor
    lora_shifts: Tensor
    lora_heads: Tensor
    lora_head_slots: Tensor
    lora_token_ids: Tensor
    lora_token_values: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, for calls by keyword
        """The output with LoRA, with what each row's adapter has besides while a `bank.use` block runs."""
        output = super().forward(input)
        indices = routing_of(self).rows_of(self, input, self.lora_features)
        if indices is None:
            return output
        rows, buffers = output.reshape(-1, output.shape[-1]), self._buffers
        # Index -1, of rows without an adapter, is the last entry.
        if HEADS in buffers:
            own = self.lora_head_slots[indices]
            rows = torch.where((own >= 0).unsqueeze(1), self._by_own_weights(input, rows, own), rows)
        if TOKEN_IDS in buffers:
            rows = self._with_tokens(input, rows, indices)
        if SCALES in buffers:
            rows = rows * self.lora_scales[indices]
        if SHIFTS in buffers:
            rows = rows + self.lora_shifts[indices]
        return rows.to(output.dtype).view(output.shape)

    def _by_own_weights(self, input: Tensor, output: Tensor, own: Tensor) -> Tensor:  # noqa: A002
        """`weight[i] @ inputs[t]` of the rows whose slot has a weight; arbitrary in others, and as finite as these.

        Args:
            input: of the layer.
            output: `[T, H]`, which stays as it is.
            own: the slot of each row, `[T]`, or -1.
        """
        return _products(input.reshape(-1, input.shape[-1]), self.lora_heads, own, output.dtype)

    def _with_tokens(self, input: Tensor, output: Tensor, indices: Tensor) -> Tensor:  # noqa: A002
        """Return logits in which those of a slot's tokens are by its own rows."""
        tokens = self.lora_token_ids[indices]
        has_tokens, columns = tokens >= 0, tokens.clamp(min=0)
        values = _products(input.reshape(-1, input.shape[-1]), self.lora_token_values, indices, output.dtype)
        return output.scatter(1, columns, torch.where(has_tokens, values, output.gather(1, columns)))

    @property
    def lora_extras(self) -> Mapping[str, Tensor]:
        """As `LoraLayer.lora_extras`."""
        return {name: cast("Tensor", self._buffers[name]) for name in EMPTY if name in self._buffers}

    def own_bias(self) -> Tensor | None:
        """The bias of the module without LoRA, `[H]`.

        Raises:
            AdapterError: it is not there.
        """
        self._check_in_memory()
        return own_bias(self)

    def _check_in_memory(self) -> None:
        if any(parameter.is_meta for parameter in self.parameters(recurse=False)):
            raise AdapterError(
                f"load: {self.lora_name}",
                "the module's weight and bias, for norms of DoRA or another bias",
                "a meta tensor, as offloading leaves it",
                "Attach to a model whose weights are in memory, or leave the module out of target_modules.",
            )

    def row_norms(self, a: Tensor, b: Tensor) -> Tensor:
        """Lengths of the rows of `W + b @ a`, float32 `[W]`: a piece of the columns at a time.

        Args:
            a: `[r, D]`, float32; for an embedding `[r, V]`.
            b: `[W, r]`, float32.

        Raises:
            AdapterError: the weight is not there.
        """
        width, device = len(b), self.lora_host.device(self)
        self._check_in_memory()
        a, b, weight = a.to(device), b.to(device), self.lora_host.weight_of(self).to(device)
        squares = torch.zeros(width, device=device)
        step = max(1, _PIECE // width)
        for start in range(0, a.shape[1], step):
            columns = slice(start, min(start + step, a.shape[1]))
            part = weight[:width, columns].to(torch.float32)
            squares += torch.addmm(part, b, a[:, columns]).square().sum(1)
        return squares.sqrt()

    def restore(self) -> None:
        """As `LoraLayer.restore`."""
        for name in (*self.lora_extras, "lora_host"):
            delattr(self, name)
        super().restore()


class ExtraConvLayer(ExtraLayer):
    """The same of a convolution, by the slot of each image: it has room for DoRA and biases."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, for calls by keyword
        """As `ExtraLayer.forward`."""
        output = result = super(ExtraLayer, self).forward(input)
        slots = routing_of(self).rows_of(self, input if input.dim() == 4 else input.unsqueeze(0), 3)
        if slots is None:
            return output
        if SCALES in self._buffers:
            result = result * self.lora_scales[slots][:, :, None, None]
        if SHIFTS in self._buffers:
            result = result + self.lora_shifts[slots][:, :, None, None]
        return result.to(output.dtype).view(output.shape)


class ExtraEmbeddingLayer(ExtraLayer):
    """The same of a table, whose weights are looked up by token."""

    def _by_own_weights(self, input: Tensor, output: Tensor, own: Tensor) -> Tensor:  # noqa: A002
        values = self.lora_heads[own.clamp(min=0), input.reshape(-1)]
        return cast("Any", self).scaled(values).to(output.dtype)  # type: ignore[no-any-return]

    def _with_tokens(self, input: Tensor, output: Tensor, indices: Tensor) -> Tensor:  # noqa: A002
        is_token = self.lora_token_ids[indices] == input.reshape(-1, 1)
        values = self.lora_token_values[indices.clamp(min=0), is_token.int().argmax(1)]
        return torch.where(is_token.any(1, keepdim=True), cast("Any", self).scaled(values).to(output.dtype), output)


def _products(inputs: Tensor, weights: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weights[i] @ inputs[t]`, `[T, W]`, and 0 in rows without an adapter.

    Args:
        inputs: `[T, D]`.
        weights: `[K, W, D]`.
        indices: `[T]`.
        dtype: of the result.
    """
    slots, width, features = weights.shape
    if not torch.is_grad_enabled():
        result = inputs.new_empty(len(inputs), width, dtype=dtype)
        bgmv_shrink(result, inputs, weights, indices)
        return result
    # The op with gradients has two factors: the other one is the smaller identity.
    size = min(width, features)
    identity = torch.eye(size, dtype=weights.dtype, device=weights.device).expand(slots, size, size)
    a, b = (weights, identity) if width <= features else (identity, weights)
    return lora_linear(inputs.new_zeros(len(inputs), width, dtype=dtype), inputs, [a], [b], indices, [0])


def own_bias(module: nn.Module) -> Tensor | None:
    """Return the bias of a module, whatever keeps it; None where it has none."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def extra_class(kind: type[LoraLayer]) -> type[LoraLayer]:
    """Return the class of layers of this class that have room for more."""
    by_kind = {EmbeddingLayer: ExtraEmbeddingLayer, ConvLayer: ExtraConvLayer}
    return layer_class(next((extra for known, extra in by_kind.items() if issubclass(kind, known)), ExtraLayer), kind)


def room_of(
    host: Host, module: nn.Module, use_dora: bool, lora_bias: bool, bias: bool, *, is_head: bool, has_tokens: bool
) -> frozenset[str]:
    """Return what a module's slots get room for.

    Args:
        host: of the module.
        module: before it is a layer.
        use_dora: as of `attach`.
        lora_bias: likewise.
        bias: whether slots have biases of the module.
        is_head: whether they have weights of it.
        has_tokens: whether they have rows of it.

    Raises:
        AttachError: DoRA takes a weight that nobody can read.
    """
    if host.site(module).by_name and not host.site(module).kernel:
        # PEFT has plain LoRA alone on parameters, and a router returns more than its product.
        return frozenset()
    if use_dora and not host.has_weight:
        raise AttachError(
            "attach: use_dora",
            "modules whose weight can be read, for the norms of DoRA",
            f"a {type(module).__name__}, which {host.name} keeps in a form of its own",
            "Leave such modules out with exclude_modules, or load the base model without quantization.",
        )
    is_linear, has_bias = host.site(module).kind == "linear", own_bias(module) is not None
    # PEFT has no bias of B for tables. DoRA does not scale the bias of the module.
    shifts = is_linear and (lora_bias or (has_bias and (bias or use_dora or is_head)))
    room = {SCALE: use_dora, SHIFT: shifts, HEAD: is_head, TOKENS: has_tokens}
    return frozenset(name for name, is_wanted in room.items() if is_wanted)


def empty_extras(
    host: Host, module: nn.Module, site: ModuleSizes, slots: int, tokens: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The buffers of a module for which `site.room` says that there is room, with empty slots."""
    device, columns = host.device(module), host.site(module).out_features
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if SCALE in site.room:
        shapes[SCALES] = (slots + 1, columns), torch.float32
    if SHIFT in site.room:
        shapes[SHIFTS] = (slots + 1, columns), torch.float32
    weight = cast("Tensor", module._parameters.get("weight"))
    if TOKENS in site.room:
        shapes[TOKEN_IDS] = (slots + 1, tokens), torch.int64
        shapes[TOKEN_VALUES] = (slots, tokens, weight.shape[1]), dtype
    if HEAD in site.room:
        shapes[HEADS] = (slots, *weight.shape), dtype
        shapes[HEAD_SLOTS] = (slots + 1,), torch.int64
    return {name: torch.full(shape, EMPTY[name], dtype=of, device=device) for name, (shape, of) in shapes.items()}
