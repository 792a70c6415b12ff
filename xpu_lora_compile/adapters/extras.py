"""What a slot holds besides A and B, computed from an adapter's file and the model's own weights while it is loaded.

    output[t] = scale[i] * (base(x)[t] + B[i] @ A[i] @ x[t]) + shift[i]

DoRA: `scale = m / |W + B @ A|` by rows, and the bias is not scaled: `shift = bias - scale * bias`. Biases of an adapter
are part of `shift`; a head replaces what the module computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from xpu_lora_compile.adapters.checkpoint import Checkpoint, Extras, ModuleSizes, are_finite, room_for
from xpu_lora_compile.errors import NonFiniteWeightError, UnsupportedAdapterError

# Buffers of a layer: what each slot's rows are multiplied by, and what is added to them, `[K + 1, H]`, float32; the
# weights of each slot's own, `[K, *weight]`; and for each slot its number if it has one, or -1, `[K + 1]`. The last row
# is that of rows without an adapter, whose index is -1.
SCALES, SHIFTS, HEADS, HEAD_SLOTS = "lora_scales", "lora_shifts", "lora_heads", "lora_head_slots"
# The tokens for which each slot has rows, `[K + 1, N]`, or -1 in a slot without any; and the rows, `[K, N, D]`.
TOKEN_IDS, TOKEN_VALUES = "lora_token_ids", "lora_token_values"
# What an empty slot holds, and one whose adapter has nothing else.
EMPTY: Mapping[str, float] = {SCALES: 1, SHIFTS: 0, HEADS: 0, HEAD_SLOTS: -1, TOKEN_IDS: -1, TOKEN_VALUES: 0}


class RoomyLayer(Protocol):
    """What a layer offers that may have room for more than A and B."""

    lora_site: ModuleSizes

    @property
    def lora_extras(self) -> Mapping[str, Tensor]:
        """The buffers that are named above; none where there is no room."""

    def own_bias(self) -> Tensor | None:
        """The bias of the module without LoRA, `[H]`."""

    def row_norms(self, a: Tensor, b: Tensor) -> Tensor:
        """Lengths of the rows of `W + b @ a`, float32 `[W]`, where A and B are float32 and have the scaling in B."""


def values_of(checkpoint: Checkpoint, name: str, layer: RoomyLayer) -> dict[str, Tensor]:
    """Values for a slot of a layer's buffers, by name; a buffer that the adapter has nothing for is left out.

    Raises:
        AdapterError: the file cannot be read, a value is not finite, or the model's weights are not there.
    """
    extras, given = layer.lora_extras, checkpoint.extras.get(name)
    if given is None:
        return {}
    values: dict[str, Tensor] = {}
    if given.magnitude is not None:
        pair = checkpoint.read(name, torch.float32)
        values[SCALES] = _padded(
            _scale(checkpoint, given.magnitude, layer.row_norms(pair.a, pair.b)), extras[SCALES], 1
        )
    if given.weight is not None:
        values[HEADS] = checkpoint.read_extra(given.weight, extras[HEADS].dtype)
    if given.token_rows is not None:
        values |= _tokens(checkpoint, given, extras)
    if SHIFTS in extras:
        values[SHIFTS] = _shift(checkpoint, name, layer, values)
    return values


def _shift(checkpoint: Checkpoint, name: str, layer: RoomyLayer, values: Mapping[str, Tensor]) -> Tensor:
    """The bias of the adapter, less what the bias of the module has become by then."""
    given, stack, own = checkpoint.extras[name], layer.lora_extras[SHIFTS], layer.own_bias()
    own = torch.zeros(stack.shape[1:]) if own is None else own.to("cpu", torch.float32)
    bias = own if given.bias is None else checkpoint.read_extra(given.bias, torch.float32)
    # A weight of the adapter's own is multiplied without any bias.
    shift = bias if HEADS in values else bias - values.get(SCALES, 1) * own
    if given.lora_bias is None:
        return shift
    return shift + _padded(
        checkpoint.read_extra(given.lora_bias, torch.float32, checkpoint.pairs[name].scaling), stack, 0
    )


def _scale(checkpoint: Checkpoint, key: str, norms: Tensor) -> Tensor:
    scale = checkpoint.read_extra(key, torch.float32).view(-1) / norms.to("cpu")
    if not are_finite(scale):
        where = f"{checkpoint.file.path}: {key}"
        remedy = "Use the base model that the adapter was trained on."
        raise NonFiniteWeightError(where, "rows of W + B @ A that are not all zeros", "a length of 0", remedy)
    return scale


def _tokens(checkpoint: Checkpoint, given: Extras, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert given.token_rows is not None  # noqa: S101 - for the type checker
    count, most = len(given.tokens), extras[TOKEN_IDS].shape[1]
    if count > most:
        where, option = f"{checkpoint.file.path}: {given.token_rows}", f"trainable_token_indices={count}"
        raise UnsupportedAdapterError(where, f"at most {most} tokens, as in the bank", f"{count}", room_for(option))
    # Places that are left hold the first token again: whoever writes one of them writes the same.
    places = torch.tensor([*range(count), *[0] * (most - count)])
    rows = checkpoint.read_extra(given.token_rows, extras[TOKEN_VALUES].dtype)
    return {TOKEN_IDS: torch.tensor(given.tokens)[places], TOKEN_VALUES: rows[places]}


def _padded(values: Tensor, stack: Tensor, with_: float) -> Tensor:
    """Values for all columns, where an adapter has fewer of the vocabulary."""
    whole = torch.full(stack.shape[1:], with_, dtype=torch.float32)
    whole[: len(values)] = values
    return whole
