"""`nn.Embedding`, and those of transformers that multiply what they look up by a number, as Gemma and BART do."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from xpu_lora_compile.adapters.checkpoint import ModuleSizes
from xpu_lora_compile.layers.host import Host, LoraLayer, layer_class, routing_of
from xpu_lora_compile.ops import bgmv_expand


class EmbeddingLayer(LoraLayer):
    """A table that adds `B[i] @ A[i][:, token]` to the rows of adapter i.

    Buffers: `lora_a` `[K, V, R]`, one row a token; `lora_b` `[K, W, R]`, with scaling folded in.
    """

    lora_features = 0

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, for calls by keyword
        """The base layer's output, with each row's adapter added while a `bank.use` block runs."""
        indices = routing_of(self).rows_of(self, input, 0)
        if indices is None:
            return self.without_lora(input)
        tokens = input.reshape(-1)
        output = self.without_lora(tokens)
        # A row without an adapter may read any slot: the op below drops what it computed.
        hidden = self.scaled(self.lora_a[indices.clamp(min=0), tokens])
        bgmv_expand(output, hidden, self.lora_b, indices)
        return output.view(*input.shape, output.shape[1])

    def scaled(self, hidden: Tensor) -> Tensor:
        """What the base class multiplies its rows by is multiplied in here; nothing in an nn.Embedding."""
        return hidden

    @staticmethod
    def shape_of_a(site: ModuleSizes, rank: int) -> tuple[int, int]:
        """Shape of A in one slot: one row a token."""
        return site.in_features, rank

    def places(
        self, slot_a: Tensor, slot_b: Tensor, shape_a: tuple[int, int], shape_b: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """As `LoraLayer.places`; `slot_a` is `[V, R]`, and A `[r, V']`."""
        return slot_a[: shape_a[1], : shape_a[0]].t(), slot_b[:, : shape_b[1]]


class ScaledEmbeddingLayer(EmbeddingLayer):
    """A table that multiplies what it looks up by `embed_scale`, and LoRA by the same number, as PEFT does."""

    def scaled(self, hidden: Tensor) -> Tensor:
        """Multiply in float32: the product with B rounds once."""
        return cast("Tensor", hidden.to(torch.float32) * cast("Any", self).embed_scale)


class LoraEmbedding(EmbeddingLayer, nn.Embedding):  # type: ignore[override]
    """An Embedding that adds LoRA."""


class Embedding(Host):
    """A table of tokens with a floating weight."""

    name = "nn.Embedding"

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Return whether it is nn.Embedding, a subclass with the same forward, or one that scales."""
        return issubclass(kind, nn.Embedding) and (kind.forward is nn.Embedding.forward or _is_scaled(kind))

    def takes(self, module: nn.Module) -> bool:
        """Return whether it is one that changes no weights when it is called: with `max_norm` PEFT changes A, too."""
        return super().takes(module) and getattr(module, "max_norm", None) is None

    def site(self, module: nn.Module) -> ModuleSizes:
        """Return the rows and columns of the table."""
        assert isinstance(module, nn.Embedding)  # noqa: S101 - for the type checker
        return ModuleSizes("embedding", module.num_embeddings, module.embedding_dim, padded=True)

    def weight_of(self, module: nn.Module) -> Tensor:
        """As `Host.weight_of`: a column for each token."""
        return super().weight_of(module).t()

    def layer(self, module: nn.Module) -> type[LoraLayer]:
        """Return `LoraEmbedding`, or for a subclass one of its own."""
        if hasattr(module, "embed_scale"):
            return layer_class(ScaledEmbeddingLayer, type(module))
        return LoraEmbedding if type(module) is nn.Embedding else layer_class(EmbeddingLayer, type(module))


def _is_scaled(kind: type[nn.Module]) -> bool:
    # Each model of transformers has a class of its own, with the same few lines.
    return kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("ScaledWordEmbedding")
