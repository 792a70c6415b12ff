"""`nn.Embedding`."""

from __future__ import annotations

from torch import Tensor, nn

from xpu_lora_compile.adapters.checkpoint import ModuleSizes
from xpu_lora_compile.layers.host import Host, LoraLayer, routing_of
from xpu_lora_compile.ops import bgmv_expand


class LoraEmbedding(LoraLayer, nn.Embedding):  # type: ignore[override]
    """An Embedding that adds `B[i] @ A[i][:, token]` to the rows of adapter i.

    Buffers: `lora_a` `[K, V, R]`, one row a token; `lora_b` `[K, W, R]`, with scaling folded in.
    """

    lora_features = 0

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, for calls by keyword
        """The base layer's output, with each row's adapter added while a `bank.use` block runs."""
        indices = routing_of(self).rows_of(self, input, 0)
        if indices is None:
            return nn.Embedding.forward(self, input)
        tokens = input.reshape(-1)
        output = nn.Embedding.forward(self, tokens)
        # A row without an adapter may read any slot: the op below drops what it computed.
        hidden = self.lora_a[indices.clamp(min=0), tokens]
        bgmv_expand(output, hidden, self.lora_b, indices)
        return output.view(*input.shape, output.shape[1])

    @staticmethod
    def shape_of_a(site: ModuleSizes, rank: int) -> tuple[int, int]:
        """Shape of A in one slot: one row a token."""
        return site.in_features, rank

    def places(
        self, slot_a: Tensor, slot_b: Tensor, shape_a: tuple[int, int], shape_b: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """As `LoraLayer.places`; `slot_a` is `[V, R]`, and A `[r, V']`."""
        return slot_a[: shape_a[1], : shape_a[0]].t(), slot_b[:, : shape_b[1]]


class Embedding(Host):
    """A table of tokens with a floating weight; no subclass, which may compute something else."""

    name = "nn.Embedding"

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Return whether it is nn.Embedding itself."""
        return kind is nn.Embedding

    def site(self, module: nn.Module) -> ModuleSizes:
        """Return the rows and columns of the table."""
        assert isinstance(module, nn.Embedding)  # noqa: S101 - for the type checker
        return ModuleSizes("embedding", module.num_embeddings, module.embedding_dim, padded=True)

    def layer(self, module: nn.Module) -> type[LoraLayer]:
        """Return `LoraEmbedding`."""
        return LoraEmbedding
