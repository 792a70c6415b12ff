"""How a layer's rows come from the sequences: a `Layout` holds for other sizes too, `Picked` for one call alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xpu_lora_compile.rows.owners import GUESS, MIXED, SHARED, UNKNOWN, compress, fold


class Layout(NamedTuple):
    """Along one dimension of a layer's input the sequences lie in a regular order; other dimensions do not matter.

    That dimension is `outer` times all sequences, each of them `inner` times in a row. In a packed batch each token
    counts as a sequence here.

    Args:
        dimension: which one, counted from the front.
        outer: 1, another number, or 0 for however many there are.
        inner: likewise; at most one of the two is 0. Of a packed batch it may be -n: n tokens have become one row.
    """

    dimension: int
    outer: int
    inner: int

    def takes(self, size: int, batch: int) -> bool:
        """Whether a dimension of this size can hold the sequences in this way."""
        if self.inner < 0:
            return bool(size * -self.inner == batch)
        if self.outer and self.inner:
            return bool(size == self.outer * batch * self.inner)
        return bool(size % (batch * max(self.outer, self.inner)) == 0)

    def rows(self, slots: Tensor, shape: Sequence[int]) -> Tensor:
        """The slot of each row.

        Args:
            slots: `[batch]`, one for each sequence.
            shape: of the layer's input without its features.

        Returns:
            `[T]`, T the product of `shape`.
        """
        if self.inner < 0:
            slots = slots[:: -self.inner]
            return Layout(self.dimension, 1, 1).rows(slots, shape)
        batch = slots.shape[0]
        if self.dimension == 0 and self.outer == 1:
            # The rows of a sequence lie together, whatever the shape.
            each = math.prod(shape[1:]) if self.inner == 1 else math.prod(shape) // batch
            return slots.unsqueeze(1).expand(-1, each).reshape(-1)
        size = shape[self.dimension]
        outer, inner = self.outer or size // (batch * self.inner), self.inner or size // (batch * self.outer)
        line = slots.view(1, batch, 1).expand(outer, batch, inner).reshape(size)
        places = [size if at == self.dimension else 1 for at in range(len(shape))]
        return line.view(places).expand(list(shape)).reshape(-1)


class Picked(NamedTuple):
    """Rows in an order that holds for this call alone: values may decide it, as where a router picks rows for experts.

    Args:
        places: `[T]`, int64: for each row where its slot is among those of the sequences.
        why: they have no layout.
    """

    places: Tensor
    why: str

    def rows(self, slots: Tensor, shape: Sequence[int]) -> Tensor:
        """As `Layout.rows`."""
        return slots[self.places.to(slots.device)]


UNSAID = "nobody said whose rows these are"


def fit(
    owners: Tensor, shape: Sequence[int], batch: int, lengths: Sequence[int] | None = None, *, by_data: bool = False
) -> Layout | Picked | str:
    """The layout of rows with these owners, or what is wrong with them.

    Args:
        owners: of a layer's input without its features, compressed.
        shape: of the same.
        batch: the number of sequences, at least 2.
        lengths: of the sequences in a packed batch, in tokens.
        by_data: whether values decide the order of the rows.
    """
    if bool((owners == MIXED).any()):
        return "several sequences are mixed in a row"
    unknown = bool((owners == UNKNOWN).any())
    # A guess is good for what nobody else has a part in.
    owners = torch.where(owners >= GUESS, SHARED if unknown else owners - GUESS, owners)
    if not bool((owners >= 0).any()):
        return UNSAID if unknown else "these rows belong to no sequence: all share them"
    owners = torch.where(owners < 0, -1, owners)
    if by_data:
        return _picked(owners, shape, batch, lengths, "the model computes by an index which rows these are")
    for dimension, size in enumerate(shape):
        line = compress(fold(owners, [at for at in range(owners.dim()) if at != dimension])).flatten()
        if len(line) != size or bool((line < 0).any()):
            continue
        layout = _fit_packed(line, dimension, lengths) if lengths else _fit_line(line, dimension, size, batch)
        if layout:
            return layout
    return _picked(owners, shape, batch, lengths, "the sequences lie in no regular order")


def _picked(owners: Tensor, shape: Sequence[int], batch: int, lengths: Sequence[int] | None, why: str) -> Picked | str:
    if not bool(((owners >= 0) & (owners < batch)).all()):
        return why
    places = owners.expand(list(shape)).reshape(-1).long()
    if lengths:
        # Each token has a slot: that of the sequence's first one is as good as any.
        sizes = torch.tensor(lengths)
        places = (sizes.cumsum(0) - sizes)[places]
    return Picked(places, why)


def _fit_line(line: Tensor, dimension: int, size: int, batch: int) -> Layout | None:
    changes = (line[1:] != line[:-1]).nonzero()
    inner = int(changes[0]) + 1 if len(changes) else size
    outer, rest = divmod(size, batch * inner)
    if rest or not torch.equal(line, torch.arange(batch, dtype=line.dtype).repeat_interleave(inner).repeat(outer)):
        return None
    # Which of the two numbers grows with the inputs is known where the other one is 1.
    if outer == 1 and inner > 1:
        inner = 0
    elif inner == 1 and outer > 1:
        outer = 0
    return Layout(dimension, outer, inner)


def _fit_packed(line: Tensor, dimension: int, lengths: Sequence[int]) -> Layout | None:
    tokens, size = sum(lengths), len(line)
    sequences = torch.arange(len(lengths), dtype=line.dtype)
    if size % tokens == 0:
        inner = size // tokens
        counts = torch.tensor(lengths) * inner
    elif tokens % size == 0 and not any(length % (tokens // size) for length in lengths):
        inner = -(tokens // size)
        counts = torch.tensor(lengths) // -inner
    else:
        return None
    return Layout(dimension, 1, inner) if torch.equal(line, sequences.repeat_interleave(counts)) else None
