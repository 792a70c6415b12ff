"""What is computed from the indices alone: which slot each row reads, and the rows in the order of their slots."""

from __future__ import annotations

import itertools
from functools import cached_property

import torch
from torch import Tensor


class RowRouting:
    """The indices of a batch in the forms that kernels want, each computed when first asked for.

    Args:
        indices: `[T]`, int32 or int64; a row has an adapter where its index is in `[0, K)`. With weights `[T, M]`.
        slots: K.
        ranks: `[K]`, int32 or int64: from where on each slot's weights are zeros, if that is known.
        tiles: the table that the Triton kernels read, if that was computed before: see `triton_kernels`.
        adapter_weights: `[T, M]`, the factor of each of a row's M adapters; None where a row has one adapter at most.
    """

    # What the calls of one graph may hand on, by name.
    PREPARED = ("slot", "has_adapter", "order", "starts", "tiles", "ranks", "adapter_weights")

    def __init__(
        self,
        indices: Tensor,
        slots: int,
        ranks: Tensor | None = None,
        tiles: Tensor | None = None,
        adapter_weights: Tensor | None = None,
    ) -> None:
        self.indices = indices
        self.slots = slots
        # Kernels step through them one by one.
        self.ranks = None if ranks is None else ranks.contiguous()
        self.tiles = tiles
        self.adapter_weights = adapter_weights

    @classmethod
    def of(cls, indices: Tensor, slots: int, *prepared: Tensor | None) -> RowRouting:
        """Build a RowRouting, of which the parts named `PREPARED` may have been computed before."""
        given = dict(zip(cls.PREPARED, prepared, strict=False))
        routing = cls(indices, slots, *(given.pop(name, None) for name in ("ranks", "tiles", "adapter_weights")))
        routing.__dict__.update((name, tensor) for name, tensor in given.items() if tensor is not None)
        return routing

    def one_by_one(self) -> RowRouting:
        """The same with a row for each adapter of a row, `[T * M]`, without weights."""
        return RowRouting(self.indices.reshape(-1), self.slots, self.ranks)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first four of `PREPARED`."""
        return self.slot, self.has_adapter, self.order, self.starts

    @cached_property
    def slot(self) -> Tensor:
        """`[T]`, int64: a slot that row t may read; 0 or K - 1 where it has no adapter."""
        return self.indices.clamp(0, self.slots - 1).long()

    @cached_property
    def has_adapter(self) -> Tensor:
        """`[T, 1]`, bool."""
        return ((self.indices >= 0) & (self.indices < self.slots))[:, None]

    @cached_property
    def order(self) -> Tensor:
        """`[T]`, int64: the rows sorted by slot, those without an adapter last."""
        return torch.argsort(self._group, stable=True)

    @cached_property
    def starts(self) -> Tensor:
        """`[K + 2]`, int64: where in `order` each slot's rows start, then the rows without an adapter; the end."""
        bounds = torch.arange(self.slots + 2, device=self.indices.device)
        return torch.searchsorted(self._group[self.order], bounds)

    @cached_property
    def _group(self) -> Tensor:
        return torch.where(self.has_adapter[:, 0], self.slot, self.slots)

    @cached_property
    def rows_by_slot(self) -> list[tuple[int, Tensor]]:
        """For each slot that any row uses, its number and its rows. Waits for the device, so only for the CPU."""
        *bounds, _ = self.starts.tolist()
        groups = enumerate(itertools.pairwise(bounds))
        return [(slot, self.order[start:end]) for slot, (start, end) in groups if start < end]
