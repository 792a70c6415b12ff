"""The owner of each element of a tensor: which sequence of the batch it belongs to.

Owners are an int32 tensor with as many dimensions as what they describe. A dimension along which they are constant has
size 1, so that they stay small: those of `[batch, tokens, features]` are mostly `[batch, 1, 1]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# No sequence: a weight, a constant, a table of positions.
SHARED = -1
# Nobody said, or the rules cannot follow: an input that is not one a sequence, an op without a rule.
UNKNOWN = -2
# Several sequences went into one element.
MIXED = -3
# A number from here on is a guess: a constant that was repeated once for each sequence. Any real owner overrules it.
GUESS = 1 << 20


@dataclass
class Owned:
    """What is known of one tensor.

    Attributes:
        owners: int32, broadcastable to the tensor's shape: a sequence's number, or one of the constants above.
        varies: whether the values depend on the model's inputs, and not on shapes and weights alone.
        by_data: whether another value of the inputs could have put the rows in another order.
        cause: for an owner that is UNKNOWN or MIXED, the input or op that made it so.
        mask: whether the values come from masks alone: see `BatchRouting._kind` for what code may learn from them.
    """

    owners: Tensor
    varies: bool = True
    by_data: bool = False
    cause: str = ""
    mask: bool = False


def constant(owner: int, dimensions: int) -> Tensor:
    """Owners that are the same for all elements of a tensor with so many dimensions."""
    return torch.full((1,) * dimensions, owner, dtype=torch.int32)


def along(dimension: int, dimensions: int, count: int) -> Tensor:
    """Owners of a tensor whose index along one dimension is the number of the sequence."""
    return torch.arange(count, dtype=torch.int32).view([-1 if at == dimension else 1 for at in range(dimensions)])


def compress(owners: Tensor) -> Tensor:
    """The same owners, with size 1 for each dimension along which they are constant."""
    for dimension, size in enumerate(owners.shape):
        if size > 1:
            first = owners.narrow(dimension, 0, 1)
            if owners.stride(dimension) == 0 or bool((owners == first).all()):
                owners = first
    return owners


def fold(owners: Tensor, dimensions: Iterable[int]) -> Tensor:
    """The owner of what is computed from all elements along these dimensions, which become size 1."""
    dims = tuple(sorted({at % owners.dim() for at in dimensions if owners.shape[at] > 1}))
    if not dims:
        return owners
    real = (owners >= 0) & (owners < GUESS)
    highest = torch.where(real, owners, -1).amax(dims, keepdim=True)
    lowest = torch.where(real, owners, GUESS).amin(dims, keepdim=True)
    guess = owners >= GUESS
    high_guess = torch.where(guess, owners, -1).amax(dims, keepdim=True)
    low_guess = torch.where(guess, owners, 2 * GUESS).amin(dims, keepdim=True)
    # Guesses that disagree were no sequences.
    result = torch.where((high_guess >= 0) & (high_guess == low_guess), high_guess, SHARED)
    result = torch.where(_any(owners == UNKNOWN, dims), UNKNOWN, result)
    result = torch.where(highest >= 0, torch.where(highest == lowest, highest, MIXED), result)
    return torch.where(_any(owners == MIXED, dims), MIXED, result).to(torch.int32)


def _any(condition: Tensor, dims: tuple[int, ...]) -> Tensor:
    return condition.to(torch.int8).amax(dims, keepdim=True).bool()


def merge(several: Sequence[Tensor]) -> Tensor:
    """The owner of what is computed elementwise from tensors with these owners, which broadcast."""
    first, *rest = several
    for other in rest:
        if other is first or (other.numel() == 1 and int(other) == SHARED):
            continue
        if first.numel() == 1 and int(first) == SHARED:
            first = other.view((1,) * max(0, first.dim() - other.dim()) + other.shape)
            continue
        if first.shape == other.shape and bool((first == other).all()):
            continue
        first, other = torch.broadcast_tensors(first, other)
        first = compress(fold(torch.stack([first, other]), [0])[0])
    return first
